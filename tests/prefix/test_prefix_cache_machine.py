"""Random histories of a prefix cache, against a model that keeps the whole prefix of every cached page.

The model knows only what was published and what was returned. From that it says which prefix a lookup must find, who
owns which reference, and what may be evicted.

    pytest -n 0 -m long tests/prefix/test_prefix_cache_machine.py -s
"""

from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from paged_rows import PagedRows, Row

from paged_jax.cache.config import CacheConfig
from paged_jax.prefix.policies import POLICIES
from paged_jax.prefix.prefix_cache import Namespace, Pages, PrefixCache, Taken
from paged_jax.prefix.reach import Reach
from state_machine import run_machine

S, M = 3, 7
CONFIGS = {
    windows: CacheConfig(
        num_layers=len(windows), num_kv_heads=1, head_dim=8, num_pages=64, max_sequences=4, max_pages_per_sequence=M,
        page_size=S, windows=windows,
    )
    for windows in [(None,), (None, 5), (4, 9), (None, 1, 7)]
}  # fmt: skip
NAMESPACES = (Namespace(), Namespace("salt"))
COUNTS = Counter()
# long runs of one of two tokens, so that many prompts begin alike and part anywhere
texts = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5)), min_size=1, max_size=4).map(
    lambda runs: tuple(token for token, count in runs for _ in range(count))[: M * S - 2]
)
numbers = st.integers(0, 10**6)


