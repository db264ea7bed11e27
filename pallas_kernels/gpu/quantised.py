"""int8 tiles and their scales, on the way from pages to the tensor core."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu.layout import LANES


def widen(source: Any, target: Any) -> Any:
    """An 8-bit tile as bfloat16 in another place, which the tensor core then reads."""
    for lane in range(0, target.shape[1], LANES):  # in parts, for the sake of registers
        lanes = pl.ds(lane, LANES)
        part = plgpu.load(source.at[:, lanes], layout=plgpu.Layout.WGMMA)
        target.at[:, lanes][...] = part.astype(target.dtype)
    plgpu.commit_smem()
    return target


def dequantise(source: Any, target: Any, scales: Any, exists: Any) -> None:
    """An int8 tile times its rows' scales `[tokens]` as bfloat16 in another place; rows that do not exist are 0.

    The caller commits the shared memory.
    """
    rows = (target.shape[0], LANES)
    scales, exists = lax.broadcast_in_dim(scales, rows, [0]), lax.broadcast_in_dim(exists, rows, [0])
    for lane in range(0, target.shape[1], LANES):
        lanes = pl.ds(lane, LANES)
        part = plgpu.load(source.at[:, lanes], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        target.at[:, lanes][...] = jnp.where(exists, part * scales, 0.0).astype(target.dtype)


def load_scales(source: Any, target: Any, bar: Any, pages: list, head: Any, first_slot: Any) -> None:
    """Copies the scales of a tile's pages to `target` `[2, tokens + S]`, from where `read_scales` takes them.

    A page's scales, S of its keys and S of its values, come in one copy: S alone may be less than the 128 bytes that
    a copy moves at least. Even pages go to one buffer and odd ones to another, S places apart: then the keys' scales
    stand at their tokens, in one of the two, and the values' S places behind.
    """
    span = target.shape[1] - target.shape[1] // (len(pages) + 1)  # tokens of the tile
    step = target.shape[1] - span
    if source.shape[2] == 2 * step:
        for j, page in enumerate(pages):
            place = target.at[j % 2, pl.ds(j * step, 2 * step)]
            plgpu.copy_gmem_to_smem(source.at[page, head], place, bar)
    else:  # a page of several tiles
        for part in range(2):
            here = pl.ds(part * (source.shape[2] // 2) + first_slot, step)
            plgpu.copy_gmem_to_smem(source.at[pages[0], head, here], target.at[0, pl.ds(part * step, step)], bar)


def read_scales(source: Any, part: int, step: int, tokens: int) -> Any:
    """The scales of a tile's keys (part 0) or values (part 1), `[tokens]`."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    even, odd = (plgpu.load(source.at[i, pl.ds(part * step, tokens)], layout=rows, optimized=False) for i in range(2))
    token = plgpu.broadcasted_iota(jnp.int32, (tokens,), 0, layout=rows)
    return jnp.where((token // step) % 2 == 0, even, odd)
