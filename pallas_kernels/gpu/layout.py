"""How tiles lie in shared memory so that the copy engine and the tensor cores agree on them."""

from __future__ import annotations

from typing import Any

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
