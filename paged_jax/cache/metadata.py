"""All that a layer sees of a step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.config import LayerGroup
from paged_jax.cache.page_table import PageTable
from paged_jax.cache.page_tables import PageTables


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["page_table", "lengths", "query_starts", "positions"],
    meta_fields=["max_query_len", "groups"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of which sequences a step computes, and where their keys and values lie.

    Build it after `PageTable.reserve`, which has counted the new tokens in the lengths already. The new tokens of all
    sequences lie packed in one axis T, in the order of the rows.

    Args:
        page_table: the pages of each row; a tuple with one for each group of layers, where there are several.
        lengths: tokens in each row, the new ones included; 0 where a row takes no part.
        query_starts: where each row's new tokens start in T, and where the last ones end.
        positions: of each token in its sequence (for RoPE); 0 for padding and for rows that take no part.
        max_query_len: static bound on the new tokens of a row; 1 means decode.
        groups: the groups of layers; empty: one group of all layers, which keep everything.
    """

    page_table: Int32[Array, "B M"] | tuple[Int32[Array, "B M"], ...]
    lengths: Int32[Array, " B"]
    query_starts: Int32[Array, " B+1"]
    positions: Int32[Array, " T"]
    max_query_len: int
    groups: tuple[LayerGroup, ...] = ()

    @classmethod
    def decode(cls, table: PageTable | PageTables, active: Bool[Array, " B"]) -> "AttentionMetadata":
        """One new token a row: T = B, token b is row b's, and rows that are not `active` compute nothing."""
        lengths = jnp.where(active, table.lengths, 0)
        return cls(
            page_table=_pages(table),
            lengths=lengths,
            query_starts=jnp.arange(len(lengths) + 1, dtype=jnp.int32),
            positions=jnp.maximum(lengths - 1, 0),
            max_query_len=1,
            groups=_groups(table),
        )

    @classmethod
    def ragged(
        cls,
        table: PageTable | PageTables,
        query_lens: Int32[Array, " B"],
        num_tokens: int,
        max_query_len: int | None = None,
        active: Bool[Array, " B"] | None = None,
    ) -> "AttentionMetadata":
        """Any number of new tokens a row, packed in T; padding behind them.

        Args:
            table: after `reserve(query_lens)`.
            query_lens: new tokens of each row; their sum must not exceed `num_tokens`.
            num_tokens: T.
            max_query_len: static bound on `query_lens`; None: T.
            active: rows that were granted their tokens; the others keep their place in T, but compute nothing;
                None: all.
        """
        takes_part = query_lens > 0 if active is None else active & (query_lens > 0)
        lengths = jnp.where(takes_part, table.lengths, 0)
        ends = jnp.cumsum(query_lens, dtype=jnp.int32)
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        row = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)  # B for padding
        offset = (lengths - ends).at[row].get(mode="fill", fill_value=-num_tokens)
        return cls(
            page_table=_pages(table),
            lengths=lengths,
            query_starts=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
            positions=jnp.maximum(offset + token, 0),
            max_query_len=num_tokens if max_query_len is None else min(max_query_len, num_tokens),
            groups=_groups(table),
        )

    def layer(self, index: int) -> "AttentionMetadata":
        """What a layer sees, by its number: the page table of its group."""
        if not isinstance(self.page_table, tuple):
            return self
        found = [pair for pair in zip(self.page_table, self.groups, strict=True) if index in pair[1].layers]
        if not found:
            num_layers = sum(len(group.layers) for group in self.groups)
            raise ValueError(f"there is no layer {index} in this cache of {num_layers} layers")
        ((page_table, group),) = found
        return dataclasses.replace(self, page_table=page_table, groups=(group,))

    @property
    def last_tokens(self) -> Int32[Array, " B"]:
        """Where in T the last new token of each row lies; some token of another row where a row has none."""
        return jnp.maximum(self.query_starts[1:] - 1, 0)


def _pages(table: PageTable | PageTables) -> Array | tuple[Array, ...]:
    if isinstance(table, PageTable):
        return table.pages
    pages = tuple(group.pages for group in table.groups)
    return pages[0] if len(pages) == 1 else pages


def _groups(table: PageTable | PageTables) -> tuple[LayerGroup, ...]:
    return () if isinstance(table, PageTable) else table.layout
