"""The page table: which sequence owns which pages, as a pytree of small arrays that lives inside jit.

    table = PageTable.create(config)
    table, reservation = table.reserve(new_tokens)      # pages for the next tokens of every row
    pool = pool.copy(reservation)                       # copy-on-write, before anything is written
    ...                                                 # attend: write the new tokens, read the old ones
    table = table.release(finished)

Every method that changes the table is a transition: pure, `(table, arguments) -> (table, result)`, jittable, vectorised
over the rows. Nothing raises under jit: a row whose request cannot be honoured is left exactly as it was, and a bit of
`fault` stays set until `clear_fault`. The cost of a transition grows with the pages that it touches, not with the pool.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.fault import Fault
from paged_jax.cache.handles import PageHandle

NULL_PAGE = 0  # stands in every unmapped entry; nobody owns it, and its refcount is pinned at 1


class Reservation(NamedTuple):
    """What `reserve` granted, and the copies that must be made before anything is written (null pages: none)."""

    granted: Bool[Array, " B"]
    copy_source: Int32[Array, " B"]
    copy_target: Int32[Array, " B"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields="refcounts free_stack num_free pages lengths first_column fault version epoch".split(),
    meta_fields=["page_size"],
)
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Who owns what. P pages of S = `page_size` tokens, B rows (one sequence each) of at most M pages.

    Row b maps the columns `first_column[b]` to `ceil(lengths[b] / S) - 1`: its token i lies in page `pages[b, i // S]`,
    slot `i % S`. An empty row has length 0. A page may stand in several rows and handles; `refcounts` says in how many.
    """

    refcounts: Int32[Array, " P"]  # the truth: 0 means free
    free_stack: Int32[Array, " P"]  # its first `num_free` entries are the free pages
    num_free: Int32[Array, ""]
    pages: Int32[Array, "B M"]  # null outside the mapped columns
    lengths: Int32[Array, " B"]  # tokens
    first_column: Int32[Array, " B"]  # above 0 once pages before a window were given up
    fault: Int32[Array, ""]  # bits of Fault
    version: Int32[Array, ""]  # transitions so far
    epoch: Int32[Array, ""]  # resets so far; handles of an earlier epoch are stale
    page_size: int

    @classmethod
    def create(cls, config: CacheConfig) -> "PageTable":
        """An empty table.

        Raises:
            ValueError: the config has layers with windows, whose pages are not those of the others.
        """
        if config.has_windows:
            raise ValueError(
                "some layers of the config have windows, and need tables of their own: use PageTables, or no windows"
            )
        return cls._empty(config.num_pages, config.max_sequences, config.max_pages_per_sequence, config.page_size)

    @classmethod
    def _empty(cls, num_pages: int, num_rows: int, max_pages: int, page_size: int) -> "PageTable":
        return cls(
            refcounts=jnp.zeros(num_pages, jnp.int32).at[NULL_PAGE].set(1),
            free_stack=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),  # the null page is out of reach
            num_free=jnp.array(num_pages - 1, jnp.int32),
            pages=jnp.full((num_rows, max_pages), NULL_PAGE, jnp.int32),
            lengths=jnp.zeros(num_rows, jnp.int32),
            first_column=jnp.zeros(num_rows, jnp.int32),
            fault=jnp.zeros((), jnp.int32),
            version=jnp.zeros((), jnp.int32),
            epoch=jnp.zeros((), jnp.int32),
            page_size=page_size,
        )

    @property
    def num_pages(self) -> int:
        """P, the null page included."""
        return self.refcounts.shape[0]

    @property
    def num_rows(self) -> int:
        """B."""
        return self.pages.shape[0]

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.pages.shape[1] * self.page_size

    def reserve(
        self, new_tokens: Int32[Array, " B"], priority: Int32[Array, " B"] | None = None
    ) -> tuple["PageTable", Reservation]:
        """Make room for the next tokens of every row, and count them in.

        A row gets all it asks for or is refused. Rows are served in order; once one that needs pages is refused for
        lack of them, so is every later one that needs any. A row that asks for more than M pages hold is refused alone.

        Copy-on-write is one rule: a row whose partly filled last page has other owners appends to a copy of it. Where
        all owners of a page append in one step, the last of them keeps it (and counts as one that needs pages).

        Args:
            new_tokens: tokens to append to each row; 0 asks for nothing and is granted.
            priority: the lowest is served first, equals in the order of the rows; None: in the order of the rows.

        Returns:
            The table and a Reservation. Make its copies (`PagePool.copy`) before anything is written.
        """
        is_bad = new_tokens < 0
        is_full = new_tokens > self.max_length - self.lengths
        appends = (new_tokens > 0) & ~is_full
        column, slot = jnp.divmod(self.lengths, self.page_size)  # where the next token goes
        row = jnp.arange(self.num_rows, dtype=jnp.int32)
        last_page = self.pages.at[row, column].get(mode="fill", fill_value=NULL_PAGE)
        is_shared = appends & (slot > 0) & (self.refcounts[last_page] > 1)
        new_lengths = self.lengths + jnp.where(appends, new_tokens, 0)
        num_fresh = self._columns(new_lengths) - self._columns(self.lengths)
        needs_pages = (num_fresh > 0) | is_shared

        def allocate(table: PageTable) -> tuple[PageTable, Reservation]:
            keeps = lax.cond(
                jnp.any(is_shared),
                lambda: _last_of_all_owners(last_page, is_shared, table.refcounts[last_page], priority),
                lambda: jnp.zeros_like(is_shared),
            )
            copies = is_shared & ~keeps
            num_needed = num_fresh + jnp.where(copies, 1, 0)
            total = _running_total(num_needed, priority)
            granted = ~needs_pages | (total <= table.num_free)
            copies &= granted
            num_new = jnp.where(granted, num_needed, 0)
            first_new = jnp.where((slot > 0) & ~copies, column + 1, column)
            table = table._leave(jnp.where(copies, last_page, NULL_PAGE))
            table, first_page = table._take(num_new, total - num_new, first_new)
            nulls = jnp.full_like(last_page, NULL_PAGE)
            pairs = jnp.where(copies, last_page, nulls), jnp.where(copies, first_page, nulls)
            return table, Reservation(granted, *pairs)

        def allocate_nothing(table: PageTable) -> tuple[PageTable, Reservation]:
            nulls = jnp.full_like(last_page, NULL_PAGE)
            return table, Reservation(~needs_pages, nulls, nulls)

        table, reservation = lax.cond(jnp.any(needs_pages), allocate, allocate_nothing, self)
        granted = reservation.granted & ~is_bad & ~is_full
        table = table._next(
            (Fault.OUT_OF_PAGES, jnp.any(appends & ~granted)),
            (Fault.ROW_FULL, jnp.any(is_full)),
            (Fault.BAD_ARGUMENT, jnp.any(is_bad)),
            lengths=jnp.where(granted, new_lengths, self.lengths),
        )
        return table, reservation._replace(granted=granted)

    def release(self, mask: Bool[Array, " B"]) -> "PageTable":
        """Empty some rows; pages that nobody else owns are free."""
        nothing = jnp.zeros_like(self.lengths)
        table = self._unmap(mask & (self.lengths > 0), nothing, nothing + self.pages.shape[1])
        return table._next(lengths=jnp.where(mask, 0, self.lengths), first_column=jnp.where(mask, 0, self.first_column))

    def truncate(self, lengths: Int32[Array, " B"]) -> "PageTable":
        """Shorten rows to `lengths`, for instance to forget rejected drafts; pages after the new end are given up.

        Pass a row's own length to leave it alone. A row cannot grow, nor end before the first page that it still maps
        (but it can end at 0, which empties it).
        """
        is_bad = (lengths < 0) | (lengths > self.lengths)
        is_bad |= (lengths > 0) & (lengths < self.first_column * self.page_size)
        lengths = jnp.where(is_bad, self.lengths, lengths)
        start, stop = self._columns(lengths), self._columns(self.lengths)
        table = self._unmap(start < stop, start, stop)
        return table._next(
            (Fault.BAD_ARGUMENT, jnp.any(is_bad)),
            lengths=lengths,
            first_column=jnp.where(lengths > 0, self.first_column, 0),
        )

    def slide(self, window: int) -> "PageTable":
        """Give up the pages that no later token sees through a window; call it before `reserve`.

        Args:
            window: positions that a token sees, its own included.

        Raises:
            ValueError: a window below 1.
        """
        if window < 1:
            raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
        first_column = jnp.maximum(self.first_column, self.first_seen(self.lengths, window))
        num_gone = first_column - self.first_column
        row = jnp.arange(self.num_rows, dtype=jnp.int32)
        page = self.pages.at[row, self.first_column].get(mode="clip")
        is_own = (num_gone == 1) & (self.refcounts[page] == 1)

        def give_up_own(table: PageTable) -> PageTable:
            column = jnp.where(is_own, self.first_column, self.pages.shape[1])
            table = table._drop_references(jnp.where(is_own, page, NULL_PAGE))
            pages = table.pages.at[row, column].set(NULL_PAGE, mode="drop", unique_indices=True)
            return dataclasses.replace(table, pages=pages)

        # nearly always a row gives up one page, which is its own: all of these rows at once
        table = lax.cond(jnp.any(is_own), give_up_own, lambda table: table, self)
        table = table._unmap((num_gone > 0) & ~is_own, self.first_column, first_column)
        return table._next(first_column=first_column)

    def first_seen(self, lengths: Array, window: int) -> Array:
        """The first column that the next token sees through a window, in rows of these lengths."""
        return jnp.maximum(lengths - window + 1, 0) // self.page_size

    def fork(self, parents: Int32[Array, " C"], children: Int32[Array, " C"]) -> tuple["PageTable", Bool[Array, " C"]]:
        """Make empty rows share all pages of other rows. Whoever appends to a shared last page gets a copy of it.

        Args:
            parents: rows to share.
            children: empty rows, each named once. A pair with -1 is skipped.

        Returns:
            The table, and which pairs were made.
        """
        asked = (parents != -1) & (children != -1)
        in_range = (parents >= 0) & (parents < self.num_rows) & (children >= 0) & (children < self.num_rows)
        same_child = (children[:, None] == children[None, :]) & asked[None, :]
        is_empty = self.lengths.at[children].get(mode="clip") == 0
        ok = asked & in_range & is_empty & (jnp.sum(same_child, axis=1, dtype=jnp.int32) == 1)

        def share(i, table: PageTable) -> PageTable:
            pages = table._row(parents[i])
            table = table._add_references(pages)
            return dataclasses.replace(table, pages=table.pages.at[children[i]].set(pages))

        # a child is empty, so no row with pages is both a parent and a child
        parent = jnp.where(ok, parents, 0)
        table = _for_each(ok & (self.lengths[parent] > 0), share, self)
        child = jnp.where(ok, children, self.num_rows)
        table = table._next(
            (Fault.BAD_ARGUMENT, jnp.any(asked & ~ok)),
            lengths=self.lengths.at[child].set(self.lengths[parent], mode="drop"),
            first_column=self.first_column.at[child].set(self.first_column[parent], mode="drop"),
        )
        return table, ok

    def permute(self, parents: Int32[Array, " B"]) -> "PageTable":
        """Make each row b share all pages that row `parents[b]` had, as beam search does.

        What a row held that is nobody's parent is given up. A row whose parent is out of range stays as it is.
        """
        row = jnp.arange(self.num_rows, dtype=jnp.int32)
        is_bad = (parents < 0) | (parents >= self.num_rows)
        parents = jnp.where(is_bad, row, parents)
        moves = parents != row
        old, new = self.pages, self.pages[parents]
        # references are added before any is dropped: a page that changes rows is never free in between
        table = _for_each(moves, lambda b, table: table._add_references(new[b]), self)
        table = _for_each(moves, lambda b, table: table._drop_references(old[b]), table)
        return table._next(
            (Fault.BAD_ARGUMENT, jnp.any(is_bad)),
            pages=new,
            lengths=self.lengths[parents],
            first_column=self.first_column[parents],
        )

    def publish(
        self, row: Int32[Array, ""] | int, num_tokens: Int32[Array, ""] | int, first_column: Int32[Array, ""] | int = 0
    ) -> tuple["PageTable", PageHandle]:
        """Make a handle to the first tokens of a row, which keeps their pages until it is dropped.

        Args:
            row: which row.
            num_tokens: how many of its tokens.
            first_column: leave out the pages before this column.

        Returns:
            The table, and the handle. It holds 0 tokens if the row has fewer tokens than that, or no longer maps them.
        """
        row, num_tokens, first_column = (jnp.asarray(x, jnp.int32) for x in (row, num_tokens, first_column))
        is_row = (row >= 0) & (row < self.num_rows)
        first_column = jnp.maximum(first_column, self.first_column.at[row].get(mode="clip"))
        ok = is_row & (num_tokens <= self.lengths.at[row].get(mode="clip"))
        ok &= num_tokens >= first_column * self.page_size
        num_tokens = jnp.where(ok, num_tokens, 0)
        column = jnp.arange(self.pages.shape[1], dtype=jnp.int32)
        is_mapped = ok & (column >= first_column) & (column < self._columns(num_tokens))
        pages = jnp.where(is_mapped, self.pages.at[row].get(mode="clip"), NULL_PAGE)
        table = self._add_references(pages)._next((Fault.BAD_ARGUMENT, ~ok))
        return table, PageHandle(
            pages=pages,
            num_tokens=num_tokens,
            first_column=jnp.where(ok, first_column, 0),
            epoch=jnp.copy(self.epoch),  # the handle outlives the table, whose arrays may be donated
            serial=jnp.copy(self.version),
        )

    def attach(self, row: Int32[Array, ""] | int, handle: PageHandle) -> tuple["PageTable", Bool[Array, ""]]:
        """Make an empty row share the tokens of a handle, which can be attached again.

        Returns:
            The table, and whether it was done: only if the row was empty and the handle had not been dropped.
        """
        row = jnp.asarray(row, jnp.int32)
        is_alive = self._is_alive(handle)
        is_free_row = (row >= 0) & (row < self.num_rows) & (self.lengths.at[row].get(mode="clip") == 0)
        ok = is_alive & is_free_row
        target = jnp.where(ok & (handle.num_tokens > 0), row, self.num_rows)
        table = self._add_references(jnp.where(ok, handle.pages, NULL_PAGE))
        table = table._next(
            (Fault.STALE_HANDLE, ~is_alive),
            (Fault.BAD_ARGUMENT, ~is_free_row),
            pages=table.pages.at[target].set(handle.pages, mode="drop"),
            lengths=self.lengths.at[target].set(handle.num_tokens, mode="drop"),
            first_column=self.first_column.at[target].set(handle.first_column, mode="drop"),
        )
        return table, ok

    def drop(self, handle: PageHandle) -> "PageTable":
        """Give up a handle, which must be done exactly once. Pages that nobody else owns are free then."""
        is_alive = self._is_alive(handle)
        table = self._drop_references(jnp.where(is_alive, handle.pages, NULL_PAGE))
        return table._next((Fault.STALE_HANDLE, ~is_alive))

    def drop_pages(self, pages: Int32[Array, " n"]) -> "PageTable":
        """Give up one reference to each of some pages, as whoever owns references without a handle does.

        Args:
            pages: their ids; null pages count for nothing, and a page may be named several times. A page that has fewer
                references than that keeps them.
        """
        same = pages[:, None] == pages[None, :]
        num_times = jnp.sum(same, axis=1, dtype=jnp.int32)
        is_named = pages != NULL_PAGE
        is_bad = is_named & ((pages < 0) | (pages >= self.num_pages) | (self.refcounts[pages] < num_times))
        is_first = jnp.argmax(same, axis=1).astype(jnp.int32) == jnp.arange(len(pages), dtype=jnp.int32)
        distinct = jnp.where(is_named & is_first & ~is_bad, pages, NULL_PAGE)
        return self._drop_references(distinct, num_times)._next((Fault.BAD_ARGUMENT, jnp.any(is_bad)))

    def claim(self, num_pages: Int32[Array, ""] | int) -> tuple["PageTable", Int32[Array, " M"]]:
        """Take free pages for whoever owns references without a handle; `drop_pages` gives them back.

        Args:
            num_pages: how many, at most M.

        Returns:
            The table, and the ids of the pages, null past the last; all are null where there are fewer free pages.
        """
        order = jnp.arange(self.pages.shape[1], dtype=jnp.int32)
        has_room = (num_pages <= self.num_free) & (num_pages <= len(order))
        num_pages = jnp.where(has_room, num_pages, 0)
        taken = self.free_stack.at[self.num_free - 1 - order].get(mode="clip")
        pages = jnp.where(order < num_pages, taken, NULL_PAGE)
        refcounts = self._set_refcounts(pages, jnp.ones_like(pages))
        return self._next(refcounts=refcounts, num_free=self.num_free - num_pages), pages

    def clear_fault(self) -> "PageTable":
        """Forget what was refused so far."""
        return dataclasses.replace(self, fault=jnp.zeros_like(self.fault), version=self.version + 1)

    def reset(self) -> "PageTable":
        """Empty all rows and free all pages. Handles from before are stale."""
        table = PageTable._empty(self.num_pages, self.num_rows, self.pages.shape[1], self.page_size)
        return dataclasses.replace(table, version=self.version + 1, epoch=self.epoch + 1)

    def _columns(self, lengths: Array) -> Array:
        """Columns that this many tokens reach."""
        return (lengths + self.page_size - 1) // self.page_size

    def _row(self, b: Array) -> Int32[Array, " M"]:
        """One row, read at once: otherwise XLA reads it again after a write, and copies all rows to do so."""
        return lax.optimization_barrier(self.pages[b])

    def _next(self, *faults: tuple[Fault, Array], **changes: Array) -> "PageTable":
        """The table after a transition: some fields changed, faults noted where their condition holds."""
        fault = self.fault
        for bit, condition in faults:
            fault |= jnp.where(condition, jnp.int32(bit), jnp.int32(0))
        return dataclasses.replace(self, fault=fault, version=self.version + 1, **changes)

    def _is_alive(self, handle: PageHandle) -> Array:
        held = handle.pages != NULL_PAGE
        return (handle.epoch == self.epoch) & jnp.all(~held | (self.refcounts[handle.pages] > 0))

    def _take(self, num_new: Array, start: Array, first_column: Array) -> tuple["PageTable", Int32[Array, " B"]]:
        """Rows take `num_new[b]` free pages, those from `start[b]` on, for their columns from `first_column[b]` on.

        Returns:
            The table, and the first page that each row took.
        """
        top = self.num_free - 1 - start  # where in the stack a row's first page lies
        page = self.free_stack.at[top].get(mode="clip")
        takes = num_new > 0
        row = jnp.arange(self.num_rows, dtype=jnp.int32)
        column = jnp.where(takes, first_column, self.pages.shape[1])
        table = dataclasses.replace(
            self,
            refcounts=self._set_refcounts(jnp.where(takes, page, NULL_PAGE), jnp.ones_like(page)),
            pages=self.pages.at[row, column].set(page, mode="drop", unique_indices=True),
            num_free=self.num_free - jnp.sum(num_new, dtype=jnp.int32),
        )

        def take_more(b, table: PageTable) -> PageTable:
            i = jnp.arange(table.pages.shape[1], dtype=jnp.int32) - first_column[b]
            takes = (i > 0) & (i < num_new[b])
            pages = jnp.where(takes, table.free_stack.at[top[b] - i].get(mode="clip"), NULL_PAGE)
            refcounts = table._set_refcounts(pages, jnp.ones_like(pages))
            pages = table.pages.at[b].set(jnp.where(takes, pages, table._row(b)))
            return dataclasses.replace(table, refcounts=refcounts, pages=pages)

        return _for_each(num_new > 1, take_more, table), page

    def _leave(self, pages: Int32[Array, " B"]) -> "PageTable":
        """Rows give up one page each (null: none), not its last owner, though several may leave the same page."""

        def leave(refcounts):
            return refcounts.at[jnp.where(pages != NULL_PAGE, pages, self.num_pages)].add(-1, mode="drop")

        refcounts = lax.cond(jnp.any(pages != NULL_PAGE), leave, lambda refcounts: refcounts, self.refcounts)
        return dataclasses.replace(self, refcounts=refcounts)

    def _unmap(self, rows: Bool[Array, " B"], start: Array, stop: Array) -> "PageTable":
        """Some rows give up the pages in their columns `start[b]` to `stop[b] - 1`."""
        column = jnp.arange(self.pages.shape[1], dtype=jnp.int32)

        def unmap_row(b, table: PageTable) -> PageTable:
            row = table._row(b)
            is_gone = (start[b] <= column) & (column < stop[b])
            table = table._drop_references(jnp.where(is_gone, row, NULL_PAGE))
            return dataclasses.replace(table, pages=table.pages.at[b].set(jnp.where(is_gone, NULL_PAGE, row)))

        return _for_each(rows, unmap_row, self)

    def _add_references(self, pages: Int32[Array, " M"]) -> "PageTable":
        """One more owner for each of some distinct pages (null pages aside)."""
        refcounts = self._set_refcounts(pages, self.refcounts[pages] + 1)
        return dataclasses.replace(self, refcounts=refcounts)

    def _drop_references(self, pages: Int32[Array, " M"], num_times: Array | int = 1) -> "PageTable":
        """`num_times` owners fewer for each of some distinct pages (null pages aside); without owners they are free."""
        counts = self.refcounts[pages] - num_times
        is_freed = (pages != NULL_PAGE) & (counts == 0)
        place = self.num_free + jnp.cumsum(is_freed, dtype=jnp.int32) - 1
        place = jnp.where(is_freed, place, self.num_pages + jnp.arange(len(pages), dtype=jnp.int32))
        return dataclasses.replace(
            self,
            refcounts=self._set_refcounts(pages, counts),
            free_stack=self.free_stack.at[place].set(pages, mode="drop", unique_indices=True),
            num_free=self.num_free + jnp.sum(is_freed, dtype=jnp.int32),
        )

    def _set_refcounts(self, pages: Int32[Array, " M"], counts: Int32[Array, " M"]) -> Array:
        # set, not add: XLA gives a scatter-add on TPU no bound on its cost, and distinct indices make a set cheap
        past_the_end = self.num_pages + jnp.arange(len(pages), dtype=jnp.int32)
        where = jnp.where(pages != NULL_PAGE, pages, past_the_end)
        return self.refcounts.at[where].set(counts, mode="drop", unique_indices=True)


