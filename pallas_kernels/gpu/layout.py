"""Shared memory: how tiles get into it, how they lie there for the tensor cores, and the ring they pass through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

ACC = plgpu.WGMMAAccumulatorRef
ROWS = 64  # of what a warpgroup takes at a time
LANES = 64  # likewise, and those of a tile: 128 bytes of bfloat16
WARPS = 4  # of a warpgroup


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for tiles of 8 rows and 64 lanes, swizzled against bank conflicts."""
    row_bytes = LANES * jnp.dtype(dtype).itemsize
    transforms = (
        plgpu.TilingTransform((8, LANES)),  # pyright: ignore[reportAbstractUsage]  abstract to pyright only
        plgpu.SwizzleTransform(row_bytes),  # pyright: ignore[reportAbstractUsage]  abstract to pyright only
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def parts(shape: tuple[int, ...]) -> list[tuple[Any, Any]]:
    """The rows and lanes of a tile in pieces that take few registers."""
    return [
        (pl.ds(row, ROWS), pl.ds(lane, LANES)) for row in range(0, shape[0], ROWS) for lane in range(0, shape[1], LANES)
    ]


def clear(tile: Any, exists: Callable[[Any], Any]) -> None:
    """Zeros the rows of a tile of values that hold no token: a weight of 0 would not silence a NaN."""
    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, LANES), 0, layout=plgpu.Layout.WGMMA)
    for rows, lanes in parts(tile.shape):
        part = tile.at[rows, lanes]
        x = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(exists(row + rows.start), x, jnp.zeros_like(x))
    plgpu.commit_smem()


def spread(copy: Callable[..., None], tasks: list[tuple]) -> None:
    """Issues `copy(*task)` for every task: the four warps by turns, or together where there is too little for all.

    A copy that they issue together takes longer, for they meet before each.
    """

    def issue(warp):
        for mine in range(WARPS):

            @pl.when(warp == mine)
            def _(mine=mine):
                for task in tasks[mine::WARPS]:
                    copy(*task)

    if len(tasks) < WARPS:
        for task in tasks:
            copy(*task)
    else:
        plgpu.warp_map(issue)


def drain(free: Any, num_slots: int, num_used: Any) -> None:
    """Waits until every slot of a ring is free again: a thread that waits on a barrier is to see all its phases."""

    @pl.loop(0, jnp.minimum(num_slots, num_used))
    def _(slot):
        plgpu.barrier_wait(free.at[slot])
