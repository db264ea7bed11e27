"""8-bit tiles and their scales, on the way from pages to the tensor core."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.gpu.layout import spread
from pallas_kernels.pages import FP8

STEP = {"int8": 128, FP8.name: 1}  # what a high part counts more than a low one; 1: the tensor core can add them up
EXPONENT = {"int8": 7, FP8.name: 8}  # of the largest number of a query: scaled, it is less than 2 to so much
BYTES = plgpu.Layout.WGMMA_UPCAST_4X  # a thread holds 8 lanes side by side: one load of 8 bytes, one store of 16
LEAST_SCALES = 32  # of a copy, which moves 128 bytes at least


def split_queries(q: Float[Array, "*n H"], dtype: Any) -> tuple[Array, Array, Float[Array, "*n"]]:
    """Queries as two vectors of 8-bit numbers, `(high * STEP + low) * scale`, and a scale.

    Keys are then multiplied as the pages hold them. Of the largest number of its vector, each is exact to 2**-14 in
    int8 and to 2**-17 in float8; to a bfloat16 that is not a small part of that number both are exact.
    """
    q = q.astype(jnp.float32)
    top = jnp.max(jnp.abs(q), axis=-1, keepdims=True)
    exponent, step = EXPONENT[jnp.dtype(dtype).name], STEP[jnp.dtype(dtype).name]
    scale = jnp.ldexp(jnp.ones_like(top), jnp.frexp(top)[1] - exponent)
    scale += jnp.sum(0 * q, axis=-1, keepdims=True)  # NaN stays NaN

    def narrow(x):
        return (jnp.clip(jnp.round(x), -127, 127) if dtype == jnp.int8 else x).astype(dtype)

    high = narrow(q / scale)
    low = narrow((q / scale - high.astype(jnp.float32)) * step)
    return high, low, scale[..., 0] / step


def sum_dtype(dtype: Any) -> Any:
    """In which the tensor core adds up products of numbers of a dtype."""
    return jnp.int32 if dtype == jnp.int8 else jnp.float32


def widen(source: Any, target: Any, rows: int, lanes: int) -> None:
    """An 8-bit tile as bfloat16 in another place, for the tensor core, in pieces of so many rows and lanes."""
    for row in range(0, target.shape[0], rows):
        for lane in range(0, target.shape[1], lanes):
            piece = pl.ds(row, rows), pl.ds(lane, lanes)
            x = plgpu.load(source.at[piece], layout=BYTES)
            if x.dtype == FP8:
                x = x.astype(jnp.float32)  # the chip has no conversion to bfloat16
            target.at[piece][...] = x.astype(target.dtype)
    plgpu.commit_smem()


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
        index = lax.div(head * (2 * page_size), jnp.int32(run))

        def copy(j, page):
            place = target.at[j % target.shape[0], pl.ds(j * page_size, run)]
            plgpu.copy_gmem_to_smem(source.at[page, index], place, bar)

        spread(copy, list(enumerate(pages)))
    else:  # a page of several tiles
        tokens = target.shape[1] // 2
        for part in range(2):
            here = pl.ds(part * page_size + first_slot, tokens)
            plgpu.copy_gmem_to_smem(source.at[pages[0], head, here], target.at[0, pl.ds(part * tokens, tokens)], bar)


def read_scales(source: Any, part: int, page_size: int, tokens: int, head: Any, layout: Any) -> Any:
    """The scales of a tile's keys (part 0) or values (part 1), `[tokens]`, in a layout."""
    num_rows, step = source.shape[0], min(page_size, tokens)
    first = part * step
    if 2 * page_size < LEAST_SCALES:
        first += lax.rem(head * (2 * page_size), jnp.int32(LEAST_SCALES))
    token = plgpu.broadcasted_iota(jnp.int32, (tokens,), 0, layout=layout)
    scales = None
    for row in range(num_rows):
        mine = plgpu.load(source.at[row, pl.ds(first, tokens)], layout=layout, optimized=False)
        scales = mine if scales is None else jnp.where((token // step) % num_rows == row, mine, scales)
    return scales
