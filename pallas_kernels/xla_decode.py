"""Few queries a sequence: each by itself over its pages, a fixed number of tiles of keys in each step of a loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, quotient
from pallas_kernels.xla_shared import Blocks, attend_blocks
from pallas_kernels.xla_tiles import (
    Options,
    Softmax,
    attend,
    compute_dtype,
    empty_state,
    repeated,
    rows_at,
    tile_width,
)

# README.md has the measurements for these.
TILE_BYTES = 64 << 10  # keys and values of an item: a context costs whole tiles
TOKENS_PER_QUERY = 8  # of an item, at least, for each query of a KV head: each of them has a state to be merged
STEP_BYTES = 1 << 20  # of keys and values that one step of the loop gathers
MOST_LANES = 32


class Items(NamedTuple):
    """Tiles of keys that queries see: those of the first query in order, then those of the second, and so on.

    Only running totals are stored: item i belongs to the query whose total first passes i. They depend only on
    lengths, so XLA computes them once for all layers of a step.
    """

    starts: Int32[Array, " T"]  # of each query's items
    ends: Int32[Array, " T"]


@jax.named_scope("list_items")  # by which a test finds it in the compiled program
def list_items(end_page: Int32[Array, " T"], first_page: Int32[Array, " T"], tile_pages: int) -> Items:
    """The tiles from `first_page` up to `end_page`; none where that is no more."""
    count = quotient(jnp.maximum(end_page - first_page, 0) + tile_pages - 1, tile_pages)
    token = jnp.arange(count.size, dtype=jnp.int32)
    # For a few hundred queries cheaper to run and to compile than a cumsum.
    ends = jnp.sum(jnp.where(token[None, :] <= token[:, None], count[None, :], 0), axis=1, dtype=jnp.int32)
    return Items(ends - count, ends)


def num_lanes(pages: Pages, tile_tokens: int, dtype) -> int:
    """C: the items of one step."""
    item_bytes = tile_tokens * pages.num_kv_heads * tile_width(pages) * jnp.dtype(dtype).itemsize
    return min(max(STEP_BYTES // item_bytes, 1), MOST_LANES)


def pages_per_item(num_heads: int, pages: Pages) -> int:
    """Whole pages in a tile: of about TILE_BYTES, and of enough tokens that the states of their queries are small."""
    token_bytes = pages.num_kv_heads * tile_width(pages) * pages.data.dtype.itemsize
    tokens = max(TILE_BYTES // token_bytes, TOKENS_PER_QUERY * num_heads // pages.num_kv_heads)
    return max(1, tokens // pages.page_size)


def decode_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    table: Int32[Array, "B columns"],
    num_columns: int,
    places: TokenPlaces,
    first_page: Int32[Array, " T"],
    blocks: Blocks | None,
    options: Options,
) -> Softmax:
    """Attention of each query over its sequence's pages: with its groups over what they share, then by itself.

    The list of items is cut into C lanes of equal length, and each step of the loop takes one item of every lane. A
    query has one state for each lane that holds items of it, a segment, so no two items of a step meet in one state.
    Queries and lanes both only grow along the list: query + lane names a segment. At the end the segments of a query
    are merged.

    Args:
        q: the queries.
        pages: one layer's pages, the tokens already in them.
        table: the pages of each sequence, with the null page for every unmapped entry, and in `pages_per_item` more
            columns.
        num_columns: M, without those.
        places: the sequence and position of each query; those with a negative position cost nothing.
        first_page: the first page of its row that each query reads by itself; keys in it before the window are masked.
        blocks: the queries that read what their groups share; None: there are no groups.
        options: the static options.

    Returns:
        The state of each query, `[T, K, G]` and `[T, K, G, H]`.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size, tile_pages = pages.num_kv_heads, pages.page_size, pages_per_item(num_heads, pages)
    lanes = num_lanes(pages, tile_pages * page_size, compute_dtype(q, pages))
    end_page = jnp.minimum(quotient(places.position + page_size, page_size), num_columns)
    items = list_items(end_page, first_page, tile_pages)
    num_steps = quotient(items.ends[-1] + lanes - 1, lanes)
    grouped = q.reshape(num_tokens, num_kv_heads, -1, head_dim)
    base = places.sequence * table.shape[1] + first_page - items.starts * tile_pages
    base, end = jax.lax.optimization_barrier((base, places.sequence * table.shape[1]))
    lane = jnp.arange(lanes, dtype=jnp.int32)
    column = jnp.arange(tile_pages, dtype=jnp.int32)[None, :]
    offset = jnp.arange(tile_pages * page_size, dtype=jnp.int32)[None, :]

    def step(i, segments: Softmax) -> Softmax:
        item = lane * num_steps + i
        token = jnp.sum(items.ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
        segment = token + lane
        live = token < num_tokens
        token = jax.lax.optimization_barrier(jnp.minimum(token, num_tokens - 1))
        # Lanes without an item read the null pages at the end of a row.
        row = rows_at(end, token)
        page = jnp.where(live, rows_at(base, token) + item * tile_pages, row + num_columns)
        page_ids = rows_at(table.reshape(-1), page[:, None] + column)
        page_ids = jax.lax.optimization_barrier(page_ids)
        key_position = (page - row)[:, None] * page_size + offset
        position = rows_at(places.position, token)[:, None]
        visible = repeated(page_ids > 0, page_size, 1) & (key_position <= position)
        if options.window is not None:
            visible &= key_position > position - options.window
        old = Softmax(*(rows_at(x, segment) for x in segments))
        new = attend(old, rows_at(grouped, token), pages, page_ids, visible, None, options)
        return Softmax(
            *(
                x.at[segment].set(y, unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)
                for x, y in zip(segments, new, strict=True)
            )
        )

    first = first_segments(items, num_steps)
    sizes = num_tokens + lanes, num_kv_heads, num_heads // num_kv_heads, head_dim
    if blocks is None:
        segments = empty_state(*sizes)
    else:
        segments = jax.lax.cond(
            blocks.exist,
            lambda: attend_blocks(empty_state(*sizes), first, grouped, pages, table, places, blocks, options),
            lambda: empty_state(*sizes),
        )
    segments = jax.lax.fori_loop(0, num_steps, step, segments)
    return merge_segments(segments, first)


def first_segments(items: Items, num_steps: Int32[Array, ""]) -> Int32[Array, " T"]:
    """The first segment of each query, its own also where it has no items."""
    token = jnp.arange(items.starts.size, dtype=jnp.int32)
    return quotient(items.starts, jnp.maximum(num_steps, 1)) + token


def merge_segments(segments: Softmax, first: Int32[Array, " T"]) -> Softmax:
    """The state of each query, of its segments."""
    num_tokens, num_segments = first.size, segments.top.shape[0]
    segment = jnp.arange(num_segments, dtype=jnp.int32)
    token = jnp.sum(first[None, :] <= segment[:, None], axis=1, dtype=jnp.int32) - 1
    token = jax.lax.optimization_barrier(jnp.maximum(token, 0))
    at: dict[str, Any] = dict(mode="promise_in_bounds", wrap_negative_indices=False, indices_are_sorted=True)
    state = empty_state(num_tokens, *segments.out.shape[1:])
    top = state.top.at[token].max(segments.top, **at)
    # `keep` only multiplies zeros. XLA does not know that; otherwise it would fill them in before the loop.
    keep, shrink = jnp.exp(state.top - top), jnp.exp(segments.top - rows_at(top, token))
    return Softmax(
        top,
        (state.total * keep).at[token].add(segments.total * shrink, **at),
        (state.out * keep[..., None]).at[token].add(segments.out * shrink[..., None], **at),
    )
