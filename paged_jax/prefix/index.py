"""The index from tokens to pages: plain Python on the host, which knows nothing of page tables.

A page's key is its tokens and the chain of pages before it, back to a namespace (salt, adapter, weights). Each page has
a digest chained over its parent's, by which it is found; then its tokens, its parent and its namespace are compared, so
a digest that collides costs time, not correctness.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Digest = Callable[[bytes], bytes]


def blake2b(data: bytes) -> bytes:
    """256 bits of BLAKE2b."""
    return hashlib.blake2b(data, digest_size=32).digest()


class Namespace(NamedTuple):
    """Pages of different namespaces never match."""

    salt: str
    adapter: str
    weights: str


class CachedPage:
    """One page of cached tokens, and what an eviction policy may weigh."""

    __slots__ = (
        "page",
        "tokens",
        "parent",
        "namespace",
        "digest",
        "depth",
        "last_used",
        "num_uses",
        "num_children",
        "turn",
    )

    def __init__(self, page: int, tokens: bytes, parent: "CachedPage | None", namespace: Namespace, digest: bytes):
        self.page = page
        self.tokens = tokens  # S of them, 8 bytes each
        self.parent = parent
        self.namespace = namespace
        self.digest = digest
        self.depth = parent.depth + 1 if parent else 0  # pages before this one
        self.last_used = 0  # in matches and inserts
        self.num_uses = 0  # matches
        self.num_children = 0
        self.turn = -1  # of its entry in the heap of leaves


Policy = Callable[[CachedPage], Any]
"""Which leaf is evicted first: the one with the lowest value, taken when it was used last or became a leaf."""


def least_recently_used(page: CachedPage) -> int:
    """The default policy."""
    return page.last_used


class PrefixIndex:
    """Cached pages as a forest: a child continues the tokens of its parent.

    Args:
        page_size: S, tokens in a page.
        policy: which leaf goes first.
        digest: of bytes; replaceable for tests.
    """

    def __init__(self, page_size: int, policy: Policy = least_recently_used, digest: Digest = blake2b):
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self._policy = policy
        self._digest = digest
        self._buckets: dict[bytes, list[CachedPage]] = {}
        self._by_page: dict[int, CachedPage] = {}
        self._leaves: list[tuple[Any, int, CachedPage]] = []  # a heap; entries of an older turn are void
        self._clock = 0
        self._turn = 0

    def __len__(self) -> int:
        """Cached pages."""
        return len(self._by_page)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    @property
    def pages(self) -> list[int]:
        """The ids of all cached pages."""
        return list(self._by_page)

    def match(self, tokens: Sequence[int] | np.ndarray, namespace: Namespace, num_uses: int = 1) -> list[CachedPage]:
        """The longest chain of cached pages that `tokens` begin with; they count as used now."""
        path: list[CachedPage] = []
        self._clock += 1
        for chunk in self._chunks(tokens):
            parent = path[-1] if path else None
            page = self._find(chunk, parent, namespace, self._chain(chunk, parent, namespace))
            if page is None:
                break
            page.last_used = self._clock
            page.num_uses += num_uses
            path.append(page)
        if path and path[-1].num_children == 0:
            self._push(path[-1])
        return path

    def insert(self, tokens: Sequence[int] | np.ndarray, namespace: Namespace, pages: Sequence[int]) -> None:
        """Cache the full pages of `tokens` behind those that are cached already.

        Args:
            tokens: what the pages hold, from the first token of the sequence on.
            namespace: theirs.
            pages: ids of the pages that are not cached yet, in order.

        Raises:
            ValueError: another number of pages than is missing, or a page that is cached already.
        """
        path = self.match(tokens, namespace, num_uses=0)
        chunks = self._chunks(tokens)[len(path) :]
        if len(pages) != len(chunks):
            raise ValueError(f"{len(chunks)} pages of these tokens are not cached, but {len(pages)} were given")
        taken = [page for page in pages if page in self._by_page]
        if taken:
            raise ValueError(f"pages {taken} are cached already: a page stands once")
        parent = path[-1] if path else None
        for chunk, page_id in zip(chunks, pages, strict=True):
            page = CachedPage(page_id, chunk, parent, namespace, self._chain(chunk, parent, namespace))
            page.last_used = self._clock
            self._buckets.setdefault(page.digest, []).append(page)
            self._by_page[page_id] = page
            if parent:
                parent.num_children += 1
            parent = page
        if chunks and parent:
            self._push(parent)

    def evict(self, num_pages: int, in_use: Callable[[int], bool] = lambda page: False) -> list[int]:
        """Forget up to `num_pages` pages, leaves first, none that is in use; returns their ids."""
        evicted, kept = [], []
        while self._leaves and len(evicted) < num_pages:
            entry = heapq.heappop(self._leaves)
            page = entry[2]
            if page.turn != entry[1] or page.num_children:
                continue
            if in_use(page.page):
                kept.append(entry)
            else:
                self._remove(page)
                evicted.append(page.page)
        for entry in kept:
            heapq.heappush(self._leaves, entry)
        return evicted

    def clear(self) -> None:
        """Forget everything."""
        self._buckets.clear()
        self._by_page.clear()
        self._leaves.clear()

    def _chunks(self, tokens: Sequence[int] | np.ndarray) -> list[bytes]:
        """The full pages of the tokens, each as bytes: integers of full width, so that no two tokens look alike."""
        array = np.asarray(tokens)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"tokens must be a list of whole numbers, got shape {array.shape} of {array.dtype}")
        data, width = array.astype("<i8").tobytes(), 8 * self.page_size
        return [data[i : i + width] for i in range(0, len(data) - width + 1, width)]

    def _chain(self, chunk: bytes, parent: CachedPage | None, namespace: Namespace) -> bytes:
        if parent:
            return self._digest(b"paged_jax page\0" + parent.digest + chunk)
        parts = [text.encode() for text in namespace]
        root = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return self._digest(b"paged_jax first page\0" + root + chunk)

    def _find(self, chunk: bytes, parent: CachedPage | None, namespace: Namespace, digest: bytes) -> CachedPage | None:
        for page in self._buckets.get(digest, ()):
            if page.tokens == chunk and page.parent is parent and page.namespace == namespace:
                return page
        return None

    def _push(self, page: CachedPage) -> None:
        self._turn += 1
        page.turn = self._turn
        heapq.heappush(self._leaves, (self._policy(page), page.turn, page))
        if len(self._leaves) > 2 * len(self._by_page) + 64:
            self._leaves = [entry for entry in self._leaves if entry[1] == entry[2].turn and not entry[2].num_children]
            heapq.heapify(self._leaves)

    def _remove(self, page: CachedPage) -> None:
        bucket = self._buckets[page.digest]
        bucket.remove(page)
        if not bucket:
            del self._buckets[page.digest]
        del self._by_page[page.page]
        page.turn = -1
        if page.parent:
            page.parent.num_children -= 1
            if page.parent.num_children == 0:
                self._push(page.parent)