class PrefixCacheMachine(RuleBasedStateMachine):
    """Requests come, publish, end; pages are evicted and cleared; drops are done some time later."""

    new_cache: Any = PrefixCache

    @initialize(windows=st.sampled_from(list(CONFIGS)), policy=st.sampled_from(list(POLICIES)))
    def start(self, windows, policy):
        self.rows = PagedRows(CONFIGS[windows])
        self.groups = range(len(self.rows.windows))
        self.cache: PrefixCache = self.new_cache(CONFIGS[windows], POLICIES[policy], max_kept_pages=5)
        self.running: list[tuple[Row, Taken, int, int]] = []  # with the version of the weights, and where to publish
        self.kept: list[Taken] = []
        self.version = 0
        self.held = [Counter() for _ in self.groups]  # references of the cache, as the model counts them
        self.prefixes: list[dict[int, tuple]] = [{} for _ in self.groups]  # namespace and prefix of each cached page
        self.pending: list[tuple[int, int]] = []
        self.asked = self.hit = self.evicted = 0

    # ---- the model ----

    def namespace(self, salted: bool) -> Namespace:
        return NAMESPACES[salted]._replace(weights=self.version)

    def give_up(self, drops: Pages) -> None:
        """The cache returned references."""
        for group, pages in enumerate(drops):
            for page in pages:
                assert self.held[group][page] > 0, "a reference is returned that the cache does not own"
                self.held[group][page] -= 1
                if not self.held[group][page]:
                    del self.prefixes[group][page], self.held[group][page]
                self.pending.append((group, page))

    def covered(self) -> list[set]:
        """For each group the beginnings of prompts whose last token a cached page holds.

        What a longer page has replaced stays while it is pinned, and is not found.
        """
        pinned = {node for taken in [*(taken for _, taken, *_ in self.running), *self.kept] for node in taken.nodes}
        covered = []
        for group, prefixes in enumerate(self.prefixes):
            replaced = Counter(node.pages[group] for node in pinned if not node.is_cached)
            held = [prefix for page, prefix in prefixes.items() if self.held[group][page] > replaced[page]]
            covered.append({(n, t[:stop]) for n, t in held for stop in range((len(t) - 1) // S * S + 1, len(t) + 1)})
        return covered

    def longest(self, namespace: Namespace, tokens: tuple) -> int:
        """After how many tokens a prompt can be continued, by trying every number."""
        covered = self.covered()
        for count in range(len(tokens) - 1, 0, -1):
            ends = [min((column + 1) * S, count) for column in range(-(-count // S))]
            if all(
                (namespace, tokens[:end]) in covered[group]
                for group in self.groups
                for end in ends[self.rows.first_seen(group, count) :]
            ):
                return count
        return 0

    def publish(self, row: Row, num_tokens: int, taken: Taken | None) -> None:
        handles = self.rows.publish(row, num_tokens)
        for group, handle in enumerate(handles):
            for column, page in enumerate(handle.pages.tolist()):
                if page:
                    self.held[group][page] += 1
                    self.prefixes[group][page] = (row.namespace, row.tokens[: min((column + 1) * S, num_tokens)])
        self.give_up(self.cache.insert(list(row.tokens), row.namespace, handles, taken))

    # ---- what happens ----

    @rule(text=texts, salted=st.booleans(), more=texts, publishes=st.sampled_from(["nothing", "pages", "all"]))
    def admit(self, text, salted, more, publishes):
        namespace = self.namespace(salted)
        before = self.state()
        match = self.cache.lookup(text, namespace)
        assert self.state() == before, "a lookup changed something"
        assert match.num_tokens == self.longest(namespace, text)
        assert match.num_tokens <= match.num_known < max(len(text), 1)
        taken = self.cache.take(match)
        assert taken.num_tokens == match.num_tokens
        now = zip(before[1], self.cache.num_evictable, match.num_evictable, strict=True)
        assert all(earlier - later == promised for earlier, later, promised in now)
        self.asked, self.hit = self.asked + len(text), self.hit + match.num_tokens
        row = self.rows.attach(namespace, taken, text)
        if match.parts_at:
            assert match.parts_at > match.num_tokens
            self.rows.append(row, text[match.num_tokens : match.parts_at])
            self.publish(row, match.parts_at, taken)
        self.rows.append(row, text[len(row.tokens) :])
        if publishes != "nothing":
            count = len(text) if publishes == "all" else (len(text) - 1) // S * S
            self.publish(row, count, taken)
        self.running.append((row, taken, self.version, 0))
        self.compare()
        if match.parts_at and self.cache.lookup(text, namespace).num_tokens < match.parts_at:
            raise AssertionError("the window was published, and the next prompt does not find it")

    @rule(which=numbers, more=texts)
    def go_on(self, which, more):
        if self.running:
            row = self.running[which % len(self.running)][0]
            self.rows.append(row, more[: M * S - len(row.tokens)])
            self.compare()

    @rule(which=numbers, publishes=st.booleans(), first=st.booleans())
    def end(self, which, publishes, first):
        if not self.running:
            return
        row, taken, version, _ = self.running.pop(which % len(self.running))
        if first:
            self.give_up(self.cache.give_back(taken))
        if publishes and version == self.version:
            self.publish(row, len(row.tokens), None)
        if not first:
            self.give_up(self.cache.give_back(taken))
        self.rows.release(row)
        self.compare()

    @rule(counts=st.tuples(*[st.integers(0, 6)] * 3))
    def evict(self, counts):
        counts = counts[: len(self.groups)]
        before = self.cache.num_evictable
        drops = self.cache.evict(counts)
        for dropped, count, most, window in zip(drops, counts, before, self.rows.windows, strict=True):
            assert len(dropped) >= min(count, most), "fewer pages than could be evicted"
            assert window is not None or len(dropped) == min(count, most)
        self.evicted += sum(map(len, drops))
        self.give_up(drops)
        self.compare()

    @rule(text=texts, salted=st.booleans())
    def keep(self, text, salted):
        kept = self.cache.keep(text, self.namespace(salted))
        self.rows.release(self.rows.attach(self.namespace(salted), kept, text))
        self.kept.append(kept)
        assert self.cache.num_kept_pages <= 5
        self.compare()

    @rule(which=numbers)
    def let_go(self, which):
        if self.kept:
            self.give_up(self.cache.give_back(self.kept.pop(which % len(self.kept))))
            self.compare()

    @rule(really=st.integers(0, 2))
    def clear(self, really):
        if really == 0:
            self.give_up(self.cache.clear())
            assert self.cache.num_evictable == (0,) * len(self.groups)
            for namespace, tokens in {held for pages in self.prefixes for held in pages.values()}:
                assert self.cache.lookup((*tokens, 0), namespace).num_known == 0, "found after it was cleared"
            self.version += 1
            for kept in self.kept:
                self.give_up(self.cache.give_back(kept))
            self.kept = []
            self.compare()

    @rule()
    def drop(self):
        while self.pending:
            self.rows.drop(*self.pending.pop())
        self.compare()

    # ---- what must hold ----

    def state(self) -> tuple:
        pages = [sorted(pages.tolist()) for pages in self.cache.pages()]
        return self.cache.num_pages, self.cache.num_evictable, self.cache.statistics, pages

    def compare(self) -> None:
        COUNTS["steps"] += 1
        statistics = self.cache.statistics
        assert (statistics.asked_tokens, statistics.hit_tokens) == (self.asked, self.hit)
        assert sum(statistics.evicted_pages) == self.evicted
        for group, pages in enumerate(self.cache.pages()):
            assert Counter(pages.tolist()) == self.held[group], "other references than were handed over"
            assert self.cache.num_pages[group] == len(pages)
            for page, (namespace, tokens) in self.prefixes[group].items():
                held = self.rows.slots[group][page][(len(tokens) - 1) % S]
                assert held == (namespace, tokens), "a cached page was overwritten"
            for _, taken, *_ in self.running:
                pinned = [page for page in taken.pages[group].tolist() if page]
                assert all(self.held[group][page] for page in pinned), "a page in use was given up"
        for row, *_ in self.running:
            self.rows.check(row)

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        while self.running:
            self.end(0, False, True)
        while self.kept:
            self.let_go(0)
        assert self.cache.num_evictable == self.cache.num_pages, "pages in use, but by nobody"
        self.evict((10**6,) * 3)
        self.drop()
        assert not any(self.rows.slots), "pages leaked"
        assert self.cache.statistics.num_branches == 0, "tokens are known that hold no page"


def test_random_histories():
    COUNTS.clear()
    run_machine(PrefixCacheMachine, num_examples=120, num_steps=30)
    assert COUNTS["steps"] >= 1500


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_long_random_histories():
    COUNTS.clear()
    while COUNTS["steps"] < 200_000:
        run_machine(PrefixCacheMachine, num_examples=300, num_steps=50, derandomize=False)
        print(f"{COUNTS['steps']} steps", flush=True)


# ---- what the machine finds ----


class FindsTheWholePrompt(PrefixCache):
    def lookup(self, tokens, namespace):
        return super().lookup([*tokens, 0], namespace)


class MixesNamespaces(PrefixCache):
    def lookup(self, tokens, namespace):
        return super().lookup(tokens, Namespace())

    def insert(self, tokens, namespace, handles, taken=None):
        return super().insert(tokens, Namespace(), handles, taken)


class KeepsWhatItHasTwice(PrefixCache):
    def insert(self, tokens, namespace, handles, taken=None):
        super().insert(tokens, namespace, handles, taken)
        return self._no_pages()


class PinsNothing(PrefixCache):
    def _pin(self, nodes, taken):
        pass


class NeverUnpins(PrefixCache):
    def _unpin(self, taken, drops):
        pass


class CountsALookup(PrefixCache):
    def lookup(self, tokens, namespace):
        self._asked_tokens += 1
        return super().lookup(tokens, namespace)


class SeesNoWindows(PrefixCache):
    def __init__(self, config, *args, **options):
        super().__init__(config, *args, **options)
        self._reach = type("Blind", (Reach,), {"longest": lambda self, path, num_known: num_known})(config)


class FindsOldWeights(PrefixCache):
    def clear(self):
        return self._no_pages()


MUTANTS = [*PrefixCache.__subclasses__()]


@pytest.mark.parametrize("broken", MUTANTS, ids=lambda broken: broken.__name__)
def test_the_machine_finds(broken):
    class Mutant(PrefixCacheMachine):
        new_cache = broken

    with pytest.raises((AssertionError, ValueError, StopIteration)):
        run_machine(Mutant, num_examples=300, num_steps=30, shrink=False)
