"""What a layer needs to know of a step."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.page_table import NULL_PAGE
from paged_jax.cache.page_tables import PageTables


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["page_tables", "lengths", "query_starts", "positions", "logits_at", "sharing"],
    meta_fields=["max_query_len"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of which sequences a step computes, and where their keys and values lie.

    Build it with `decode` or `ragged`, after `PageTables.reserve`: the lengths then count the new tokens already. The
    new tokens of R sequences lie one after the other in one axis T.

    Args:
        page_tables: the pages of each sequence, for each group of layers.
        lengths: tokens in each sequence, the new ones included; 0 for a sequence that takes no part in the step.
        query_starts: where each sequence's new tokens start in T, and where the last ones end.
        positions: of each token in its sequence (for RoPE); 0 for padding and for sequences that take no part.
        logits_at: the places in T at which the decoder returns logits: the last new token of each sequence, unless you
            replace it, for instance by `jnp.arange(T)` for all.
        max_query_len: static bound on the new tokens of a sequence; 1 means decode.
        sharing: for each group of layers which sequences begin with the same pages, so that attention reads those once
            for all of them (`paged_jax.attention.find_sharing`); it changes the speed only. None: each reads its own.

    Examples:
        Row 0 has 20 tokens and gets one more; row 1 begins with 3.

        >>> cache, _ = KVCache.create(config).reserve(jnp.array([20, 0]))
        >>> cache, granted = cache.reserve(jnp.array([1, 3]))
        >>> metadata = AttentionMetadata.ragged(cache.tables, jnp.array([1, 3]), num_tokens=4, active=granted)
        >>> metadata.positions.tolist(), metadata.query_starts.tolist(), metadata.logits_at.tolist()
        ([20, 0, 1, 2], [0, 1, 4], [0, 3])
    """

    page_tables: tuple[Int32[Array, "R M"], ...]
    lengths: Int32[Array, " R"]
    query_starts: Int32[Array, " R+1"]
    positions: Int32[Array, " T"]
    logits_at: Int32[Array, " Z"]
    max_query_len: int
    sharing: Any = None

    @property
    def sequences(self) -> Int32[Array, " T"]:
        """The sequence of each token; R for padding."""
        token = jnp.arange(len(self.positions), dtype=jnp.int32)
        return jnp.searchsorted(self.query_starts[1:], token, side="right").astype(jnp.int32)

    @classmethod
    def decode(cls, tables: PageTables, active: Bool[Array, " B"]) -> "AttentionMetadata":
        """One new token for each row: T = B, token b is that of row b. Rows that are not `active` compute nothing."""
        lengths = jnp.where(active, tables.lengths, 0)
        row = jnp.arange(len(lengths) + 1, dtype=jnp.int32)
        return cls(
            page_tables=tuple(table.pages for table in tables.groups),
            lengths=lengths,
            query_starts=row,
            positions=jnp.maximum(lengths - 1, 0),
            logits_at=row[:-1],
            max_query_len=1,
        )

    @classmethod
    def ragged(
        cls,
        tables: PageTables,
        query_lens: Int32[Array, " R"],
        num_tokens: int,
        *,
        rows: Int32[Array, " R"] | None = None,
        active: Bool[Array, " R"] | None = None,
        max_query_len: int | None = None,
    ) -> "AttentionMetadata":
        """Any number of new tokens for each row, packed in T, with padding after them.

        Args:
            tables: after `reserve`.
            query_lens: new tokens of each row; their sum must not exceed `num_tokens`.
            num_tokens: T.
            rows: which rows these are; a number out of range takes no part. None: all rows, in their order.
            active: rows that were granted their tokens; the others keep their place in T, but compute nothing;
                None: all.
            max_query_len: static bound on `query_lens`; None: T.
        """
        page_tables, lengths = tuple(table.pages for table in tables.groups), tables.lengths
        if rows is not None:
            page_tables = tuple(pages.at[rows].get(mode="fill", fill_value=NULL_PAGE) for pages in page_tables)
            lengths = lengths.at[rows].get(mode="fill", fill_value=0)
        takes_part = query_lens > 0 if active is None else active & (query_lens > 0)
        lengths = jnp.where(takes_part, lengths, 0)
        ends = jnp.cumsum(query_lens, dtype=jnp.int32)
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        sequence = jnp.searchsorted(ends, token, side="right").astype(jnp.int32)  # R for padding
        offset = (lengths - ends).at[sequence].get(mode="fill", fill_value=-num_tokens)
        return cls(
            page_tables=page_tables,
            lengths=lengths,
            query_starts=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
            positions=jnp.maximum(offset + token, 0),
            logits_at=jnp.maximum(ends - 1, 0),
            max_query_len=num_tokens if max_query_len is None else min(max_query_len, num_tokens),
        )
