"""Queries whose rows begin with the same pages: blocks of them meet the shared keys in one product."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, quotient, remainder
from pallas_kernels.sharing import RUN, Sharing, runs_of
from pallas_kernels.xla_tiles import Options, Softmax, attend, pages_per_block_tile, repeated, rows_at

LARGE_BLOCK = 64  # queries of a group that go together; at least half of them, or they go in blocks of RUN


class Blocks(NamedTuple):
    """Blocks of the queries of a step that read the same tokens.

    The queries of a group stand side by side, in whole chunks of `RUN` places; the groups of a level after those of
    the level before it. A large block takes up to 64 queries of a group, a small one those of a chunk.
    """

    query: Int32[Array, " P"]  # at each place; -1 where there is none
    begin: Int32[Array, " chunks"]  # the first token that a chunk's group reads
    end: Int32[Array, " chunks"]  # the end of these
    left: Int32[Array, " chunks"]  # queries of the group, from the chunk on
    large: Int32[Array, " chunks"]  # large blocks that begin up to this chunk
    small: Int32[Array, " chunks"]  # small blocks up to this chunk
    rest: Int32[Array, " T"]  # the first token that is left for each query
    exist: Bool[Array, ""]  # whether there is any block


def find_blocks(sharing: Sharing, places: TokenPlaces, page_size: int) -> Blocks:
    """The blocks of a step; where no rows are in a group, next to nothing is computed."""

    def find() -> Blocks:
        of_queries = Sharing(sharing.leader[:, places.sequence], sharing.tokens[:, places.sequence])
        runs = runs_of(of_queries, places.position + 1, places.position >= 0, page_size)
        first = runs.row[:, ::RUN]
        leads, size, begin, end = (
            jnp.take_along_axis(x, jnp.maximum(first, 0), axis=1).reshape(-1)
            for x in (runs.leads, runs.size, runs.begin, runs.end)
        )
        exists = first.reshape(-1) >= 0
        chunk = jnp.arange(exists.size, dtype=jnp.int32)
        before = chunk[None, :] <= chunk[:, None]
        rank = (chunk - jnp.max(jnp.where(before & (leads & exists)[None, :], chunk[None, :], 0), axis=1)) * RUN
        in_block = remainder(rank, LARGE_BLOCK)
        is_large = exists & (size - rank + in_block >= LARGE_BLOCK // 2)
        large, small = (
            jnp.sum(before & begins[None, :], axis=1, dtype=jnp.int32)
            for begins in (is_large & (in_block == 0), exists & ~is_large)
        )
        return Blocks(runs.row.reshape(-1), begin, end, size - rank, large, small, runs.rest, jnp.any(exists))

    def nothing() -> Blocks:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(find))

    return jax.lax.cond(jnp.any(sharing.leader >= 0), find, nothing)


def attend_blocks(
    state: Softmax,
    at: Int32[Array, " T"],
    q: Float[Array, "T K G H"],
    pages: Pages,
    table: Int32[Array, "B columns"],
    places: TokenPlaces,
    blocks: Blocks,
    options: Options,
) -> Softmax:
    """Attention of each query over what its groups share.

    Args:
        state: softmax states, `[n, K, G]` and `[n, K, G, H]`.
        at: which of them is that of each query.
        q: the queries.
        pages: one layer's pages, the tokens already in them.
        table: the pages of each sequence, with the null page for every unmapped entry, and in `pages_per_block_tile`
            more columns.
        places: the sequence and position of each query.
        blocks: which queries go together.
        options: the static options.

    Returns:
        The states after the shared keys.
    """
    for size, ends in ((LARGE_BLOCK, blocks.large), (RUN, blocks.small)):  # each at least half full
        if q.shape[0] >= size // 2:
            state = attend_sized(state, at, q, pages, table, places, blocks, size, ends, options)
    return state


def attend_sized(
    state: Softmax,
    at: Int32[Array, " T"],
    q: Float[Array, "T K G H"],
    pages: Pages,
    table: Int32[Array, "B columns"],
    places: TokenPlaces,
    blocks: Blocks,
    size: int,
    ends: Int32[Array, " chunks"],
    options: Options,
) -> Softmax:
    """The states after the blocks of one size."""
    _, num_kv_heads, group, _ = q.shape
    tile_pages = pages_per_block_tile(pages)
    tile_tokens = tile_pages * pages.page_size
    offset = jnp.arange(tile_tokens, dtype=jnp.int32)
    slot = jnp.arange(size, dtype=jnp.int32)
    queries_at = jnp.pad(blocks.query, (0, size), constant_values=-1)

    def heads_first(x):  # [size, K, G, ...] -> [1, K, size * G, ...]
        return x.swapaxes(0, 1).reshape(1, num_kv_heads, size * group, *x.shape[3:])

    def heads_last(x):
        return x.reshape(num_kv_heads, size, group, *x.shape[3:]).swapaxes(0, 1)

    def attend_block(i, state: Softmax) -> Softmax:
        chunk = jnp.sum(ends <= i, dtype=jnp.int32)
        begin, end, left = (rows_at(x, chunk) for x in (blocks.begin, blocks.end, blocks.left))
        query = jnp.maximum(jax.lax.dynamic_slice(queries_at, (chunk * RUN,), (size,)), 0)
        sequence, position = rows_at(places.sequence, query[0]), rows_at(places.position, query)
        queries = heads_first(rows_at(q, query))

        def attend_tile(j, block: Softmax) -> Softmax:
            page_ids = jax.lax.dynamic_slice(table, (sequence, j * tile_pages), (1, tile_pages))
            key_position = (j * tile_tokens + offset)[None, :]
            exists = (key_position >= begin) & (key_position < end) & repeated(page_ids > 0, pages.page_size, 1)
            visible = None
            if options.window is not None:
                seen = key_position > position[:, None] - options.window
                visible = exists[:, None] & repeated(seen, group, 0)[None]
            return attend(block, queries, pages, page_ids, exists, visible, options)

        place = rows_at(at, query)
        block = Softmax(*(heads_first(rows_at(x, place)) for x in state))
        block = jax.lax.fori_loop(
            quotient(begin, tile_tokens), quotient(end + tile_tokens - 1, tile_tokens), attend_tile, block
        )
        place = jnp.where(slot < left, place, state.top.shape[0])
        return Softmax(*(x.at[place].set(heads_last(y), mode="drop") for x, y in zip(state, block, strict=True)))

    return jax.lax.fori_loop(0, ends[-1], attend_block, state)
