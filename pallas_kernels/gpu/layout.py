"""Shared memory: how tiles lie in it for the copy engine and the tensor cores, and the ring they pass through."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

ACC = plgpu.WGMMAAccumulatorRef


LANES = 64  # of a tile: 128 bytes of bfloat16


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for tiles of 8 rows and 64 lanes, swizzled against bank conflicts."""
    transforms = (
        plgpu.TilingTransform((8, LANES)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(LANES * jnp.dtype(dtype).itemsize),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def drain(free: Any, num_slots: int, num_used: Any) -> None:
    """Waits until every slot of a ring is free again: a thread that waits on a barrier is to see all its phases."""

    @pl.loop(0, jnp.minimum(num_slots, num_used))
    def _(slot):
        plgpu.barrier_wait(free.at[slot])
