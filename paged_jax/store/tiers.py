"""Host memory and a store behind the pool: where the pages of a prompt are, and whether they are worth bringing.

It knows no device. The engine hands it the bytes of pages, and asks for those of a prompt; whatever touches a store
happens in threads of its own, one that reads and one that writes.
"""

import concurrent.futures
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.contents import PageFormat
from paged_jax.cache.sizes import read_bytes
from paged_jax.prefix.digests import Namespace, chain, page_digest
from paged_jax.prefix.reach import Reach
from paged_jax.prefix.tree import TOKEN_BYTES
from paged_jax.store import PageStore, open_store
from paged_jax.store.costs import Rate
from paged_jax.store.host import HostPages
from paged_jax.store.page_file import PageKey, StoredPage

POOL, HOST, STORE = "pool", "host", "store"
MOST_QUEUED = 256 << 20  # bytes that wait to be written; what comes then is not written
_log = logging.getLogger("paged_jax.store")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A prompt whose pages are looked for.

    Args:
        namespace: of the prompt.
        data: its tokens, encoded, but for the last.
        num_cached: tokens that can be continued from the pool as it is.
        in_pool: for each page of its tokens that the pool knows, by digest, whether each group's page is there.
    """

    namespace: Namespace
    data: bytes
    num_cached: int
    in_pool: dict[bytes, tuple[bool, ...]]


@dataclasses.dataclass(frozen=True)
class Found:
    """Pages of a prompt that were brought.

    Args:
        num_tokens: after which it can be continued with them.
        columns: [G], of the pages of each group, ascending.
        pages: [G], their bytes.
        tokens: that are brought from each tier.
    """

    num_tokens: int
    columns: tuple[tuple[int, ...], ...]
    pages: tuple[tuple[bytes | memoryview, ...], ...]
    tokens: dict[str, int]

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Of each group."""
        return tuple(map(len, self.columns))


@dataclasses.dataclass
class _Link:
    """A page of a prompt; its first tokens are those of the prompt."""

    column: int
    num_tokens: int  # of the prompt
    digest: bytes
    pages: list[StoredPage]  # [G], without payload; none where there is no store
    holders: list[set[str]]  # [G], the tiers that have it

    def holder(self, group: int, tiers: Sequence[str]) -> str | None:
        """From where a group's page would come; "pool" is where it stays."""
        for tier in (POOL, *tiers):
            if tier in self.holders[group]:
                return tier
        return None


@dataclasses.dataclass
class _Held:
    """A link as `Reach` sees it: the groups whose pages can be had."""

    pages: list[int]


