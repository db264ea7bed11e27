"""The page tables of all layers: one for each group of layers with the same window.

A layer with a sliding window never reads tokens before its window, so it can give up the pages before it, while layers
without a window keep theirs. Therefore all layers with the same window share a page table and have pages of their own.
A model without windows has one group, and then everything here does what its one `PageTable` does.

    tables = PageTables.create(config)
    tables = tables.slide()                             # pages before the windows are free
    tables, reservations = tables.reserve(new_tokens)   # all groups, or none
    pool = pool.copy(reservations)

All tables have the same rows and lengths: a transition that one of them must refuse changes none of them.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.config import CacheConfig, LayerGroup
from paged_jax.cache.handles import PageHandle
from paged_jax.cache.page_table import PageTable, Reservation

Handles = tuple[PageHandle, ...]
"""One handle for each group, to the same tokens."""


class Reservations(NamedTuple):
    """What `PageTables.reserve` granted, and the copies that each group's layers must make."""

    granted: Bool[Array, " B"]
    groups: tuple[Reservation, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class PageTables:
    """One page table for each group of layers with the same window. All of them have the same rows and lengths.

    Args:
        groups: the tables.
        layout: for each table its layers, and the window before which their pages are given up.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([20, 0]))
        >>> tables, made = tables.fork(parents=jnp.array([0]), children=jnp.array([1]))
        >>> tables.groups[0].pages.tolist()
        [[1, 2, 0, 0], [1, 2, 0, 0]]
        >>> tables, reservation = tables.reserve(jnp.array([1, 1]))  # row 0 writes to a copy, row 1 keeps the page
        >>> tables.groups[0].pages.tolist()
        [[1, 3, 0, 0], [1, 2, 0, 0]]
    """

    groups: tuple[PageTable, ...]
    layout: tuple[LayerGroup, ...]

    @classmethod
    def create(cls, config: CacheConfig) -> "PageTables":
        """Empty tables for `config.groups`."""
        layout, config = config.groups, dataclasses.replace(config, windows=(), window_pages=None)
        groups = (PageTable.create(dataclasses.replace(config, num_pages=group.num_pages)) for group in layout)
        return cls(tuple(groups), layout)

    def __repr__(self) -> str:
        from paged_jax.cache import show  # which counts tables

        return show.tables_text(self)

    def _repr_html_(self) -> str:
        from paged_jax.cache import show

        return show.tables_html(self)

    @property
    def lengths(self) -> Int32[Array, " B"]:
        """Tokens of each row."""
        return self.groups[0].lengths

    @property
    def num_rows(self) -> int:
        """B."""
        return self.groups[0].num_rows

    @property
    def max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.groups[0].max_length

    @property
    def num_free(self) -> Int32[Array, " G"]:
        """Free pages of each group."""
        return jnp.stack([table.num_free for table in self.groups])

    @property
    def fault(self) -> Int32[Array, ""]:
        """The bits of `Fault` that are set in any table."""
        return functools.reduce(operator.or_, (table.fault for table in self.groups))

    def reserve(
        self, new_tokens: Int32[Array, " B"], priority: Int32[Array, " B"] | None = None
    ) -> tuple["PageTables", Reservations]:
        """Make room for the next tokens of every row, in all groups or in none; see `PageTable.reserve`.

        Returns:
            The tables, and the reservations. Make their copies (`PagePool.copy`) before anything is written.
        """
        asked, faults = new_tokens, [table.fault for table in self.groups]
        granted: Array = jnp.ones(self.num_rows, bool)
        if len(self.groups) > 1:
            # First ask each table what it would grant; XLA drops the rest of that work. Then ask again for the rows
            # that all tables granted: they need no more pages than before, so none of them is refused now.
            tried = [table.reserve(new_tokens, priority) for table in self.groups]
            granted = functools.reduce(operator.and_, (reservation.granted for _, reservation in tried))
            asked, faults = jnp.where(granted, new_tokens, 0), [table.fault for table, _ in tried]
        made = [table.reserve(asked, priority) for table in self.groups]
        groups = (dataclasses.replace(t, fault=t.fault | fault) for (t, _), fault in zip(made, faults, strict=True))
        reservations = tuple(reservation for _, reservation in made)
        return self._with(groups), Reservations(granted & reservations[0].granted, reservations)

    def slide(self) -> "PageTables":
        """Give up the pages that no later token sees through its group's window; see `PageTable.slide`.

        Do it before `reserve`: until then the tokens of the last step can be taken back by `truncate`, and published.
        """
        pairs = zip(self.groups, self.layout, strict=True)
        return self._with(table if group.window is None else table.slide(group.window) for table, group in pairs)

    def release(self, mask: Bool[Array, " B"]) -> "PageTables":
        """Empty some rows; pages that nobody else owns are free."""
        return self._with(table.release(mask) for table in self.groups)

    def truncate(self, lengths: Int32[Array, " B"]) -> "PageTables":
        """Shorten rows to `lengths`; see `PageTable.truncate`.

        A row stays as it is if a window has passed pages that the token at its new end would see.
        """
        gone = (lengths > 0) & (lengths < self.lengths) & ~self.can_cut(lengths)
        asked = jnp.where(gone, -1, lengths)  # which every table refuses
        return self._with(table.truncate(asked) for table in self.groups)

    def can_cut(self, lengths: Int32[Array, " B"]) -> Bool[Array, " B"]:
        """Whether rows, cut to these lengths, would still map all that their next token sees."""
        return functools.reduce(operator.and_, self._whole(slice(None), lengths))

    def fork(self, parents: Int32[Array, " C"], children: Int32[Array, " C"]) -> tuple["PageTables", Bool[Array, " C"]]:
        """Make empty rows share all pages of other rows; see `PageTable.fork`."""
        made = [table.fork(parents, children) for table in self.groups]
        return self._with(table for table, _ in made), made[0][1]

    def permute(self, parents: Int32[Array, " B"]) -> "PageTables":
        """Make each row b share all pages that row `parents[b]` had; see `PageTable.permute`."""
        return self._with(table.permute(parents) for table in self.groups)

    def publish(self, row: Int32[Array, ""] | int, num_tokens: Int32[Array, ""] | int) -> tuple["PageTables", Handles]:
        """Make handles to the first tokens of a row: in each group, to the pages that the next token sees.

        Returns:
            The tables, and a tuple of handles, one for each group. They hold 0 tokens if the row has fewer tokens than
            that, or has given up pages that the next token sees.
        """
        row, num_tokens = jnp.asarray(row, jnp.int32), jnp.asarray(num_tokens, jnp.int32)
        is_whole = functools.reduce(operator.and_, self._whole(row, num_tokens))
        row = jnp.where(is_whole, row, -1)
        made = []
        for table, group in zip(self.groups, self.layout, strict=True):
            made.append(table.publish(row, num_tokens, _first_seen(table, group, num_tokens)))
        return self._with(table for table, _ in made), tuple(handle for _, handle in made)

    def attach(self, row: Int32[Array, ""] | int, handles: Handles | Any) -> tuple["PageTables", Bool[Array, ""]]:
        """Make an empty row share the tokens of the handles of one `publish`; see `PageTable.attach`."""
        self._check_handles(handles)
        made = [table.attach(row, handle) for table, handle in zip(self.groups, handles, strict=True)]
        return self._with(table for table, _ in made), made[0][1]

    def attach_each(self, rows: Bool[Array, " B"], handles: Handles) -> "PageTables":
        """Make several empty rows share the tokens of the handles of one `publish`."""

        def attach(carry: tuple[Array, PageTables]) -> tuple[Array, PageTables]:
            rows, tables = carry
            row = jnp.argmax(rows).astype(jnp.int32)
            return rows.at[row].set(False), tables.attach(row, handles)[0]

        return lax.while_loop(lambda carry: jnp.any(carry[0]), attach, (rows, self))[1]

    def drop(self, handles: Handles | Any) -> "PageTables":
        """Give up the handles of one `publish`; do this exactly once."""
        self._check_handles(handles)
        return self._with(table.drop(handle) for table, handle in zip(self.groups, handles, strict=True))

    def handles_to(
        self, pages: Int32[Array, "G M"], first_columns: Int32[Array, " G"], num_tokens: Int32[Array, ""] | int
    ) -> Handles:
        """Handles to pages whose references somebody else owns, such as a prefix cache, in order to attach them.

        Args:
            pages: a table row of each group; null outside the columns from the first to that of the last token.
            first_columns: of each group.
            num_tokens: that the pages hold.
        """
        num_tokens, serial = jnp.asarray(num_tokens, jnp.int32), jnp.array(-1, jnp.int32)
        return tuple(
            PageHandle(pages[group], num_tokens, first_columns[group], table.epoch, serial)
            for group, table in enumerate(self.groups)
        )

    def drop_pages(self, pages: Int32[Array, "G n"]) -> "PageTables":
        """Give up one reference to each of some pages of each group; see `PageTable.drop_pages`."""
        return self._with(table.drop_pages(ids) for table, ids in zip(self.groups, pages, strict=True))

    def claim(self, num_pages: Int32[Array, " G"]) -> tuple["PageTables", Int32[Array, "G M"]]:
        """Take free pages of each group, all or none; see `PageTable.claim`.

        Args:
            num_pages: of each group, at most M.

        Returns:
            The tables, and the ids of the pages, null past the last of each group.
        """
        num_pages = jnp.asarray(num_pages, jnp.int32)
        most = jnp.minimum(self.num_free, self.groups[0].pages.shape[1])
        num_pages = jnp.where(jnp.all(num_pages <= most), num_pages, jnp.zeros_like(num_pages))
        made = [table.claim(count) for table, count in zip(self.groups, num_pages, strict=True)]
        return self._with(table for table, _ in made), jnp.stack([pages for _, pages in made])

    def clear_fault(self) -> "PageTables":
        """Forget what was refused so far."""
        return self._with(table.clear_fault() for table in self.groups)

    def reset(self) -> "PageTables":
        """Empty everything; handles from before are stale."""
        return self._with(table.reset() for table in self.groups)

    def _check_handles(self, handles: Any) -> None:
        if not isinstance(handles, tuple | list) or len(handles) != len(self.groups):
            given = f"{len(handles)} handles" if isinstance(handles, tuple | list) else f"a {type(handles).__name__}"
            raise ValueError(
                f"publish gives a tuple of {len(self.groups)}, one handle for each group of layers, got {given}: pass "
                "what publish returned, as it is"
            )

    def _with(self, groups: Iterable[PageTable]) -> "PageTables":
        return PageTables(tuple(groups), self.layout)

    def _whole(self, rows, lengths: Array) -> list[Array]:
        """For each group whether rows, cut to these lengths, hold all that their next token sees."""
        pairs = zip(self.groups, self.layout, strict=True)
        return [table.first_column[rows] <= _first_seen(table, group, lengths) for table, group in pairs]


def _first_seen(table: PageTable, group: LayerGroup, lengths: Array) -> Array:
    """The first column that the next token of rows of these lengths sees."""
    if group.window is None:
        return jnp.zeros_like(lengths)
    return table.first_seen(lengths, group.window)
