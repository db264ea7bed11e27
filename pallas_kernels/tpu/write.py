"""Writes new keys and values to their pages, in place.

Two bfloat16 rows share a 32-bit word, so a copy cannot address one token. The kernel therefore works tile by
tile, `tile_rows` slots of one page: a tile that the new tokens fill is overwritten, any other is read, merged
and written back.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tpu.heads import SUBLANES
from pallas_kernels.tpu.memory import WORD_PART, in_hbm

RING = 8  # tiles under way
LEAD = 4  # tiles between a read and its merge


class Tiles(NamedTuple):
    """The tiles that a step writes; each holds tokens of one sequence.

    Args:
        page: int32 `[C]`, 0: nothing to write.
        row: int32 `[C]`, the slot of the page where the tile starts.
        first, end: int32 `[C]`, the rows of the tile that are new.
        token: int32 `[C]`, the packed token that row 0 would hold.
    """

    page: Array
    row: Array
    first: Array
    end: Array
    token: Array

    @property
    def scalars(self) -> Array:
        """What the kernel reads."""
        return jnp.concatenate([self.page, self.row, self.first, self.end])


def rows_per_tile(page_size: int, itemsize: int) -> int:
    """Slots of a page that a copy moves at least."""
    return min(page_size, SUBLANES * 4 // itemsize)


def tiles_of_step(
    ids: Array, lengths: Array, query_starts: Array, num_tokens: int, page_size: int, tile_rows: int
) -> Tiles:
    """Lists the tiles of all sequences.

    Args:
        ids: int32 `[B, M]`, the page table, 0 where there is no page.
    """
    num_rows, max_pages = ids.shape
    num_tiles = min(num_tokens, num_tokens // tile_rows + 2 * num_rows)
    query_lens = query_starts[1:] - query_starts[:-1]
    start = lengths - query_lens  # position of the first new token, negative where tokens are inert
    position = jnp.maximum(start, 0)
    first_tile = position // tile_rows
    num = jnp.where(query_lens > 0, jnp.maximum((lengths + tile_rows - 1) // tile_rows - first_tile, 0), 0)
    ends = jnp.cumsum(num)
    n = jnp.arange(num_tiles, dtype=jnp.int32)
    sequence = jnp.sum(ends[None, :] <= n[:, None], axis=1, dtype=jnp.int32)
    real = sequence < num_rows
    sequence = jnp.minimum(sequence, num_rows - 1)
    tile = first_tile[sequence] + n - (ends - num)[sequence]
    at = tile * tile_rows
    column = at // page_size
    page = ids[sequence, jnp.clip(column, 0, max_pages - 1)]
    return Tiles(
        page=jnp.where(real & (column < max_pages), page, 0),
        row=at % page_size,
        first=jnp.clip(position[sequence] - at, 0, tile_rows),
        end=jnp.clip(lengths[sequence] - at, 0, tile_rows),
        token=query_starts[sequence] + at - start[sequence],
    )


def _kernel(scalars, new_hbm, pages_in, pages, *scratch, planes: int, page_size: int):
    del pages_in  # the same memory as `pages`
    new, old = scratch[:RING], scratch[RING : 2 * RING]  # [K, planes, rows, L] each
    in_sem, out_sem = scratch[2 * RING :]
    num_tiles = new_hbm.shape[0]
    rows, lanes = new[0].shape[2:]
    packed = 4 // new[0].dtype.itemsize

    def field(index, n):
        return scalars[index * num_tiles + jnp.clip(n, 0, num_tiles - 1)]

    def is_real(n):
        return (n >= 0) & (n < num_tiles) & (field(0, n) > 0)

    def is_partial(n):
        return field(3, n) - field(2, n) < rows

    def in_pages(n, plane):
        start = plane * page_size + field(1, n)
        return pages.at[field(0, n), :, pl.ds(pl.multiple_of(start, rows), rows), :]

    def reads(n, slot, act):
        pl.when(is_real(n))(lambda: act(pltpu.make_async_copy(new_hbm.at[n], new[slot], in_sem.at[slot])))
        for e in range(planes):
            copy = pltpu.make_async_copy(in_pages(n, e), old[slot].at[:, e], in_sem.at[slot])
            pl.when(is_real(n) & is_partial(n))(functools.partial(act, copy))

    def writes(n, slot, act):
        for e in range(planes):
            copy = pltpu.make_async_copy(new[slot].at[:, e], in_pages(n, e), out_sem.at[slot])
            pl.when(is_real(n))(functools.partial(act, copy))

    def merge(n, slot):
        row = packed * lax.broadcasted_iota(jnp.int32, (rows // packed, lanes), 0)
        is_new = jnp.zeros_like(row)
        for part in range(packed):
            inside = (row + part >= field(2, n)) & (row + part < field(3, n))
            bits = jnp.int32(WORD_PART[packed]) << jnp.int32(part * (32 // packed))
            is_new = is_new | jnp.where(inside, bits, 0)
        for h in range(new[slot].shape[0]):
            for e in range(planes):
                x, y = (pltpu.bitcast(ref[slot][h, e], jnp.int32) for ref in (old, new))
                new[slot][h, e] = pltpu.bitcast(x ^ ((x ^ y) & is_new), new[slot].dtype)

    def start(copy):
        copy.start()

    def wait(copy):
        copy.wait()

    def lap(t, _):
        for slot in range(RING):
            n = t * RING + slot
            writes(n - RING, slot, wait)
            reads(n, slot, start)
            ready, at = n - LEAD, (slot - LEAD) % RING
            reads(ready, at, wait)
            pl.when(is_real(ready) & is_partial(ready))(functools.partial(merge, ready, at))
            writes(ready, at, start)
        return 0

    # The last tile is written LEAD steps after its read and waited for a lap later.
    lax.fori_loop(0, -(-(num_tiles + RING) // RING) + 1, lap, 0)


def write_tiles(tiles: Tiles, new: Array, pages: Array, *, page_size: int) -> Array:
    """Writes the new rows of each tile.

    Args:
        new: `[C, K, planes, rows, L]`, the tiles with the new rows in place; other rows are not read.
        pages: `[P, K, planes * S, L]`.
    """
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    new, pages = in_hbm(new), in_hbm(pages)
    return pl.pallas_call(
        functools.partial(_kernel, planes=new.shape[2], page_size=page_size),
        name="paged_write",
        out_shape=pltpu.HBM(pages.shape, pages.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), hbm, hbm],
        out_specs=hbm,
        input_output_aliases={2: 0},
        scratch_shapes=[pltpu.VMEM(new.shape[1:], pages.dtype)] * (2 * RING) + [pltpu.SemaphoreType.DMA((RING,))] * 2,
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
    )(tiles.scalars, new, pages)


def gather_new(tiles: Tiles, k: Array, v: Array, is_stacked: bool, tile_rows: int) -> Array:
    """The new keys and values of each tile, `[C, K, planes, rows, L]`."""
    token = tiles.token[:, None] + jnp.arange(tile_rows, dtype=jnp.int32)[None, :]
    token = jnp.clip(token, 0, k.shape[0] - 1)
    if is_stacked:
        return jnp.stack([x[token].swapaxes(1, 2) for x in (k, v)], axis=2)
    return jnp.concatenate([k, v], axis=-1)[token].swapaxes(1, 2)[:, :, None]
