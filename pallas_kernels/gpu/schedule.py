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


def running_sum(x: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """The inclusive cumulative sum."""
    if x.size > 2048:
        return jnp.cumsum(x, dtype=jnp.int32)
    index = jnp.arange(x.size)
    return jnp.sum(jnp.where(index[None, :] <= index[:, None], x[None, :], 0), axis=1, dtype=jnp.int32)


def count_at_most(values: Int32[Array, " n"], bounds: Int32[Array, " m"]) -> Int32[Array, " m"]:
    """How many of the values are at most each bound."""
    return jnp.sum(values[None, :] <= bounds[:, None], axis=1, dtype=jnp.int32)
