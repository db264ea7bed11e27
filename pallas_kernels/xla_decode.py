"""Few queries a sequence: a work list of (token, KV tile) items, so that the cost follows the real lengths."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, is_stacked
from pallas_kernels.xla_tiles import LOWEST, Options, Softmax, attend, compute_dtype, finish, start

# Gathered at once: XLA on a CPU page-faults large temporaries on every use; with much smaller ones the fixed cost of a
# step shows. Measured with page size 16: 32/8/128 (N/K/H) and 8/2/64, batch 32, 0.25 to 4 MB.
KEY_BYTES = 2 << 20  # of keys; as much again of values
ROW_BYTES = 3 << 19  # of rows that hold both
MOST_ITEMS = 32  # merging costs items squared


class WorkList(NamedTuple):
    """Items 0, 1, ... go through the tokens in order, and through each token's tiles in order.

    Only the running totals are stored: item i belongs to the token whose total first passes i. They depend on
    nothing but lengths, so XLA computes them once for all layers of a step.
    """

    first_tile: Int32[Array, " T"]
    ends: Int32[Array, " T"]  # of each token's items


def work_list(position: Int32[Array, " T"], tile_tokens: int, num_tiles: int, window: int | None) -> WorkList:
    """The tiles that each token sees; none where its position is negative."""
    first = jnp.zeros_like(position)
    if window is not None:
        first = jnp.maximum(position - window + 1, 0) // tile_tokens
    end = jnp.minimum(position // tile_tokens + 1, num_tiles)
    count = jnp.where(position >= 0, jnp.maximum(end - first, 0), 0)
    return WorkList(first, jnp.cumsum(count, dtype=jnp.int32))


def items_per_step(pages: Pages, tile_tokens: int, dtype) -> int:
    """C: the items that one step of the loop takes."""
    item_bytes = tile_tokens * pages.num_kv_heads * pages.data.shape[-1] * jnp.dtype(dtype).itemsize
    return min(max((KEY_BYTES if is_stacked(pages) else ROW_BYTES) // item_bytes, 1), MOST_ITEMS)


def decode_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    table: Int32[Array, "B tiles pages_per_tile"],
    places: TokenPlaces,
    sinks: Float[Array, " N"] | None,
    options: Options,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of each token by itself over its sequence's pages.

    Args:
        q: the queries.
        pages: one layer's pages, the tokens already in them.
        table: the pages by tiles.
        places: the sequence and position of each token; those with a negative position cost nothing.
        sinks: one logit a query head.
        options: the static options.

    Returns:
        Output in float32 and log-sum-exp; what `start` gives where a token sees nothing.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.num_kv_heads, pages.page_size
    tile_tokens = table.shape[2] * page_size
    items = items_per_step(pages, tile_tokens, compute_dtype(q, pages))
    work = work_list(places.position, tile_tokens, table.shape[1], options.window)
    num_items = work.ends[-1]
    grouped = q.reshape(num_tokens, num_kv_heads, -1, head_dim)
    offset = jnp.arange(tile_tokens, dtype=jnp.int32)[None, :]

    def step(i, state: Softmax) -> Softmax:
        item = i * items + jnp.arange(items, dtype=jnp.int32)
        token = jnp.sum(work.ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
        live = token < num_tokens
        token = jnp.minimum(token, num_tokens - 1)
        start_item = jnp.where(token > 0, work.ends[jnp.maximum(token - 1, 0)], 0)
        tile = jnp.where(live, work.first_tile[token] + item - start_item, 0)
        page_ids = table[places.sequence[token], tile]

        key_position = tile[:, None] * tile_tokens + offset
        position = places.position[token][:, None]
        visible = (key_position <= position) & jnp.repeat(page_ids > 0, page_size, axis=1) & live[:, None]
        if options.window is not None:
            visible &= key_position > position - options.window
        new = attend(grouped[token], pages, page_ids, visible, visible[:, None], options)
        return merge_items(state, new, token, live)

    initial = start(sinks, num_kv_heads, num_heads, head_dim)
    initial = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_tokens, *x.shape)), initial)
    state = jax.lax.fori_loop(0, -(-num_items // items), step, initial)
    out, lse = finish(state)
    return out.reshape(q.shape), lse.reshape(num_tokens, num_heads)


def merge_items(state: Softmax, new: Softmax, token: Array, live: Array) -> Softmax:
    """Merges C items, sorted by token, into the states of their tokens, and touches no other.

    One token's NaN must not reach another: items of different tokens are kept apart by selection, not by a
    weight of zero.
    """
    same = ((token[:, None] == token[None, :]) & live[None, :])[:, :, None, None]  # [C, C, 1, 1]
    old_top = state.top[token]
    top = jnp.maximum(old_top, jnp.max(jnp.where(same, new.top[None], LOWEST), axis=1))
    weight = jnp.exp(new.top - top)
    total = jnp.sum(jnp.where(same, (new.total * weight)[None], 0), axis=1)
    shrink = jnp.exp(old_top - top)
    is_first = jnp.concatenate([jnp.ones(1, bool), token[1:] != token[:-1]])
    row = jnp.where(live, token, state.top.shape[0])  # past the end: dropped
    first_row = jnp.where(is_first, row, state.top.shape[0])
    out = state.out.at[first_row].multiply(shrink[..., None], mode="drop", unique_indices=False)
    return Softmax(
        state.top.at[row].set(top, mode="drop"),
        state.total.at[row].set(state.total[token] * shrink + total, mode="drop"),
        out.at[row].add(new.out * weight[..., None], mode="drop"),
    )
