"""Prefixes whose pages go to slower tiers when the pool gives them up, and come back while others decode.

What the pool evicts is copied to host memory, and what is cached is copied to the store; both are dispatched between
visits and read with the next snapshot. A prompt of which a tier has more than the pool is passed over while its pages
are read, put into free pages, and cached like a publication; then it finds them as if they had never left.
"""

import concurrent.futures
import dataclasses
import math
import operator
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.engine.prefixes import CachedPrefixes, Publication
from paged_jax.engine.request import Sample
from paged_jax.engine.runner import Runner
from paged_jax.engine.scheduler import Pages, Scheduler
from paged_jax.engine.stats import Recorder
from paged_jax.engine.transfers import WIDTHS, Transfers
from paged_jax.prefix.digests import Namespace
from paged_jax.prefix.prefix_cache import PrefixCache, Taken
from paged_jax.prefix.tree import Node, encode
from paged_jax.store.page_file import PageKey, StoredPage
from paged_jax.store.tiers import HOST, Found, Tiers, Wanted

SHARE = 0.15  # of the time of a visit, that pages which come back may take while others decode
PATIENCE = 2.0  # seconds that a prompt waits for its pages before it is computed
PAUSE = 0.02  # seconds that an engine waits which has nothing else to do


@dataclasses.dataclass(eq=False)
class Load:
    """Pages of a prompt that are on their way to the pool."""

    sample: Sample
    tokens: list[int]
    namespace: Namespace
    pins: Taken  # what the pool has of it
    found: "concurrent.futures.Future[Found | None]"
    began: float
    brought: Found | None = None  # what was found, once the engine knows
    due: Pages = ()  # pages of each group that come next
    num_filled: Pages = ()
    claimed: list[Any] = dataclasses.field(default_factory=list)  # pages that were filled, on the device, [G, M] each


class Outgoing(NamedTuple):
    """A page of the pool, and what it is."""

    key: PageKey
    page: int
    stored: StoredPage | None  # None: it goes to host memory


class Restored(NamedTuple):
    """Pages as a publication brings them; see `PrefixCache.insert`."""

    pages: np.ndarray
    num_tokens: int
    first_column: int


