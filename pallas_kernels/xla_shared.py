"""Queries whose rows begin with the same pages: blocks of them meet the shared keys in one product."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces
from pallas_kernels.sharing import NOBODY, Sharing
from pallas_kernels.xla_tiles import LOWEST, Options, Softmax, attend, merge

TILE_TOKENS = 128
LARGE_BLOCK, SMALL_BLOCK = 64, 8  # queries of a group that go together; a large one is at least half full
FEWEST_QUERIES = 3  # of a group: fewer, and each reads the shared pages by itself


class Level(NamedTuple):
    """The groups of one level, as the queries of a step see them."""

    leader: Int32[Array, " T"]  # row of the page table; NOBODY where the query has no group
    begin: Int32[Array, " T"]  # the first position that is left for this level
    end: Int32[Array, " T"]  # where the shared tokens end


class Blocks(NamedTuple):
    """Runs of queries, sorted by group, that go together."""

    starts: Int32[Array, " n"]
    count: Int32[Array, ""]


def attend_shared(
    q: Float[Array, "T N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    places: TokenPlaces,
    begin: Int32[Array, " T"],
    sharing: Sharing,
    options: Options,
) -> tuple[Softmax, Int32[Array, " T"]]:
    """Attention of each query over what its groups share.

    Args:
        q: the queries.
        pages: one layer's pages, the tokens already in them.
        page_table: the pages of each sequence, with the null page for every unmapped entry.
        places: the sequence and position of each query.
        begin: the first position that each query sees.
        sharing: which sequences share pages.
        options: the static options.

    Returns:
        The state of each query over the shared keys, and the first position that is left for it.
    """
    state = empty_state(q.shape, pages)
    for leader, tokens in zip(sharing.leader, sharing.tokens, strict=True):
        end = jnp.minimum(tokens[places.sequence], places.position + 1)
        has_group = (places.position >= 0) & (end > begin)
        level = Level(jnp.where(has_group, leader[places.sequence], NOBODY), begin, end)
        shared, took_part = jax.lax.cond(
            jnp.any(level.leader != NOBODY),
            lambda level: attend_level(q, pages, page_table, level, options),
            lambda level: (empty_state(q.shape, pages), jnp.zeros(level.leader.size, bool)),
            level,
        )
        state = merge(state, shared)
        begin = jnp.where(took_part, end, begin)
    return state, begin


def empty_state(shape: tuple[int, ...], pages: Pages) -> Softmax:
    """Of queries `[T, N, H]` before any key."""
    num_tokens, num_heads, head_dim = shape
    heads = num_tokens, pages.num_kv_heads, num_heads // pages.num_kv_heads
    return Softmax(jnp.full(heads, LOWEST), jnp.zeros(heads), jnp.zeros((*heads, head_dim)))


def attend_level(
    q: Float[Array, "T N H"], pages: Pages, page_table: Int32[Array, "B M"], level: Level, options: Options
) -> tuple[Softmax, Bool[Array, " T"]]:
    """Attention of the queries with a group over its shared keys, and which queries that are."""
    num_tokens = q.shape[0]
    no_group = jnp.iinfo(jnp.int32).max
    key = jnp.where(level.leader == NOBODY, no_group, level.leader)
    order = jnp.argsort(key)
    key = key[order]
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    is_first = jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    rank = index - jax.lax.cummax(jnp.where(is_first, index, 0))
    size = jnp.sum(key[:, None] == key[None, :], axis=1, dtype=jnp.int32)
    takes_part = (key != no_group) & (size >= FEWEST_QUERIES)
    in_large = size - rank // LARGE_BLOCK * LARGE_BLOCK >= LARGE_BLOCK // 2

    def blocks(member: Array, block: int) -> Blocks:
        starts = takes_part & member & (rank % block == 0)
        found = jnp.flatnonzero(starts, size=num_tokens, fill_value=0).astype(jnp.int32)
        return Blocks(found, jnp.sum(starts, dtype=jnp.int32))

    # Blocks may reach behind the last query, into padding that belongs to no group.
    def sort(x, fill):
        width = [(0, LARGE_BLOCK), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x[order], width, constant_values=jnp.asarray(fill, x.dtype))

    level = Level(*(sort(x, NOBODY) for x in level))
    queries = sort(q, 0)
    state = empty_state(queries.shape, pages)
    if num_tokens >= LARGE_BLOCK // 2:
        state = attend_blocks(
            queries, state, pages, page_table, level, blocks(in_large, LARGE_BLOCK), LARGE_BLOCK, options
        )
        small = ~in_large
    else:
        small = jnp.ones_like(in_large)
    state = attend_blocks(queries, state, pages, page_table, level, blocks(small, SMALL_BLOCK), SMALL_BLOCK, options)
    place = jnp.zeros_like(order).at[order].set(index)
    return Softmax(*(x[place] for x in state)), takes_part[place]


def attend_blocks(
    q: Float[Array, "T N H"],
    state: Softmax,
    pages: Pages,
    page_table: Int32[Array, "B M"],
    level: Level,
    blocks: Blocks,
    size: int,
    options: Options,
) -> Softmax:
    """The states of sorted queries with those of some blocks of `size` queries filled in."""
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page_size, num_columns = pages.num_kv_heads, pages.page_size, page_table.shape[1]
    group = num_heads // num_kv_heads
    tile_pages = max(1, TILE_TOKENS // page_size)
    column = jnp.arange(tile_pages, dtype=jnp.int32)
    offset = jnp.arange(tile_pages * page_size, dtype=jnp.int32)

    def heads_first(x):  # [size, K, G, ...] -> [1, K, size * G, ...]
        return x.swapaxes(0, 1).reshape(1, num_kv_heads, size * group, *x.shape[3:])

    def heads_last(x):
        return x.reshape(num_kv_heads, size, group, *x.shape[3:]).swapaxes(0, 1)

    def attend_block(i, state: Softmax) -> Softmax:
        first = blocks.starts[i]
        leader, begin, end = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in level)
        member = leader == leader[0]
        begin = jnp.where(member, begin, jnp.iinfo(jnp.int32).max)
        queries = jax.lax.dynamic_slice_in_dim(q, first, size)
        queries = heads_first(queries.reshape(size, num_kv_heads, group, head_dim))
        row = page_table[jnp.maximum(leader[0], 0)]

        def attend_tile(j, state: Softmax) -> Softmax:
            page = j * tile_pages + column
            page_ids = jnp.where(page < num_columns, row[jnp.minimum(page, num_columns - 1)], 0)
            key_position = j * tile_pages * page_size + offset
            visible = (key_position[None, :] >= begin[:, None]) & (key_position[None, :] < end[:, None])
            visible &= jnp.repeat(page_ids > 0, page_size)[None, :]
            exists = jnp.any(visible, axis=0)
            visible = jnp.repeat(visible, group, axis=0)
            return merge(state, attend(queries, pages, page_ids[None], exists[None], visible[None], options))

        first_tile = jnp.min(begin) // (tile_pages * page_size)
        end_tile = -(-jnp.max(jnp.where(member, end, 0)) // (tile_pages * page_size))
        old = Softmax(*(jax.lax.dynamic_slice_in_dim(x, first, size) for x in state))
        empty = Softmax(*(heads_first(x) for x in empty_state((size, num_heads, head_dim), pages)))
        new = jax.lax.fori_loop(first_tile, end_tile, attend_tile, empty)

        def put(whole, new, old):
            mask = member.reshape(size, *[1] * (old.ndim - 1))
            return jax.lax.dynamic_update_slice_in_dim(whole, jnp.where(mask, heads_last(new), old), first, 0)

        return Softmax(*(put(*parts) for parts in zip(state, new, old, strict=True)))

    return jax.lax.fori_loop(0, blocks.count, attend_block, state)
