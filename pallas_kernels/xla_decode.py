"""Few queries a sequence: each by itself over its pages, a fixed number of tiles of keys in each step of a loop."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, is_stacked
from pallas_kernels.xla_tiles import LOWEST, Options, Softmax, attend, compute_dtype, merge

# README.md has the measurements behind these.
TILE_BYTES = 256 << 10  # keys and values of an item: a context costs whole tiles
SHORT = 4  # items of short contexts are so many times smaller
STEP_BYTES = 1 << 20  # of keys and values that one step of the loop gathers
MOST_LANES = 32
NOTHING = -1  # the position of a query that sees nothing


class Items(NamedTuple):
    """Tiles of keys that queries see: those of the first query in order, then those of the second, and so on.

    Only running totals are stored: item i belongs to the query whose total first passes i. They depend on lengths
    alone, so XLA computes them once for all layers of a step.
    """

    first_page: Int32[Array, " T"]  # column of the page table where a query's first tile starts
    starts: Int32[Array, " T"]  # of each query's items
    ends: Int32[Array, " T"]


def list_items(
    position: Int32[Array, " T"], begin: Int32[Array, " T"], page_size: int, tile_pages: int, num_columns: int
) -> Items:
    """The tiles from the page of `begin` to that of `position`; none where `position` is lower."""
    first_page = begin // page_size
    end_page = jnp.minimum(position // page_size + 1, num_columns)
    count = -(-(end_page - first_page) // tile_pages)
    count = jnp.where(position >= begin, jnp.maximum(count, 0), 0)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    return Items(first_page, ends - count, ends)


def num_lanes(pages: Pages, tile_tokens: int, dtype) -> int:
    """C: the items of one step."""
    width = pages.data.shape[-1] * (2 if is_stacked(pages) else 1)
    item_bytes = tile_tokens * pages.num_kv_heads * width * jnp.dtype(dtype).itemsize
    return min(max(STEP_BYTES // item_bytes, 1), MOST_LANES)


def decode_attention(
    q: Float[Array, "T N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    places: TokenPlaces,
    begin: Int32[Array, " T"],
    options: Options,
) -> Softmax:
    """Attention of each query by itself over its sequence's pages.

    A query that sees at most two short tiles takes short tiles, the others take long ones.

    Args:
        q: the queries.
        pages: one layer's pages, the tokens already in them.
        page_table: the pages of each sequence, with the null page for every unmapped entry.
        places: the sequence and position of each query; those with a negative position cost nothing.
        begin: the first position that each query sees, a multiple of the page size where no window cuts it.
        options: the static options.

    Returns:
        The state of each query, `[T, K, G]` and `[T, K, G, H]`.
    """
    long, short = (max(1, tile_tokens(pages) // fraction // pages.page_size) for fraction in (1, SHORT))
    if long == short:
        return attend_tiles(q, pages, page_table, places, begin, long, options)
    is_short = places.position - begin < 2 * short * pages.page_size
    states = []
    for tile_pages, member in ((short, is_short), (long, ~is_short)):
        some = TokenPlaces(places.sequence, jnp.where(member, places.position, NOTHING))
        states.append(attend_tiles(q, pages, page_table, some, begin, tile_pages, options))
    return merge(*states)


def tile_tokens(pages: Pages) -> int:
    """Tokens of a long tile, whose keys and values have about TILE_BYTES."""
    width = pages.data.shape[-1] * (2 if is_stacked(pages) else 1)
    return max(1, TILE_BYTES // (pages.num_kv_heads * width * pages.data.dtype.itemsize))


def attend_tiles(
    q: Float[Array, "T N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    places: TokenPlaces,
    begin: Int32[Array, " T"],
    tile_pages: int,
    options: Options,
) -> Softmax:
    """`decode_attention` with tiles of so many pages.

    The list of items is cut into C lanes of equal length, and each step of the loop takes one item of every lane. A
    query has one state for each lane that holds items of it, a segment, so no two items of a step meet in one state.
    Queries and lanes both only grow along the list: query + lane names a segment. At the end the segments of a query
    are merged.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size, num_columns = pages.num_kv_heads, pages.page_size, page_table.shape[1]
    lanes = num_lanes(pages, tile_pages * page_size, compute_dtype(q, pages))
    items = list_items(places.position, begin, page_size, tile_pages, num_columns)
    num_steps = -(-items.ends[-1] // lanes)
    grouped = q.reshape(num_tokens, num_kv_heads, -1, head_dim)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    column = jnp.arange(tile_pages, dtype=jnp.int32)[None, :]
    offset = jnp.arange(tile_pages * page_size, dtype=jnp.int32)[None, :]

    def step(i, segments: Softmax) -> Softmax:
        item = lane * num_steps + i
        token = jnp.sum(items.ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
        live = (token < num_tokens)[:, None]
        segment = token + lane
        token = jnp.minimum(token, num_tokens - 1)
        page = (items.first_page[token] + (item - items.starts[token]) * tile_pages)[:, None]
        page_ids = page_table[places.sequence[token][:, None], jnp.minimum(page + column, num_columns - 1)]
        page_ids = jax.lax.optimization_barrier(jnp.where(live & (page + column < num_columns), page_ids, 0))

        key_position = page * page_size + offset
        visible = jnp.repeat(page_ids > 0, page_size, axis=1) & (key_position <= places.position[token][:, None])
        if options.window is not None:
            visible &= key_position >= begin[token][:, None]
        new = attend(grouped[token], pages, page_ids, visible, visible[:, None], options)
        merged = merge(Softmax(*(x[segment] for x in segments)), new)
        return Softmax(*(x.at[segment].set(y, unique_indices=True) for x, y in zip(segments, merged, strict=True)))

    shape = (num_tokens + lanes, num_kv_heads, num_heads // num_kv_heads)
    empty = Softmax(jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    segments = jax.lax.fori_loop(0, num_steps, step, empty)
    return merge_segments(segments, items, num_steps)


def merge_segments(segments: Softmax, items: Items, num_steps: Int32[Array, ""]) -> Softmax:
    """The state of each query, from its segments."""
    per_lane = jnp.maximum(num_steps, 1)
    first = items.starts // per_lane
    num_segments = jnp.where(items.ends > items.starts, (items.ends - 1) // per_lane - first + 1, 0)
    segment = jnp.arange(items.ends.size, dtype=jnp.int32) + first

    def nth(i) -> Softmax:
        top, total, out = (x[jnp.minimum(segment + i, x.shape[0] - 1)] for x in segments)
        exists = (i < num_segments)[:, None, None]
        return Softmax(
            jnp.where(exists, top, LOWEST), jnp.where(exists, total, 0), jnp.where(exists[..., None], out, 0)
        )

    return jax.lax.fori_loop(1, jnp.max(num_segments), lambda i, state: merge(state, nth(i)), nth(0))
