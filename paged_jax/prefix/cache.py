"""The prefix cache: sequences that begin alike share the pages of their common beginning.

    table, num_cached = cache.match(table, row, prompt)     # the row now holds the cached pages
    ...                                                     # compute prompt[num_cached:], which writes the others
    table = cache.insert(table, row, prompt)                # only now may others find them
    table = cache.evict(table, num_pages)                   # when pages run short

The index lives on the host, the references in the table: the cache owns one reference to each page that it knows, so a
page stays while it is cached, and is never handed out while a row or a handle uses it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.cache.handles import PageHandle
from paged_jax.cache.page_table import NULL_PAGE, PageTable
from paged_jax.prefix.index import Digest, Namespace, Policy, PrefixIndex, blake2b, least_recently_used

_publish = jax.jit(PageTable.publish)
_attach = jax.jit(PageTable.attach)
_drop = jax.jit(PageTable.drop)


class PrefixCache:
    """Which pages of a table hold which tokens. It lives on the host and changes in place; tables do not.

    Full pages only, and never a whole prompt: at least one token is left to compute. Every method that takes a table
    waits for the device.

    Args:
        page_size: S, tokens in a page.
        weights: names the weights that compute the pages; see `renew`.
        policy: which unused page without cached continuation is evicted first: that with the lowest value.
        digest: of bytes; replaceable for tests.
    """

    def __init__(
        self,
        page_size: int,
        weights: str = "",
        policy: Policy = least_recently_used,
        digest: Digest = blake2b,
    ):
        self._index = PrefixIndex(page_size, policy, digest)
        self._weights = weights
        self._epoch: int | None = None  # of the table that holds the pages
        self.num_asked_tokens = 0
        self.num_hit_tokens = 0

    @property
    def num_pages(self) -> int:
        """Cached pages."""
        return len(self._index)

    @property
    def pages(self) -> np.ndarray:
        """The ids of the cached pages; the cache owns one reference to each."""
        return np.array(self._index.pages, np.int32)

    def lookup(self, tokens: Sequence[int] | np.ndarray, *, salt: str = "", adapter: str = "") -> int:
        """How many tokens `match` would find; changes nothing."""
        namespace = Namespace(salt, adapter, self._weights)
        return len(self._index.match(tokens[: max(len(tokens) - 1, 0)], namespace, num_uses=0)) * self._index.page_size

    def num_unused(self, table: PageTable) -> int:
        """Cached pages that no row and no handle uses: so many can be evicted. Waits for the device."""
        return int(np.sum(np.asarray(table.refcounts)[self.pages] == 1)) if self._index else 0

    def match(
        self, table: PageTable, row: int, tokens: Sequence[int] | np.ndarray, *, salt: str = "", adapter: str = ""
    ) -> tuple[PageTable, int]:
        """Find the longest cached prefix of a prompt and attach it to an empty row, as one operation.

        Args:
            table: the table; it stays valid.
            row: where to attach it.
            tokens: the whole prompt.
            salt: pages match only under the salt they were cached with, so that tenants cannot probe each other.
            adapter: likewise, for adapters of the weights.

        Returns:
            The table, and how many tokens the row now holds: a multiple of S, fewer than the prompt has.

        Raises:
            ValueError: the row is not empty, or the table was reset since its pages were cached.
        """
        namespace = Namespace(salt, adapter, self._weights)
        path = self._index.match(tokens[: max(len(tokens) - 1, 0)], namespace)
        self.num_asked_tokens += len(tokens)
        if not path:
            return table, 0
        num_tokens = len(path) * self._index.page_size
        self._check_epoch(table)
        table, ok = _attach(table, np.int32(row), self._handle(table, [page.page for page in path], num_tokens))
        if not ok:
            raise ValueError(f"cannot attach a prefix to row {row}: there is no such row, or it is not empty")
        self.num_hit_tokens += num_tokens
        return table, num_tokens

    def insert(
        self, table: PageTable, row: int, tokens: Sequence[int] | np.ndarray, *, salt: str = "", adapter: str = ""
    ) -> PageTable:
        """Cache the full pages of a row, after the step that wrote them.

        Pages whose tokens are cached already stay the row's own. Nothing is cached of a row that lacks pages, because
        it gave them up behind its window, or whose pages are cached in another namespace.

        Args:
            table: the table; it stays valid.
            row: the row.
            tokens: what it holds, from its first token on; it may hold more.
            salt: only prompts with the same salt will find it.
            adapter: only prompts with the same adapter will find it.

        Raises:
            ValueError: the row holds fewer tokens, or the table was reset since its pages were cached.
        """
        namespace = Namespace(salt, adapter, self._weights)
        num_cached = len(self._index.match(tokens, namespace, num_uses=0))
        num_full = len(tokens) // self._index.page_size
        if num_cached == num_full:
            return table
        self._check_epoch(table)
        num_tokens = num_full * self._index.page_size
        published, handle = _publish(table, np.int32(row), np.int32(num_tokens), np.int32(num_cached))
        if int(handle.num_tokens) != num_tokens:
            held = int(table.lengths[row]) if 0 <= row < table.num_rows else 0
            raise ValueError(f"cannot cache {num_tokens} tokens of row {row}: it holds {held}")
        pages = np.asarray(handle.pages)[num_cached:num_full].tolist()
        if int(handle.first_column) != num_cached or any(page in self._index for page in pages):
            return table
        self._index.insert(tokens, namespace, pages)
        return published

    def evict(self, table: PageTable, num_pages: int) -> PageTable:
        """Forget up to `num_pages` pages and free them: none that a row or handle uses, continuations before what
        they continue."""
        if not self._index:
            return table
        self._check_epoch(table)
        refcounts = np.asarray(table.refcounts)
        return self._release(table, self._index.evict(num_pages, lambda page: bool(refcounts[page] > 1)))

    def reset(self, table: PageTable) -> PageTable:
        """Forget everything and free it.

        Raises:
            RuntimeError: rows or handles use some of the pages.
        """
        if not self._index:
            return table
        self._check_epoch(table)
        num_used = int(np.sum(np.asarray(table.refcounts)[self.pages] > 1))
        if num_used:
            raise RuntimeError(
                f"{num_used} of {self.num_pages} cached pages are in use: release their rows, drop their handles first"
            )
        table = self._release(table, self._index.pages)
        self._index.clear()
        self._epoch = None
        return table

    def renew(self, table: PageTable, weights: str) -> PageTable:
        """Forget everything because the weights changed.

        Raises:
            RuntimeError: a row holds tokens, which the old weights computed, or a handle uses some of the pages.
        """
        num_rows = int(np.sum(np.asarray(table.lengths) > 0))
        if num_rows:
            raise RuntimeError(f"{num_rows} rows hold tokens that the old weights computed: release them first")
        table = self.reset(table)
        self._weights = weights
        return table

    def _check_epoch(self, table: PageTable) -> None:
        epoch = int(table.epoch)
        if self._index and epoch != self._epoch:
            raise ValueError(
                f"this cache holds pages of epoch {self._epoch}, the table is of epoch {epoch}: it was reset; "
                "make a new PrefixCache for it"
            )
        self._epoch = epoch

    def _handle(self, table: PageTable, pages: list[int], num_tokens: int) -> PageHandle:
        row = np.full(table.pages.shape[1], NULL_PAGE, np.int32)
        row[: len(pages)] = pages
        scalars = [jnp.asarray(x, jnp.int32) for x in (num_tokens, 0, self._epoch, -1)]
        return PageHandle(jnp.asarray(row), *scalars)

    def _release(self, table: PageTable, pages: list[int]) -> PageTable:
        """Give up the cache's reference to some pages."""
        max_pages = table.pages.shape[1]
        for start in range(0, len(pages), max_pages):
            table = _drop(table, self._handle(table, pages[start : start + max_pages], 0))
        return table