def _for_each(mask: Bool[Array, " n"], body: Callable[[Array, PageTable], PageTable], table: PageTable) -> PageTable:
    """`table = body(i, table)` for every i in the mask: the cost follows how many there are."""

    def step(carry):
        mask, table = carry
        i = jnp.argmax(mask).astype(jnp.int32)
        return mask.at[i].set(False), body(i, table)

    return lax.while_loop(lambda carry: jnp.any(carry[0]), step, (mask, table))[1]


def _running_total(x: Int32[Array, " B"], priority: Int32[Array, " B"] | None) -> Int32[Array, " B"]:
    """For each row the sum of x over the rows served up to and including it."""
    if priority is None:
        return jnp.cumsum(x, dtype=jnp.int32)
    order = jnp.argsort(priority, stable=True).astype(jnp.int32)
    return jnp.zeros_like(x).at[order].set(jnp.cumsum(x[order], dtype=jnp.int32), unique_indices=True)


def _last_of_all_owners(
    page: Int32[Array, " B"], appends: Bool[Array, " B"], refcount: Array, priority: Int32[Array, " B"] | None
) -> Bool[Array, " B"]:
    """Whether a row is the last served of those that append to its page, and they are all its owners."""
    row = jnp.arange(len(page), dtype=jnp.int32)
    rank = row if priority is None else jnp.zeros_like(row).at[jnp.argsort(priority, stable=True)].set(row)
    same = (page[:, None] == page[None, :]) & appends[None, :]
    is_last = ~jnp.any(same & (rank[None, :] > rank[:, None]), axis=1)
    return appends & is_last & (jnp.sum(same, axis=1, dtype=jnp.int32) == refcount)
