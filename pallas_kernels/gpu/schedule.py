"""Which block of the grid attends over which tiles of which row: a list built inside jit from the lengths.

The tiles of all rows are laid end to end and cut into equal shares, one a block, so one long row keeps every
multiprocessor as busy as many short ones do. A cut or the end of a row ends a segment; the partial results of a
row's segments are merged. From Stream-K (Osama et al. 2023, arXiv 2301.03598) and FlashInfer's scheduler (Ye et
al. 2025, arXiv 2501.01005), without their planning on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

FIELDS = 8  # int32 words of a segment: 32 bytes, so that its fields are one memory sector


class Schedule(NamedTuple):
    """The segments of every share, in order; W = rows + shares is a bound on their number.

    Args:
        segments: `[W, 8]`: row, first tile, number of tiles; the rest is 0. Unused ones are 0.
        share_starts: `[shares + 1]`: share i runs segments `share_starts[i] : share_starts[i + 1]`.
        row_starts: `[rows + 1]`: row r was cut into segments `row_starts[r] : row_starts[r + 1]`.
    """

    segments: Int32[Array, "W 8"]
    share_starts: Int32[Array, " shares+1"]
    row_starts: Int32[Array, " rows+1"]


def cut_rows(first_tile: Int32[Array, " R"], num_tiles: Int32[Array, " R"], num_shares: int) -> Schedule:
    """Cuts the rows' tiles into equal shares.

    Every step is a comparison of all pairs and a sum: each fuses into one small kernel, where a cumulative sum or
    a sort would take several.

    Args:
        first_tile: `[R]`, the first tile that a row reads.
        num_tiles: `[R]`, how many it reads; 0 for a row without work.
        num_shares: into how many shares to cut.

    Returns:
        The segments of every share.
    """
    num_rows = num_tiles.size
    num_segments = num_rows + num_shares
    row_ends = running_sum(num_tiles)
    row_begins = row_ends - num_tiles
    share_size = jnp.maximum(1, -(-row_ends[-1] // num_shares))

    first_share = row_begins // share_size
    cuts = jnp.where(num_tiles > 0, (row_ends - 1) // share_size - first_share + 1, 0)
    row_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), running_sum(cuts)])

    segment = jnp.arange(num_segments, dtype=jnp.int32)
    row = count_at_most(row_starts[1:], segment)
    used = row < num_rows
    row = jnp.where(used, row, 0)
    share = first_share[row] + segment - row_starts[row]
    begin = jnp.maximum(row_begins[row], share * share_size)
    end = jnp.minimum(row_ends[row], (share + 1) * share_size)
    fields = [row, first_tile[row] + begin - row_begins[row], end - begin]
    fields = jnp.where(used[:, None], jnp.stack(fields, axis=1), 0)

    share = jnp.where(used, share, num_shares)
    share_starts = count_at_most(share, jnp.arange(num_shares + 1, dtype=jnp.int32) - 1)
    return Schedule(jnp.pad(fields, ((0, 0), (0, FIELDS - fields.shape[1]))), share_starts, row_starts)


class RowItems(NamedTuple):
    """What the blocks of the grid do, the longest first; `[W]` each, unused ones have no rows.

    A block loads its rows from a multiple of 8 on, as the copy engine demands of swizzled tiles; those outside
    `first_row : end_row` belong to other sequences and are not stored.

    Args:
        sequence: row of the page table.
        eighth: where the block's rows begin, in units of 8 rows.
        first_row: the first of the block's rows that is the sequence's.
        end_row: behind the last.
        offset: of the block's first row from the sequence's first.
        position: of the sequence's first query; 2**30 if its rows see every key up to `end`.
        first_tile: of the keys that some row sees.
        num_tiles: how many.
        end: behind the last key that exists.
        part: which part of the result this is.
    """

    sequence: Int32[Array, " W"]
    eighth: Int32[Array, " W"]
    first_row: Int32[Array, " W"]
    end_row: Int32[Array, " W"]
    offset: Int32[Array, " W"]
    position: Int32[Array, " W"]
    first_tile: Int32[Array, " W"]
    num_tiles: Int32[Array, " W"]
    end: Int32[Array, " W"]
    part: Int32[Array, " W"]


class Queries(NamedTuple):
    """Consecutive queries of a sequence and the keys that they see; one entry a sequence.

    Args:
        sequence: row of the page table.
        start: of the queries in `T`.
        num: of queries.
        position: of the first; the others follow.
        end: behind the last key that exists.
    """

    sequence: Int32[Array, " C"]
    start: Int32[Array, " C"]
    num: Int32[Array, " C"]
    position: Int32[Array, " C"]
    end: Int32[Array, " C"]


def cut_queries(
    queries: Queries,
    num_tokens: int,
    *,
    rows_per_query: int,
    rows_per_block: int,
    tokens_per_tile: int,
    num_parts: int,
    window: int | None,
) -> RowItems:
    """Cuts queries into blocks of rows, and the keys of a block into parts; the longest work first.

    Args:
        queries: disjoint runs of queries.
        num_tokens: T, a bound on their sum.
        rows_per_query: rows of the kernel that stand for one query.
        rows_per_block: rows that a block takes.
        tokens_per_tile: keys a step.
        num_parts: of the keys.
        window: or None.

    Returns:
        The items: `max_row_items(...) * num_parts` of them.
    """
    num_items = max_row_items(queries.num.size, num_tokens, rows_per_query, rows_per_block)
    first, end = queries.start * rows_per_query, (queries.start + queries.num) * rows_per_query
    base = first // 8 * 8
    blocks = jnp.where(queries.num > 0, -(-(end - base) // rows_per_block), 0)
    ends = running_sum(blocks)
    item = jnp.arange(num_items, dtype=jnp.int32)
    run = count_at_most(ends, item)
    used = run < queries.num.size
    run = jnp.where(used, run, 0)

    begin = base[run] + (item - (ends - blocks)[run]) * rows_per_block
    first_row = jnp.maximum(first[run] - begin, 0)
    end_row = jnp.where(used, jnp.minimum(end[run] - begin, rows_per_block), first_row)
    offset = begin - first[run]
    position, key_end = queries.position[run], queries.end[run]
    lowest = position + (offset + first_row) // rows_per_query
    highest = position + (offset + end_row - 1) // rows_per_query
    first_tile = 0 * lowest if window is None else jnp.maximum(lowest - window + 1, 0) // tokens_per_tile
    last = jnp.minimum(highest, key_end - 1)
    num_tiles = jnp.where(used & (last >= 0), jnp.maximum(last // tokens_per_tile + 1 - first_tile, 0), 0)

    # Longest first, by rank: the blocks that start last are then short, and none of them ends long after the rest.
    if num_items <= 2048:
        before = (num_tiles[None, :] > num_tiles[:, None]) & used[None, :]
        ties = (num_tiles[None, :] == num_tiles[:, None]) & (item[None, :] < item[:, None])
        rank = jnp.sum(before | ties, axis=1, dtype=jnp.int32)
    else:
        rank = item
    part_tiles = -(-num_tiles // num_parts)
    parts = []
    for part in range(num_parts):
        done = part * part_tiles
        fields = RowItems(
            queries.sequence[run], begin // 8, first_row, end_row, offset, position, first_tile + done,
            jnp.clip(num_tiles - done, 0, part_tiles), key_end, jnp.full_like(run, part),
        )  # fmt: skip
        parts.append(RowItems(*(jnp.zeros_like(x).at[rank].set(x, unique_indices=True) for x in fields)))
    return RowItems(*(jnp.concatenate(field) for field in zip(*parts, strict=True)))


def max_row_items(num_runs: int, num_tokens: int, rows_per_query: int, rows_per_block: int) -> int:
    """A bound on the blocks that so many runs of queries take, of which each begins at a multiple of 8 rows."""
    rows = num_tokens * rows_per_query
    return min((rows + 7 * num_runs) // rows_per_block + num_runs, num_tokens * (rows_per_query // rows_per_block + 2))


def running_sum(x: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """The inclusive cumulative sum."""
    if x.size > 2048:
        return jnp.cumsum(x, dtype=jnp.int32)
    index = jnp.arange(x.size)
    return jnp.sum(jnp.where(index[None, :] <= index[:, None], x[None, :], 0), axis=1, dtype=jnp.int32)


def count_at_most(values: Int32[Array, " n"], bounds: Int32[Array, " m"]) -> Int32[Array, " m"]:
    """How many of the values are at most each bound."""
    return jnp.sum(values[None, :] <= bounds[:, None], axis=1, dtype=jnp.int32)
