"""8-bit tiles and their scales, on the way from pages to the tensor core."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.gpu.layout import LANES, parts
from pallas_kernels.pages import FP8, numbers

BYTES = plgpu.Layout.WGMMA_UPCAST_4X  # a thread holds 8 lanes side by side: one load of 8 bytes, one store of 16
LEAST_SCALES = 32  # of a copy, which moves 128 bytes at least


def widen(source: Any, target: Any) -> Any:
    """An 8-bit tile as bfloat16 in another place, which the tensor core then reads."""
    for rows, lanes in parts(target.shape):
        part = numbers(plgpu.load(source.at[rows, lanes], layout=BYTES))
        if part.dtype == FP8:
            part = part.astype(jnp.float32)  # the chip has no conversion to bfloat16
        target.at[rows, lanes][...] = part.astype(target.dtype)
    plgpu.commit_smem()
    return target


def dequantise(source: Any, target: Any, scales: Any) -> None:
    """An 8-bit tile of 64 tokens times their scales `[tokens]` as bfloat16 in another place; 0 where the scale is.

    The caller commits the shared memory.
    """
    scales = lax.broadcast_in_dim(scales, (target.shape[0], LANES), [0])

    @pl.loop(0, target.shape[1] // LANES)  # not unrolled, for the sake of registers
    def _(i):
        lanes = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        part = numbers(plgpu.load(source.at[:, lanes], layout=BYTES)).astype(jnp.float32)
        target.at[:, lanes][...] = jnp.where(scales > 0, part * scales, 0.0).astype(target.dtype)  # a byte may be NaN


def view_scales(scales: Float[Array, "P K R"]) -> Float[Array, "P C W"]:
    """The scales in runs that one copy brings: those of a page's head, or of two heads where a page has 8 tokens."""
    num_pages, _, page_scales = scales.shape
    return scales.reshape(num_pages, -1, max(page_scales, LEAST_SCALES))


def scale_buffer(page_size: int, tokens: int) -> tuple[int, int]:
    """The shape of the shared memory that takes a tile's scales."""
    copy_tokens = min(page_size, tokens)
    run = max(2 * copy_tokens, LEAST_SCALES)
    return run // copy_tokens, tokens + run - copy_tokens


def load_scales(source: Any, target: Any, bar: Any, page_size: int, pages: list, head: Any, first_slot: Any) -> None:
    """Copies the scales of a tile's pages to a `scale_buffer`, from where `read_scales` takes them.

    A page's scales, S of its keys and S of its values, come in one copy: S alone may be less than the 128 bytes that
    a copy moves at least. Pages take turns between the buffer's rows and stand S places apart. Then the scales of keys
    stand at their tokens, each page's in its row, and those of values S places behind.
    """
    run = source.shape[2]
    if run <= target.shape[1]:
        for j, page in enumerate(pages):
            place = target.at[j % target.shape[0], pl.ds(j * page_size, run)]
            plgpu.copy_gmem_to_smem(source.at[page, lax.div(head * (2 * page_size), jnp.int32(run))], place, bar)
    else:  # a page of several tiles
        tokens = target.shape[1] // 2
        for part in range(2):
            here = pl.ds(part * page_size + first_slot, tokens)
            plgpu.copy_gmem_to_smem(source.at[pages[0], head, here], target.at[0, pl.ds(part * tokens, tokens)], bar)


def read_scales(source: Any, part: int, page_size: int, tokens: int, head: Any) -> Any:
    """The scales of a tile's keys (part 0) or values (part 1), `[tokens]`."""
    rows = plgpu.Layout.WGMMA.reduce(1)
    num_rows, step = source.shape[0], min(page_size, tokens)
    first = part * step
    if 2 * page_size < LEAST_SCALES:
        first += lax.rem(head * (2 * page_size), jnp.int32(LEAST_SCALES))
    token = plgpu.broadcasted_iota(jnp.int32, (tokens,), 0, layout=rows)
    scales = None
    for row in range(num_rows):
        mine = plgpu.load(source.at[row, pl.ds(first, tokens)], layout=rows, optimized=False)
        scales = mine if scales is None else jnp.where((token // step) % num_rows == row, mine, scales)
    return scales
