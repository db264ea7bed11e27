"""Many queries a sequence: for each block of queries, a loop over the KV tiles that it can see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, quotient
from pallas_kernels.xla_tiles import (
    Options,
    Softmax,
    attend,
    empty_state,
    finish,
    pages_per_block_tile,
    repeated,
    rows_at,
)

SCORE_BYTES = 1 << 20  # of a block of queries over a tile: the loop holds a few arrays of this size
MOST_QUERIES = 128  # of a block


def prefill_attention(
    out: Float[Array, "T N H"],
    lse: Float[Array, "T N"],
    pages: Pages,
    table: Int32[Array, "B columns"],
    num_columns: int,
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    sinks: Float[Array, " N"] | None,
    options: Options,
    *,
    fewest_queries: int,
    most_queries: int,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of the sequences with at least `fewest_queries` new tokens, block by block.

    The online softmax of FlashAttention (Dao et al. 2022, arXiv 2205.14135) over gathered tiles: nothing
    ever holds a whole context, and tiles outside every query's causal range or window are not read.

    Args:
        out: the queries of these sequences' tokens, to be replaced by their outputs; whatever of the others'.
        lse: the log-sum-exp of the others.
        pages: one layer's pages, the tokens already in them.
        table: the pages of each sequence, with the null page for every unmapped entry, and in `pages_per_block_tile`
            more columns.
        num_columns: M, without those.
        lengths: tokens in each sequence, the new ones included.
        query_starts: where each sequence's tokens start in T.
        sinks: one logit a query head.
        options: the static options.
        fewest_queries: sequences with fewer new tokens are left alone.
        most_queries: no sequence has more new tokens, so a block needs no more rows.

    Returns:
        `out` and `lse` with the results of these sequences in them.
    """
    num_tokens, num_heads, head_dim = out.shape
    num_kv_heads, page_size = pages.num_kv_heads, pages.page_size
    group = num_heads // num_kv_heads
    tile_pages = pages_per_block_tile(pages)
    tile_tokens = tile_pages * page_size
    block = min(max(SCORE_BYTES // (4 * num_heads * tile_tokens), 1), MOST_QUERIES, most_queries, num_tokens)

    starts, ends = query_starts[:-1], query_starts[1:]
    num_queries = ends - starts
    num_blocks = jnp.where(num_queries >= fewest_queries, quotient(num_queries + block - 1, block), 0)
    block_ends = jnp.cumsum(num_blocks, dtype=jnp.int32)
    row = jnp.arange(block, dtype=jnp.int32)
    offset = jnp.arange(tile_tokens, dtype=jnp.int32)
    sink = None
    if sinks is not None:
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(1, num_kv_heads, group), (1, 1, block))

    def attend_block(i, carry):
        out, lse = carry
        sequence = jnp.sum(block_ends <= i, dtype=jnp.int32)
        start, end, length, block_end, count = (
            rows_at(x, sequence) for x in (starts, ends, lengths, block_ends, num_blocks)
        )
        # The last block of the step may reach past T: it starts earlier, and ignores the rows before its own.
        own_start = start + (i - block_end + count) * block
        first = jnp.minimum(own_start, num_tokens - block)
        token = first + row
        position = length - end + token
        own = (token >= own_start) & (token < end) & (position >= 0)
        first_position = jnp.maximum(length - end + own_start, 0)
        last_position = length - end + jnp.minimum(own_start + block, end) - 1

        # [1, K, R = block * G, ...]: one sequence's queries, those of one KV head together.
        queries = jax.lax.dynamic_slice_in_dim(out, first, block)
        queries = queries.reshape(block, num_kv_heads, group, head_dim).swapaxes(0, 1)
        queries = queries.reshape(1, num_kv_heads, block * group, head_dim)
        row_position = repeated(position, group, 0)

        def attend_tile(tile, state: Softmax) -> Softmax:
            page_ids = jax.lax.dynamic_slice(table, (sequence, tile * tile_pages), (1, tile_pages))
            key_position = tile * tile_tokens + offset
            exists = repeated(page_ids[0] > 0, page_size, 0) & (key_position <= last_position)
            visible = exists[None, :] & (key_position[None, :] <= row_position[:, None])
            if options.window is not None:
                exists &= key_position > first_position - options.window
                visible &= key_position[None, :] > row_position[:, None] - options.window
            return attend(state, queries, pages, page_ids, exists[None], visible[None], options)

        first_tile = 0
        if options.window is not None:
            first_tile = quotient(jnp.maximum(first_position - options.window + 1, 0), tile_tokens)
        end_tile = quotient(last_position + tile_tokens, tile_tokens)
        end_tile = jnp.minimum(end_tile, -(-num_columns // tile_pages))
        state = empty_state(1, num_kv_heads, block * group, head_dim)
        state = jax.lax.fori_loop(first_tile, end_tile, attend_tile, state)

        def put(whole, x):  # [1, K, R, ...] -> the block's own rows of [T, N, ...]
            x = x.reshape(num_kv_heads, block, group, *x.shape[3:]).swapaxes(0, 1)
            x = x.reshape(block, *whole.shape[1:]).astype(whole.dtype)
            old = jax.lax.dynamic_slice_in_dim(whole, first, block)
            mask = own.reshape(block, *[1] * (x.ndim - 1))
            return jax.lax.dynamic_update_slice_in_dim(whole, jnp.where(mask, x, old), first, 0)

        return tuple(put(whole, x) for whole, x in zip(carry, finish(state, sink), strict=True))

    return jax.lax.fori_loop(0, block_ends[-1], attend_block, (out, lse))