class Tiers:
    """Where pages go that leave the pool, and from where they come back.

    Args:
        config: sizes of the cache.
        host_bytes: of the pages in host memory, or a size such as "4GiB"; 0: there are none.
        store: that outlives the process; None: there is none. The folder or the URL of one is opened, and closed in the
            end.

    Raises:
        ValueError: the size is none, or the store is of another type.
    """

    def __init__(
        self, config: CacheConfig, host_bytes: int | float | str = 0, store: PageStore | str | Path | None = None
    ):
        try:
            num_bytes = read_bytes(host_bytes)
        except ValueError as error:
            raise ValueError(f"host_cache_bytes={host_bytes!r}: {error}") from None
        if num_bytes < 0:
            raise ValueError(f"host_cache_bytes={host_bytes!r}: give a number of bytes, or 0 for none")
        self._owns_store = isinstance(store, str | Path)
        self.store: PageStore | None = open_store(store) if isinstance(store, str | Path) else store
        if self.store is not None and not isinstance(self.store, PageStore):
            raise ValueError(f"store={store!r}: give a folder, a URL, or a Store or ObjectStore of paged_jax.store")
        self.host = HostPages(num_bytes) if num_bytes else None
        self.formats = PageFormat.of(config)
        self.rates = {HOST: Rate(), STORE: Rate()}  # bytes
        self.prefill, self.visits = Rate(), Rate()  # tokens; visits of the engine
        self.counts: dict[str, Counter[str]] = {"loaded": Counter(), "declined": Counter(), "saved": Counter()}
        self._config, self._reach = config, Reach(config)
        self._num_queued, self._lock = 0, threading.Lock()  # bytes; two threads count them
        self._is_closed = False
        if self.store is not None:
            self._readers = concurrent.futures.ThreadPoolExecutor(1, "paged_jax_store_reads")
            self._writers = concurrent.futures.ThreadPoolExecutor(1, "paged_jax_store_writes")

    # ---- pages that go ---------------------------------------------------------------------------------------

    def save(self, pages: Sequence[StoredPage], payloads: Callable[[], Sequence[bytes]]) -> None:
        """Write pages to the store, some time; the call returns at once.

        Args:
            pages: without payload.
            payloads: their bytes, asked for in the thread that writes.
        """
        num_bytes = sum(self.formats[page.group].num_bytes for page in pages)
        if self._is_closed or self._num_queued + num_bytes > MOST_QUEUED:
            self.counts["saved"]["dropped"] += len(pages)
            return
        with self._lock:
            self._num_queued += num_bytes
        self._writers.submit(self._write, pages, payloads, num_bytes)

    def statistics(self) -> dict[str, dict[str, int]]:
        """What was done so far, and what is in host memory, by tier."""
        return {
            "loaded_tokens": dict(self.counts["loaded"]),
            "declined_tokens": dict(self.counts["declined"]),
            "saved_pages": dict(self.counts["saved"]),
            "tier_pages": {HOST: len(self.host)} if self.host is not None else {},
            "tier_bytes": {HOST: self.host.num_bytes} if self.host is not None else {},
        }

    def flush(self) -> None:
        """Wait until what was saved is in the store."""
        if self.store is not None and not self._is_closed:
            self._writers.submit(int).result()

    def close(self) -> None:
        """Wait until what was saved is in the store, and end the threads; from then on no page is found or saved."""
        if self.store is not None:
            self._is_closed = True
            self._readers.shutdown(cancel_futures=True)
            self._writers.shutdown()
            if self._owns_store:
                self.store.close()

    def _write(self, pages: Sequence[StoredPage], payloads: Callable[[], Sequence[bytes]], num_bytes: int) -> None:
        assert self.store is not None
        try:
            whole = [dataclasses.replace(page, payload=x) for page, x in zip(pages, payloads(), strict=True)]
            num_new = self.store.write(whole)
            self.counts["saved"][STORE] += num_new or 0
        except Exception:  # a bug, which must not end the thread: the pages are computed again
            _log.exception("pages could not be written")
        finally:
            with self._lock:
                self._num_queued -= num_bytes

    # ---- pages that come back --------------------------------------------------------------------------------

    def find(self, wanted: Wanted) -> "concurrent.futures.Future[Found | None]":
        """Bring the pages of a prompt, if that is cheaper than to compute them; None: it is not, or there are none."""
        if self.store is not None and not self._is_closed:
            return self._readers.submit(self._find, wanted)
        found: concurrent.futures.Future[Found | None] = concurrent.futures.Future()
        found.set_result(None if self._is_closed else self._find(wanted))
        return found

    def is_expected(self, wanted: Wanted) -> bool:
        """Whether some page of a prompt is on its way to host memory."""
        if self.host is None:
            return False
        links = chain(wanted.namespace, wanted.data, self._page_bytes)
        keys = [PageKey(digest, group) for _, digest, _ in links for group in self._reach.groups]
        return any(self.host.has(key) and self.host.get(key) is None for key in keys)

    def _find(self, wanted: Wanted) -> Found | None:
        try:
            links = self._links(wanted)
            while True:
                chosen = self._choose(wanted, links)
                if chosen is None:
                    return None
                found = self._bring(links, *chosen)
                if found is not None:
                    return found
        except Exception:  # a bug: the prompt is computed
            _log.exception("pages could not be read")
            return None

    @property
    def _page_bytes(self) -> int:
        return self._reach.page_size * TOKEN_BYTES

    def _links(self, wanted: Wanted) -> list[_Link]:
        """The pages of a prompt's tokens, up to the first that nobody has."""
        pages = list(chain(wanted.namespace, wanted.data, self._page_bytes))
        links = list(itertools.takewhile(self._is_somewhere, self._look(wanted, enumerate(pages))))
        if len(links) == len(pages):
            return links
        parent, _, tokens = pages[len(links)]  # there may be a page that begins with these tokens, or that ends before
        options = [tokens[:stop] for stop in range(len(tokens) - TOKEN_BYTES, 0, -TOKEN_BYTES)]
        longer = self._beginning(parent, tokens) if len(tokens) < self._page_bytes else None
        if longer is not None:
            options.insert(0, longer)
        looked = self._look(wanted, [(len(links), (parent, page_digest(parent, one), one)) for one in options])
        last = next(filter(self._is_somewhere, looked), None)
        if last is not None:
            last.num_tokens = min(last.num_tokens, len(tokens) // TOKEN_BYTES)
            links.append(last)
        return links

    def _is_somewhere(self, link: _Link) -> bool:
        return any(link.holders)

    def _beginning(self, parent: bytes, tokens: bytes) -> bytes | None:
        """The tokens of a page that begins with these."""
        found = self.host.beginning(parent, tokens) if self.host is not None else None
        return found if found is not None or self.store is None else self.store.beginning(parent, tokens)

    def _look(self, wanted: Wanted, pages: Iterable[tuple[int, tuple[bytes, bytes, bytes]]]) -> Iterator[_Link]:
        """Which tiers have some pages, given as column, and parent, digest and tokens; the store is asked once."""
        nowhere = (False,) * len(self.formats)
        stored, found = dict[bytes, list[StoredPage]](), set[PageKey]()
        if self.store is not None:
            pages = list(pages)
            for column, (parent, digest, tokens) in pages:
                keys = [PageKey(digest, group) for group in self._reach.groups]
                stored[digest] = [self.stored(wanted.namespace, key, parent, tokens, column + 1) for key in keys]
            not_in_pool = [x for x in stored if not all(wanted.in_pool.get(x, nowhere))]
            found = self.store.find([page for digest in not_in_pool for page in stored[digest]])
        for column, (_, digest, tokens) in pages:
            holders = []
            for group, is_in_pool in zip(self._reach.groups, wanted.in_pool.get(digest, nowhere), strict=True):
                key = PageKey(digest, group)
                is_on_host = self.host is not None and self.host.get(key) is not None
                where = (POOL, is_in_pool), (HOST, is_on_host), (STORE, key in found)
                holders.append({tier for tier, is_there in where if is_there})
            yield _Link(column, len(tokens) // TOKEN_BYTES, digest, stored.get(digest, []), holders)

    def _choose(self, wanted: Wanted, links: list[_Link]) -> tuple[int, Sequence[str]] | None:
        """After how many tokens to continue, with pages from which tiers; None: with what is in the pool."""
        best, least = None, math.inf
        options = {self._longest(links, tiers): tiers for tiers in ((), (HOST,), (HOST, STORE))}
        most = max(options)
        if most < wanted.num_cached + self._reach.page_size:
            return None
        for num_tokens, tiers in options.items():
            num_tokens = max(num_tokens, wanted.num_cached)
            needed = self._needed(links, num_tokens, tiers) if num_tokens > wanted.num_cached else []
            sizes = Counter[str]()
            for link, group in needed:
                sizes[link.holder(group, tiers) or ""] += self.formats[group].num_bytes
            total = self.rates[HOST].seconds(sizes.total(), unknown=0.0)  # all go through host memory
            total += self.rates[STORE].seconds(sizes[STORE], unknown=0.0)
            total += self.prefill.seconds(most - num_tokens, unknown=1e3 * (most - num_tokens))
            if total < least:
                best, least = (num_tokens, tiers), total
        assert best is not None
        if best[0] < most:
            tier = STORE if HOST in best[1] or self.host is None else HOST
            self.counts["declined"][tier] += most - best[0]
            self.rates[tier].hope()
        return best if best[0] > wanted.num_cached else None

    def _longest(self, links: list[_Link], tiers: Sequence[str]) -> int:
        held = [_Held([int(link.holder(group, tiers) is not None) for group in self._reach.groups]) for link in links]
        return self._reach.longest(held, sum(link.num_tokens for link in links))

    def _needed(self, links: list[_Link], num_tokens: int, tiers: Sequence[str]) -> list[tuple[_Link, int]]:
        """The pages that are to be brought, so that a prompt can be continued after this many tokens."""
        pairs = []
        for group, seen in enumerate(self._reach.seen(links, num_tokens)):
            pairs += [(link, group) for link in seen if link.holder(group, tiers) != POOL]
        return pairs

    def _bring(self, links: list[_Link], num_tokens: int, tiers: Sequence[str]) -> Found | None:
        """Read the pages; None where one turned out not to be there."""
        needed = [(link, group, link.holder(group, tiers)) for link, group in self._needed(links, num_tokens, tiers)]
        brought = self._read([link.pages[group] for link, group, tier in needed if tier == STORE])
        columns: list[list[int]] = [[] for _ in self._reach.groups]
        pages: list[list[bytes | memoryview]] = [[] for _ in self._reach.groups]
        tokens, is_whole = dict[int, tuple[str, int]](), True
        for link, group, tier in needed:
            key = PageKey(link.digest, group)
            page = self.host.get(key) if tier == HOST and self.host is not None else brought.get(key)
            if page is None:
                link.holders[group].discard(tier or "")
                is_whole = False
                continue
            columns[group].append(link.column)
            pages[group].append(page)
            tokens.setdefault(link.column, (tier or "", link.num_tokens))
        if not is_whole:
            return None
        counts = Counter[str]()
        for tier, count in tokens.values():
            counts[tier] += count
        return Found(num_tokens, tuple(map(tuple, columns)), tuple(map(tuple, pages)), dict(counts))

    def _read(self, expected: Sequence[StoredPage]) -> dict[PageKey, bytes | memoryview]:
        """The bytes of pages that are in the store."""
        if self.store is None or not expected:
            return {}
        start = time.perf_counter()
        read = [page for page in self.store.read(expected) if page is not None]
        seconds = time.perf_counter() - start
        payloads = {page.key: page.payload for page in read if len(page.payload) == self.formats[page.group].num_bytes}
        if payloads:
            self.rates[STORE].measured(sum(map(len, payloads.values())), seconds)
        used = [page for page in expected if page.key in payloads]
        self._writers.submit(self.store.touch, used)
        return payloads

    def stored(self, namespace: Namespace, key: PageKey, parent: bytes, tokens: bytes, depth: int) -> StoredPage:
        """A page as the store must have it, but for its payload."""
        form = self.formats[key.group]
        shape = form.num_layers, form.page_size, form.num_kv_heads, form.head_dim
        fingerprint = bytes.fromhex(str(namespace.weights))
        return StoredPage(key.digest, key.group, depth, parent, fingerprint, tokens, form.dtype, shape, b"")
