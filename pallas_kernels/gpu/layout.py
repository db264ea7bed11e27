"""How tiles lie in shared memory so that the copy engine and the tensor cores agree on them."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

ACC = plgpu.WGMMAAccumulatorRef


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for a tensor core operand: rows of 128 bytes in tiles of 8, swizzled against bank conflicts."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    transforms = (
        plgpu.TilingTransform((8, lanes)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)
