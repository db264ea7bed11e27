"""Random histories of a prefix cache on a page table, against sets of token tuples and a shadow of what pages hold.

What attention writes for a token depends on all tokens before it, so the shadow of a slot holds the namespace and all
tokens up to its own. The long form runs at least 200,000 transitions of the table:

    pytest -n 0 -m long tests/test_prefix_machine.py -s
"""

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from state_machine import run_machine

from paged_jax.cache.invariants import check
from paged_jax.cache.page_table import PageTable
from paged_jax.prefix.cache import PrefixCache
from paged_jax.prefix.index import blake2b
from table_model import CONFIG, TRANSITIONS, B, M, P, S

COUNTS = Counter()
NAMESPACES = ("", "salt")
# a prompt repeats one of two tokens through each page, so that many begin alike
prompts = st.tuples(st.lists(st.integers(0, 1), min_size=M, max_size=M), st.integers(1, M * S)).map(
    lambda drawn: tuple(bit for bit in drawn[0] for _ in range(S))[: drawn[1]]
)
rows = st.integers(0, B - 1)


def constant(data: bytes) -> bytes:
    return b""


class PrefixCacheMachine(RuleBasedStateMachine):
    """Admit, decode, fork, cache, evict, release; compared after every step."""

    transitions: Any = TRANSITIONS
    new_cache: Any = PrefixCache

    @initialize(digest=st.sampled_from([blake2b, constant]))
    def start(self, digest):
        self.cache = self.new_cache(S, digest=digest)
        self.table = PageTable.create(CONFIG)
        self.rows: list[tuple[str, tuple[int, ...]]] = [("", ())] * B  # namespace and tokens of each row
        self.cached: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}  # tokens to a page's end: page, last use
        self.shadow: list[list[Any]] = [[None] * S for _ in range(P)]
        self.clock = 0
        self.num_transitions = 0

    def apply(self, name: str, *args):
        self.num_transitions += 1
        result = getattr(self.transitions, name)(self.table, *args)
        self.table = result[0] if isinstance(result, tuple) else result
        return result

    def pages(self) -> list[list[int]]:
        return np.asarray(self.table.pages).tolist()

    def append(self, new_tokens: dict[int, tuple[int, ...]]) -> list[bool]:
        """Rows compute new tokens: reserve, copy, write."""
        counts = [len(new_tokens.get(b, ())) for b in range(B)]
        _, reservation = self.apply("reserve", np.array(counts, np.int32))
        pairs = zip(*(np.asarray(x).tolist() for x in reservation[1:]), strict=True)
        for target, content in [(target, list(self.shadow[source])) for source, target in pairs if target]:
            self.shadow[target] = content
        granted, pages = np.asarray(reservation.granted).tolist(), self.pages()
        for b, new in new_tokens.items():
            if granted[b]:
                namespace, tokens = self.rows[b]
                for i in range(len(tokens), len(tokens) + len(new)):
                    self.shadow[pages[b][i // S]][i % S] = (namespace, (*tokens, *new)[: i + 1])
                self.rows[b] = (namespace, tokens + new)
        return granted

    def prefixes(self, namespace: str, tokens: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return [(namespace, tokens[:stop]) for stop in range(S, len(tokens) + 1, S)]

    def touch(self, namespace: str, tokens: tuple[int, ...]) -> int:
        """Use the cached prefixes of some tokens; returns how many pages they are."""
        self.clock += 1
        hits = 0
        for key in self.prefixes(namespace, tokens):
            if key not in self.cached:
                break
            self.cached[key] = (self.cached[key][0], self.clock)
            hits += 1
        return hits

    @rule(row=rows, prompt=prompts, namespace=st.sampled_from(NAMESPACES), insert=st.booleans())
    def admit(self, row, prompt, namespace, insert):
        if self.rows[row][1]:
            return
        hits = self.touch(namespace, prompt[:-1])
        self.table, num_cached = self.cache.match(self.table, row, prompt, salt=namespace)
        self.num_transitions += hits > 0
        assert num_cached == hits * S, "hit something else than the longest cached prefix"
        self.rows[row] = (namespace, prompt[:num_cached])
        self.compare()
        if not self.append({row: prompt[num_cached:]})[row]:
            self.release(1 << row)
        elif insert:
            self.insert(row)
        self.compare()

    @rule(row=rows)
    def insert(self, row):
        namespace, tokens = self.rows[row]
        keys = self.prefixes(namespace, tokens)
        hits = self.touch(namespace, tokens)
        self.table = self.cache.insert(self.table, row, tokens, salt=namespace)
        self.num_transitions += hits < len(keys)
        if hits < len(keys):
            pages = self.pages()[row]
            for column in range(hits, len(keys)):
                self.cached[keys[column]] = (pages[column], self.clock)
        self.compare()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=B, max_size=B), count=st.integers(1, S))
    def decode(self, tokens, count):
        new = {b: (token,) * count for b, token in enumerate(tokens) if self.rows[b][1]}
        self.append(new)
        self.compare()

    @rule(parent=rows, child=rows)
    def fork(self, parent, child):
        _, ok = self.apply("fork", *(np.array([x, -1, -1, -1], np.int32) for x in (parent, child)))
        if ok[0]:
            self.rows[child] = self.rows[parent]
        self.compare()

    @rule(row=rows, length=st.integers(0, M * S))
    def truncate(self, row, length):
        lengths = [len(tokens) for _, tokens in self.rows]
        lengths[row] = min(lengths[row], length)
        self.apply("truncate", np.array(lengths, np.int32))
        self.rows[row] = (self.rows[row][0], self.rows[row][1][:length])
        self.compare()

    @rule(mask=st.integers(0, 2**B - 1))
    def release(self, mask):
        self.apply("release", np.array([mask >> b & 1 for b in range(B)], bool))
        self.rows = [("", ()) if mask >> b & 1 else row for b, row in enumerate(self.rows)]
        self.compare()

    @rule(num_pages=st.integers(0, 8))
    def evict(self, num_pages):
        used = {page for row in self.pages() for page in row}
        for _ in range(num_pages):
            parents = {(namespace, tokens[:-S]) for namespace, tokens in self.cached}
            leaves = [key for key in self.cached if key not in parents and self.cached[key][0] not in used]
            if not leaves:
                break
            del self.cached[min(leaves, key=lambda key: self.cached[key][1])]
        self.table = self.cache.evict(self.table, num_pages)
        self.num_transitions += 1
        self.compare()

    @rule(really=st.integers(0, 4))
    def reset(self, really):
        used = {page for row in self.pages() for page in row}
        if any(page in used for page, _ in self.cached.values()):
            with pytest.raises(RuntimeError, match="are in use"):
                self.cache.reset(self.table)
        elif really == 0:
            self.table = self.cache.reset(self.table)
            self.cached = {}
        self.compare()

    def compare(self) -> None:
        assert sorted(self.cache.pages.tolist()) == sorted(page for page, _ in self.cached.values()), "cached pages"
        check(self.table, [self.cache.pages])
        assert np.asarray(self.table.lengths).tolist() == [len(tokens) for _, tokens in self.rows]
        for pages, (namespace, tokens) in zip(self.pages(), self.rows, strict=True):
            for i in range(len(tokens)):
                expected = (namespace, tokens[: i + 1])
                assert self.shadow[pages[i // S]][i % S] == expected, "a sequence reads what others wrote"
        for (namespace, tokens), (page, _) in self.cached.items():
            for slot in range(S):
                stop = len(tokens) - S + slot + 1
                assert self.shadow[page][slot] == (namespace, tokens[:stop]), "a cached page was overwritten"

    def teardown(self):
        if not hasattr(self, "table"):
            return
        self.release(2**B - 1)
        self.evict(P)
        assert int(self.table.num_free) == P - 1, "pages leaked"
        COUNTS["transitions"] += self.num_transitions


def test_random_histories():
    COUNTS.clear()
    run_machine(PrefixCacheMachine, num_examples=60, num_steps=40)
    assert COUNTS["transitions"] >= 2000


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_long_random_histories():
    target = int(os.environ.get("NUM_TRANSITIONS", 200_000))
    COUNTS.clear()
    while COUNTS["transitions"] < target:
        run_machine(PrefixCacheMachine, num_examples=100, num_steps=50, derandomize=False)
        print(f"{COUNTS['transitions']} transitions", flush=True)


class EvictsPagesInUse(PrefixCache):
    def evict(self, table, num_pages):
        return self._release(table, self._index.evict(num_pages))


class SharesPartialPages(PrefixCache):
    def match(self, table, row, tokens, **namespace):
        table, num_cached = super().match(table, row, tokens, **namespace)
        return table, num_cached + 1


class CachesTheWholePrompt(PrefixCache):
    def match(self, table, row, tokens, **namespace):
        return super().match(table, row, [*tokens, 0], **namespace)


class MixesNamespaces(PrefixCache):
    def match(self, table, row, tokens, salt=""):
        return super().match(table, row, tokens)

    def insert(self, table, row, tokens, salt=""):
        return super().insert(table, row, tokens)


class ForgetsItsReferences(PrefixCache):
    def insert(self, table, row, tokens, **namespace):
        super().insert(table, row, tokens, **namespace)
        return table


class TrustsTheDigest(PrefixCache):
    def __init__(self, page_size, digest):
        super().__init__(page_size, digest=digest)

        def find(chunk, parent, namespace, digest):
            return next(iter(self._index._buckets.get(digest, ())), None)

        self._index._find = find


@pytest.mark.parametrize("broken", [*PrefixCache.__subclasses__()], ids=lambda broken: broken.__name__)
def test_the_machine_finds(broken):
    class Mutant(PrefixCacheMachine):
        new_cache = broken

        def teardown(self):
            pass

    with pytest.raises((AssertionError, ValueError)):
        run_machine(Mutant, num_examples=300, num_steps=40, shrink=False)
