"""Writes new keys and values to their pages, in place.

Two bfloat16 rows share a 32-bit word, so a copy cannot address one token. The kernel therefore works tile by
tile: a tile that the new tokens fill is overwritten, any other is read, merged and written back. The new tokens
lie packed, at any offset from the tiles: the kernel copies the aligned window around a tile's tokens and shifts
it into place, by rows of words and then within the words.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.pages import LANES, SUBLANES, Pages, is_stacked, quantise
from pallas_kernels.tpu.memory import WORD_PART, by_rows, in_hbm, tiled_as_in_hbm

RING_BYTES = 8 << 20  # of VMEM for the tiles under way


class Tiles(NamedTuple):
    """The tiles that a step writes; each holds tokens of one sequence.

    Args:
        page: int32 `[C]`, 0: nothing to write.
        row: int32 `[C]`, the slot of the page where the tile starts.
        first, end: int32 `[C]`, the rows of the tile that are new.
        token: int32 `[C]`, the packed token that row 0 would hold; negative where no token is new so early.
        count: int32 scalar, how many there are; the others are behind them.
    """

    page: Array
    row: Array
    first: Array
    end: Array
    token: Array
    count: Array

    @property
    def scalars(self) -> Array:
        """What the kernel reads."""
        return jnp.concatenate([*self[:-1], self.count[None]])


def rows_per_copy(pages: Pages) -> int:
    """Rows of the pages that a copy moves at least."""
    return SUBLANES * 4 // pages.data.dtype.itemsize


def rows_per_tile(pages: Pages) -> int:
    """Slots of a page in a tile: what a copy moves, or the whole page whose scales lie in the same rows of lanes."""
    return pages.page_size if pages.scales is not None else rows_per_copy(pages)


def tiles_of_step(ids: Array, lengths: Array, query_starts: Array, num_tokens: int, pages: Pages) -> Tiles:
    """Lists the tiles of all sequences.

    Args:
        ids: int32 `[B, M]`, the page table, 0 where there is no page.
    """
    page_size, tile_rows = pages.page_size, rows_per_tile(pages)
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
        count=jnp.minimum(ends[-1], num_tiles),
    )


def _kernel(scalars, new_hbm, new_scales_hbm, pages_in, scales_in, pages, scales, *scratch,
            page_size: int, rows: int, ring: int, quantised: bool):  # fmt: skip
    del pages_in, scales_in  # the same memory as `pages` and `scales`
    *refs, in_sem, out_sem = scratch
    window, old, scale_window, old_scales = (refs[i * ring : (i + 1) * ring] for i in range(4))
    window, old = ([by_rows(x, 4) for x in tiles] for tiles in (window, old))
    num_tiles = scalars.shape[0] // (len(Tiles._fields) - 1)
    num_heads, planes, window_rows, lanes = window[0].shape
    tiles_per_token, tile_rows = old[0].shape[1:3]
    shares_tile = tiles_per_token < planes  # the keys and values of a page
    packed = 4 // pages.dtype.itemsize
    word_bits, aligned = 32 // packed, SUBLANES * packed
    lead = ring // 2  # tiles between a read and its merge

    def field(name, n):
        return scalars[Tiles._fields.index(name) * num_tiles + jnp.clip(n, 0, num_tiles - 1)]

    def is_real(n):
        return (n >= 0) & (n < num_tiles) & (field("page", n) > 0)

    def is_partial(n):
        return field("end", n) - field("first", n) < rows

    def in_window(n, unit):
        """Where in the packed tokens the window of a tile starts, and where in the window the tile does."""
        token = field("token", n) + front_rows(rows, unit)
        return pl.multiple_of(token & -unit, unit), token & (unit - 1)

    def in_pages(n, plane):
        start = plane * page_size + field("row", n)
        return pages.at[field("page", n), :, pl.ds(pl.multiple_of(start, aligned), tile_rows), :]

    def reads(n, slot, act):
        start, _ = in_window(n, aligned)
        copies = [(new_hbm.at[:, :, pl.ds(start, window_rows), :], window[slot])]
        olds = [(in_pages(n, e), old[slot].at[:, e]) for e in range(tiles_per_token)]
        if quantised:
            start, _ = in_window(n, LANES)
            size = scale_window[slot].shape[2]
            copies.append((new_scales_hbm.at[:, :, pl.ds(start, size)], scale_window[slot]))
            olds.append((scales.at[field("page", n)], old_scales[slot]))
        for source, target in copies:
            pl.when(is_real(n))(functools.partial(act, pltpu.make_async_copy(source, target, in_sem.at[slot])))
        for source, target in olds:
            copy = pltpu.make_async_copy(source, target, in_sem.at[slot])
            pl.when(is_real(n) & is_partial(n))(functools.partial(act, copy))

    def writes(n, slot, act):
        copies = [(old[slot].at[:, e], in_pages(n, e)) for e in range(tiles_per_token)]
        if quantised:
            copies.append((old_scales[slot], scales.at[field("page", n)]))
        for source, target in copies:
            copy = pltpu.make_async_copy(source, target, out_sem.at[slot])
            pl.when(is_real(n))(functools.partial(act, copy))

    def merge(n, slot):
        """Puts the new rows among the old."""
        row = packed * lax.broadcasted_iota(jnp.int32, (tile_rows // packed, lanes), 0)
        is_value = row >= rows  # where keys and values share a tile
        token = row - jnp.where(is_value, rows, 0)
        is_new = jnp.zeros_like(row)
        for part in range(packed):
            inside = (token + part >= field("first", n)) & (token + part < field("end", n))
            own = jnp.int32(WORD_PART[packed]) << jnp.int32(part * word_bits)
            is_new = is_new | jnp.where(inside, own, 0)
        _, shift = in_window(n, aligned)
        by_words, by_bits = lax.div(shift, packed), (shift & (packed - 1)) * word_bits
        size = window_rows // packed

        def new_rows(h, e):
            first = rows // packed if shares_tile and e else 0
            x = pltpu.bitcast(window[slot][h, e], jnp.int32)
            x = pltpu.roll(x, lax.rem(size + first - by_words, size), 0)
            if packed > 1:
                above = jnp.left_shift(jnp.left_shift(pltpu.roll(x, size - 1, 0), 31 - by_bits), 1)
                x = lax.shift_right_logical(x, jnp.full_like(x, by_bits)) | above
            return x[: tile_rows // packed]

        for h in range(num_heads):
            tiles = [new_rows(h, e) for e in range(planes)]
            if shares_tile:
                tiles = [jnp.where(is_value, tiles[1], tiles[0])]
            for e, x in enumerate(tiles):
                before = pltpu.bitcast(old[slot][h, e], jnp.int32)
                old[slot][h, e] = pltpu.bitcast(before ^ ((before ^ x) & is_new), pages.dtype)

    def merge_scales(n, slot):
        _, shift = in_window(n, LANES)
        size, width = scale_window[slot].shape[2], old_scales[slot].shape[1]
        lane = lax.broadcasted_iota(jnp.int32, (num_heads, width), 1)
        is_value = lane >= rows
        key = pltpu.roll(scale_window[slot][0], lax.rem(size - shift, size), 1)[:, :width]
        value = pltpu.roll(scale_window[slot][1], lax.rem(size + rows - shift, size), 1)[:, :width]
        at = lane - jnp.where(is_value, rows, 0)
        is_new = (at >= field("first", n)) & (at < field("end", n))
        x = jnp.where(is_value, value, key)
        old_scales[slot][...] = jnp.where(is_new, x, old_scales[slot][...])

    def start(copy):
        copy.start()

    def wait(copy):
        copy.wait()

    count = scalars[scalars.shape[0] - 1]

    def step(n, slot):
        """Reads tile n, merges and writes the one `lead` before it, and waits for what this slot wrote a lap ago."""
        writes(n - ring, slot, wait)
        reads(n, slot, start)
        ready, at = n - lead, (slot - lead) % ring
        reads(ready, at, wait)
        pl.when(is_real(ready))(functools.partial(merge, ready, at))
        if quantised:
            pl.when(is_real(ready))(functools.partial(merge_scales, ready, at))
        writes(ready, at, start)

    def lap(t, _):
        for slot in range(ring):
            n = t * ring + slot
            pl.when(n < count + ring)(functools.partial(step, n, slot))
        return 0

    lax.fori_loop(0, lax.div(count + (ring - 1), ring) + jnp.minimum(count, 1), lap, 0)


def front_rows(rows: int, unit: int) -> int:
    """Rows in front of the packed tokens, so that no tile starts before them."""
    return -(-rows // unit) * unit


def packed_tokens(x: Array, axis: int, rows: int, unit: int, window: int) -> Array:
    """Tokens with so many more around them that every window lies within."""
    behind = window + unit - x.shape[axis] % unit
    padding = [(front_rows(rows, unit), behind) if i == axis else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, padding)


def write_tiles(tiles: Tiles, k: Array, v: Array, pages: Pages) -> Pages:
    """Writes the new tokens of each tile.

    Args:
        k, v: `[T, K, H]`, packed.
    """
    rows, aligned, quantised = rows_per_tile(pages), rows_per_copy(pages), pages.scales is not None
    new_scales, scales = jnp.zeros((1, 1, LANES)), jnp.zeros((1, LANES))
    scale_window = 0
    if pages.scales is not None:
        (k, k_scale), (v, v_scale) = (quantise(x, pages.dtype) for x in (k, v))
        scales = pages.scales
        scale_window = -(-max(2 * rows, rows + LANES) // LANES) * LANES
        new_scales = packed_tokens(jnp.stack([k_scale.T, v_scale.T]), 2, rows, LANES, scale_window)
    k, v = (x.swapaxes(0, 1).astype(pages.data.dtype) for x in (k, v))
    new = jnp.stack([k, v], axis=1) if is_stacked(pages) else jnp.concatenate([k, v], axis=-1)[:, None]
    window_rows = -(-rows // aligned) * aligned + aligned
    new = packed_tokens(new, 2, rows, aligned, window_rows)
    num_heads, planes, _, lanes = new.shape
    tile, window = (num_heads, planes, rows, lanes), (num_heads, planes, window_rows, lanes)
    if rows < aligned:  # keys and values share a tile
        tile = (num_heads, 1, aligned, lanes)
    tile_bytes = num_heads * planes * (rows + window_rows) * lanes * new.dtype.itemsize
    ring = next(n for n in (16, 8, 4, 2) if n == 2 or n * tile_bytes <= RING_BYTES)
    hbm, vmem = pl.BlockSpec(memory_space=pltpu.HBM), pltpu.VMEM
    scratch = [tiled_as_in_hbm(shape, new.dtype) for shape in [window] * ring + [tile] * ring]
    scratch += [vmem((2, scales.shape[-2], scale_window) if quantised else (1, 1, LANES), jnp.float32)] * ring
    scratch += [vmem(scales.shape[-2:], jnp.float32)] * ring
    new, new_scales, data, scales = (in_hbm(x) for x in (new, new_scales, pages.data, scales))
    data, scales = pl.pallas_call(
        functools.partial(_kernel, page_size=pages.page_size, rows=rows, ring=ring, quantised=quantised),
        name="paged_write",
        out_shape=[pltpu.HBM(x.shape, x.dtype) for x in (data, scales)],
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), hbm, hbm, hbm, hbm],
        out_specs=[hbm, hbm],
        input_output_aliases={3: 0, 4: 1},
        scratch_shapes=scratch + [pltpu.SemaphoreType.DMA((ring,))] * 2,
        compiler_params=pltpu.CompilerParams(has_side_effects=True, disable_bounds_checks=True),
    )(tiles.scalars, new, new_scales, data, scales)
    return Pages(data, scales if quantised else None, pages.page_size)
