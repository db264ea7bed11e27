"""Queries whose rows begin with the same pages: blocks of them meet the shared keys in one product."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, quotient, remainder
from pallas_kernels.sharing import NOBODY, Sharing
from pallas_kernels.xla_tiles import Options, Softmax, attend, empty_state, pages_per_block_tile, repeated, rows_at

LARGE_BLOCK, SMALL_BLOCK = 64, 8  # queries of a group that go together; a large one is at least half full
FEWEST_QUERIES = 3  # of a group: fewer, and each reads the shared pages by itself


class Level(NamedTuple):
    """The groups of one level, as the queries of a step see them."""

    leader: Int32[Array, " T"]  # row of the page table; NOBODY where the query has no group, or one of too few queries
    rank: Int32[Array, " T"]  # among the queries of its group
    size: Int32[Array, " T"]  # of its group, in queries
    begin: Int32[Array, " T"]  # the first position that is left for this level
    end: Int32[Array, " T"]  # where the shared tokens end


def attend_shared(
    q: Float[Array, "T N H"],
    pages: Pages,
    table: Int32[Array, "B columns"],
    places: TokenPlaces,
    begin: Int32[Array, " T"],
    sharing: Sharing,
    options: Options,
) -> tuple[Softmax, Int32[Array, " T"]]:
    """Attention of each query over what its groups share.

    Args:
        q: the queries.
        pages: one layer's pages, the tokens already in them.
        table: the pages of each sequence, with the null page for every unmapped entry, and in `pages_per_block_tile`
            more columns.
        places: the sequence and position of each query.
        begin: the first position that each query sees.
        sharing: which sequences share pages.
        options: the static options.

    Returns:
        The state of each query over the shared keys, and the first position that is left for it.
    """
    num_tokens, num_heads, head_dim = q.shape
    grouped = q.reshape(num_tokens, pages.num_kv_heads, -1, head_dim)
    state = empty_state(*grouped.shape)
    for leader, tokens in zip(sharing.leader, sharing.tokens, strict=True):
        level = find_level(leader, tokens, places, begin)
        takes_part = level.leader != NOBODY
        state = jax.lax.cond(
            jnp.any(takes_part),
            lambda state, level: attend_level(state, grouped, pages, table, level, options),
            lambda state, level: state,
            *(state, level),
        )
        begin = jnp.where(takes_part, level.end, begin)
    return state, begin


def find_level(
    leader: Int32[Array, " B"], tokens: Int32[Array, " B"], places: TokenPlaces, begin: Int32[Array, " T"]
) -> Level:
    """The groups of a level, but for those that have too few queries left."""
    end = jnp.minimum(rows_at(tokens, places.sequence), places.position + 1)
    leader = jnp.where((places.position >= 0) & (end > begin), rows_at(leader, places.sequence), NOBODY)
    token = jnp.arange(leader.size, dtype=jnp.int32)
    same = leader[:, None] == leader[None, :]
    rank = jnp.sum(same & (token[None, :] < token[:, None]), axis=1, dtype=jnp.int32)
    size = jnp.sum(same, axis=1, dtype=jnp.int32)
    return Level(jnp.where(size >= FEWEST_QUERIES, leader, NOBODY), rank, size, begin, end)


def attend_level(
    state: Softmax,
    q: Float[Array, "T K G H"],
    pages: Pages,
    table: Int32[Array, "B columns"],
    level: Level,
    options: Options,
) -> Softmax:
    """The states after the shared keys of one level."""
    takes_part = level.leader != NOBODY
    if q.shape[0] >= LARGE_BLOCK // 2:
        in_block = quotient(level.rank, LARGE_BLOCK) * LARGE_BLOCK
        in_large = level.size - in_block >= LARGE_BLOCK // 2
        state = attend_blocks(state, q, pages, table, level, takes_part & in_large, LARGE_BLOCK, options)
        takes_part &= ~in_large
    return attend_blocks(state, q, pages, table, level, takes_part, SMALL_BLOCK, options)


def attend_blocks(
    state: Softmax,
    q: Float[Array, "T K G H"],
    pages: Pages,
    table: Int32[Array, "B columns"],
    level: Level,
    takes_part: Bool[Array, " T"],
    size: int,
    options: Options,
) -> Softmax:
    """The states after some queries have met what their groups share, in blocks of `size` queries of a group."""
    num_tokens, num_kv_heads, group, head_dim = q.shape
    tile_pages = pages_per_block_tile(pages)
    tile_tokens = tile_pages * pages.page_size
    offset = jnp.arange(tile_tokens, dtype=jnp.int32)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    slot = jnp.arange(size, dtype=jnp.int32)
    is_first = takes_part & (remainder(level.rank, size) == 0)
    num_first = jnp.sum(is_first[None, :] & (token[None, :] <= token[:, None]), axis=1, dtype=jnp.int32)

    def heads_first(x):  # [size, K, G, ...] -> [1, K, size * G, ...]
        return x.swapaxes(0, 1).reshape(1, num_kv_heads, size * group, *x.shape[3:])

    def heads_last(x):
        return x.reshape(num_kv_heads, size, group, *x.shape[3:]).swapaxes(0, 1)

    def attend_block(i, state: Softmax) -> Softmax:
        first = jnp.sum(num_first <= i, dtype=jnp.int32)
        leader, rank = rows_at(level.leader, first), rows_at(level.rank, first)
        is_here = (level.leader == leader)[None, :] & (level.rank[None, :] == (rank + slot)[:, None])  # [size, T]
        member = jnp.any(is_here, axis=1)
        index = jnp.sum(jnp.where(is_here, token[None, :], 0), axis=1, dtype=jnp.int32)
        index, member = jax.lax.optimization_barrier((index, member))
        begin = jnp.where(member, rows_at(level.begin, index), jnp.iinfo(jnp.int32).max)
        end = jnp.where(member, rows_at(level.end, index), 0)
        queries = heads_first(rows_at(q, index))

        def attend_tile(j, block: Softmax) -> Softmax:
            page_ids = jax.lax.dynamic_slice(table, (leader, j * tile_pages), (1, tile_pages))
            key_position = j * tile_tokens + offset
            visible = (key_position[None, :] >= begin[:, None]) & (key_position[None, :] < end[:, None])
            visible &= repeated(page_ids > 0, pages.page_size, 1)
            exists = jnp.any(visible, axis=0)
            return attend(block, queries, pages, page_ids, exists[None], repeated(visible, group, 0)[None], options)

        first_tile = quotient(jnp.min(begin), tile_tokens)
        end_tile = quotient(jnp.max(end) + tile_tokens - 1, tile_tokens)
        block = Softmax(*(heads_first(rows_at(x, index)) for x in state))
        block = jax.lax.fori_loop(first_tile, end_tile, attend_tile, block)
        place = jnp.where(member, index, num_tokens)
        return Softmax(*(x.at[place].set(heads_last(y), mode="drop") for x, y in zip(state, block, strict=True)))

    return jax.lax.fori_loop(0, num_first[-1], attend_block, state)