class TieredPrefixes(CachedPrefixes):
    """The prefix cache, and what is beyond it.

    Args:
        config: sizes of the cache.
        runner: whose pages move.
        scheduler: who waits and runs.
        cache: of prefixes; empty.
        version: of the weights; where there is a store, their fingerprint.
        tiers: beyond the pool.
        recorder: of what happens.
    """

    def __init__(
        self,
        config: CacheConfig,
        runner: Runner,
        scheduler: Scheduler,
        cache: PrefixCache,
        version: int | str,
        tiers: Tiers,
        recorder: Recorder,
    ):
        super().__init__(config, runner, scheduler, cache, version)
        self._tiers, self._recorder, self._transfers = tiers, recorder, Transfers(runner)
        self._loads: dict[Sample, Load] = {}
        self._tried: set[Sample] = set()  # that wait, and for which was looked
        self._hanging: concurrent.futures.Future[Found | None] | None = None  # a read that took too long
        self._outgoing: list[Outgoing] = []
        self._keeps_new = True  # what is cached now is new to the store
        cache.tell(self)
        if tiers.host is not None:
            tiers.host.forget_expected()

    # ---- what the prefix cache tells -------------------------------------------------------------------------

    def cached(self, namespace: Namespace, node: Node, group: int) -> None:
        """A page is in the pool: no longer in host memory, and soon in the store."""
        key = PageKey(node.fingerprint, group)
        if self._tiers.host is not None:
            self._tiers.host.discard(key)
        if self._tiers.store is not None and self._keeps_new:
            assert node.parent is not None
            stored = self._tiers.stored(namespace, key, node.parent.fingerprint, node.tokens, node.depth)
            self._outgoing.append(Outgoing(key, node.pages[group], stored))

    def evicted(self, node: Node, group: int) -> None:
        """A page leaves the pool for host memory."""
        if self._tiers.host is not None:
            key, num_bytes = PageKey(node.fingerprint, group), self._tiers.formats[group].num_bytes
            assert node.parent is not None
            self._tiers.host.expect(key, node.parent.fingerprint, node.tokens, num_bytes)
            self._outgoing.append(Outgoing(key, node.pages[group], None))

    def _export(self) -> None:
        """Dispatch the copies of what leaves, before anything is written to its pages."""
        outgoing, self._outgoing = self._outgoing, []
        for group in range(len(self._config.groups)):
            for goes_to_host in (True, False):
                some = [one for one in outgoing if one.key.group == group and (one.stored is None) == goes_to_host]
                for part, contents in self._transfers.export(group, [one.page for one in some]):
                    self._runner.note(some[part], contents)

    def _arrived(self, some: list[Outgoing], contents: Any) -> None:
        """Copies of pages are on the host now; all go to the same tier."""
        form = self._tiers.formats[some[0].key.group]

        def payloads() -> list[bytes]:
            return [form.page(contents, index) for index in range(len(some))]

        stored = [one.stored for one in some if one.stored is not None]
        if stored:
            self._tiers.save(stored, payloads)
        elif self._tiers.host is not None:
            for one, page in zip(some, payloads(), strict=True):
                self._tiers.host.fill(one.key, page)
            self._recorder.moved("offloaded", HOST, len(some))

    # ---- what the scheduler asks -----------------------------------------------------------------------------

    def fetch(self, sample: Sample) -> bool:
        """Whether more of a sample's pages are being brought; the first asking begins that."""
        if sample in self._loads:
            return True
        if sample in self._tried or (self._hanging is not None and not self._hanging.done()):
            return False
        assert self._found is not None and self._found[0] is sample, "it was looked up just now"
        match, namespace = self._found[1], self.namespace(sample.request)
        if any(self._common(sample, load.sample) > match.num_tokens for load in self._loads.values()):
            return True
        in_pool = {node.fingerprint: tuple(page > 0 for page in node.pages) for node in match.path}
        wanted = Wanted(namespace, encode(sample.tokens[:-1]), match.num_tokens, in_pool)
        if self._tiers.is_expected(wanted):
            return True
        self._tried.add(sample)
        found = self._tiers.find(wanted)
        if found.done() and found.result() is None:
            return False
        pins = self.cache.take(match, counted=False)
        self._loads[sample] = Load(sample, sample.tokens, namespace, pins, found, time.monotonic())
        return True

    def arriving(self) -> Pages:
        """Pages that are needed for what comes next of what was read."""
        needed, at_once = self._nothing, self._at_once()
        for load in list(self._loads.values()):
            if load.brought is None and load.found.done():
                load.brought, load.num_filled = None, self._nothing
                if not load.found.cancelled():  # as all that waits is when the tiers are closed
                    load.brought = load.found.result()
                if load.brought is None:
                    self._give_up(load)
            load.due = self._nothing
            if load.brought is not None and not (self._running and any(needed)):
                left = map(operator.sub, load.brought.num_pages, load.num_filled)
                load.due = tuple(min(count, at_once) for count in left)
                needed = tuple(map(operator.add, needed, load.due))
        return needed

    def _at_once(self) -> int:
        """Pages of a group that come at once: all while nothing runs, else as many as delay a visit by little."""
        if not self._running:
            return self._config.max_pages_per_sequence
        few, many = WIDTHS
        num_bytes = many * sum(form.num_bytes for form in self._tiers.formats)
        seconds = self._tiers.rates[HOST].seconds(num_bytes, unknown=math.inf)
        return many if seconds < SHARE * self._tiers.visits.seconds(1, unknown=0.0) else few

    # ---- a step of the engine --------------------------------------------------------------------------------

    def attach(self, sample: Sample) -> int:
        """Let the row of an admitted sample share what it found; returns the number of tokens."""
        self._tried.discard(sample)
        return super().attach(sample)

    def evict(self, shortage: Pages) -> Pages:
        """Free pages that nobody uses, and copy them before anybody can write to them."""
        freed = super().evict(shortage)
        self._export()
        return freed

    def restore(self) -> Pages:
        """Fill free pages with what comes next; returns how many that takes."""
        taken = self._nothing
        for load in list(self._loads.values()):
            if load.brought is None and time.monotonic() - load.began > PATIENCE:
                self._hanging = load.found
                self._give_up(load)
            elif load.brought is not None and any(load.due):
                taken = tuple(map(operator.add, taken, load.due))
                self._fill(load, load.brought)
        return taken

    def _fill(self, load: Load, found: Found) -> None:
        start, num_bytes, is_warm = time.perf_counter(), 0, True
        claimed = self._transfers.claim(load.due)
        for group, (pages, first, count) in enumerate(zip(found.pages, load.num_filled, load.due, strict=True)):
            some = pages[first : first + count]
            is_warm &= self._transfers.fill(group, claimed, some)
            num_bytes += sum(map(len, some))
        if is_warm:
            self._tiers.rates[HOST].measured(num_bytes, time.perf_counter() - start)
        load.claimed.append(claimed)
        load.num_filled, load.due = tuple(map(operator.add, load.num_filled, load.due)), self._nothing
        if load.num_filled == found.num_pages:
            self._runner.note(load, load.claimed)

    def insert(self, published: Sequence[tuple[Any, Any]]) -> None:
        """What was published or brought can be found from now on; what was copied goes where it belongs."""
        super().insert([pair for pair in published if isinstance(pair[0], Publication)])
        for key, arrays in published:
            if isinstance(key, Load):
                self._restored(key, arrays)
            elif not isinstance(key, Publication):
                self._arrived(key, arrays)
        self._export()

    def _restored(self, load: Load, claimed: list[np.ndarray]) -> None:
        """All pages of a load are filled, or there were not enough to claim."""
        found = load.brought
        assert found is not None
        ids = [[page for some in claimed for page in some[group].tolist() if page] for group in range(len(found.pages))]
        if found.num_pages == tuple(map(len, ids)):
            handles = []
            for columns, pages in zip(found.columns, ids, strict=True):
                row = np.zeros(self._config.max_pages_per_sequence, np.int32)
                row[list(columns)] = pages
                handles.append(Restored(row, found.num_tokens, first_column=0))
            self._keeps_new = False
            ids = self.cache.insert(load.tokens, load.namespace, handles)
            self._keeps_new = True
            for tier, count in found.tokens.items():
                self._tiers.counts["loaded"][tier] += count
                self._recorder.moved("loaded", tier, count, load.sample)
        self._runner.drop(ids)
        self._give_up(load)

    def _give_up(self, load: Load) -> None:
        del self._loads[load.sample]
        self._runner.drop(self.cache.give_back(load.pins))

    def wait(self) -> None:
        """Nothing runs: wait a little for what is being read."""
        reads = [load.found for load in self._loads.values() if load.brought is None]
        if reads:
            concurrent.futures.wait(reads, PAUSE, concurrent.futures.FIRST_COMPLETED)
