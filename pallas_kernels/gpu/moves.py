"""Writing new tokens to their pages and copying whole pages, in place, by the copy engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import NULL_PAGE, Pages, is_mapped, is_stacked, quantise, token_places, token_slots

COPY_BYTES = 64 * 1024  # of a page that one block moves at a time
LONGEST_COPY = 256  # rows of one copy: a limit of the copy engine


def write_pages(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
) -> Pages:
    """As `pallas_kernels.write_pages`: one block a token, one copy for its keys and one for its values.

    Where a page's rows hold keys and values side by side, one copy for both.
    """
    places = token_places(lengths, query_starts, k.shape[0])
    page, slot = token_slots(pages, page_table, places)
    scales = []
    if pages.scales is not None:
        (k, k_scale), (v, v_scale) = (quantise(x, pages.dtype) for x in (k, v))
        scales = [jnp.stack([k_scale, v_scale])]  # [2, T, K]
    num_tokens, num_heads, _ = k.shape
    page_size = pages.page_size
    tokens = jnp.stack([k, v]) if is_stacked(pages) else jnp.concatenate([k, v], axis=-1)[None]  # [parts, T, K, lanes]
    parts = tokens.shape[0]

    def kernel(tokens_ref, page_ref, slot_ref, *refs):
        new_scales_ref = refs[0] if scales else None
        data_ref, *refs = refs[len(scales) :]
        scales_ref = refs[0] if scales else None
        smem, bar = refs[len(scales) :]
        token = lax.axis_index("token")
        page, slot = page_ref[token], slot_ref[token]

        @pl.when(page != NULL_PAGE)
        def _():
            for part in range(parts):
                plgpu.copy_gmem_to_smem(tokens_ref.at[part, token], smem.at[part], bar)
            plgpu.barrier_wait(bar)
            for part in range(parts):
                plgpu.copy_smem_to_gmem(smem.at[part], data_ref.at[page, :, part * page_size + slot])
            if scales_ref is not None and new_scales_ref is not None:
                for part in range(2):
                    for head in range(num_heads):
                        scales_ref[page, head, part * page_size + slot] = new_scales_ref[part, token, head]
            plgpu.wait_smem_to_gmem(0)

    data_ref = jax.new_ref(pages.data)
    scales_refs = [] if pages.scales is None else [jax.new_ref(pages.scales)]
    plgpu.kernel(
        kernel,
        grid=(num_tokens,),
        grid_names=("token",),
        scratch_types=[
            plgpu.SMEM((parts, num_heads, tokens.shape[3]), pages.data.dtype),
            plgpu.Barrier(num_arrivals=parts),
        ],
        kernel_name="write_pages",
    )(tokens.astype(pages.data.dtype), page, slot, *scales, data_ref, *scales_refs)
    return dataclasses.replace(
        pages, data=jax.freeze(data_ref), scales=jax.freeze(scales_refs[0]) if scales_refs else None
    )


def copy_pages(pages: Pages, source: Int32[Array, " C"], target: Int32[Array, " C"]) -> Pages:
    """As `pallas_kernels.copy_pages`: the sources are gathered first, so that every read precedes every write."""
    both = is_mapped(source, pages) & is_mapped(target, pages)
    source, target = jnp.where(both, source, NULL_PAGE), jnp.where(both, target, NULL_PAGE)
    gathered = gather(pages.data, source)
    data_ref = jax.new_ref(pages.data)
    move_pages(gathered, data_ref, target, is_gather=False)
    scales = pages.scales
    if scales is not None:
        beyond = jnp.where(both, target, pages.num_pages)
        scales = scales.at[beyond].set(scales[source], mode="drop")
    return dataclasses.replace(pages, data=jax.freeze(data_ref), scales=scales)


def gather(data: Array, ids: Int32[Array, " C"]) -> Array:
    """The pages `data[ids]`; those of the null page are not read and hold anything."""
    return move_pages(data, None, ids, is_gather=True)


def move_pages(source: Array, target: Any, ids: Int32[Array, " C"], *, is_gather: bool) -> Any:
    """Copies `source[ids[i]]` to a new `[i]`, or `source[i]` to `target[ids[i]]`, except for the null page."""
    num_rows, lanes = source.shape[2:]
    rows = num_rows
    while rows > LONGEST_COPY or rows * lanes * source.dtype.itemsize > COPY_BYTES:
        rows = next(divisor for divisor in range(rows - 1, 0, -1) if num_rows % divisor == 0)
    result = jax.ShapeDtypeStruct((ids.size, *source.shape[1:]), source.dtype)

    def kernel(source_ref, ids_ref, target_ref, smem, bar):
        pair, head = lax.axis_index("pair"), lax.axis_index("head")
        here = pl.ds(lax.axis_index("part") * rows, rows)
        page = ids_ref[pair]
        first, last = (page, pair) if is_gather else (pair, page)

        @pl.when(page != NULL_PAGE)
        def _():
            plgpu.copy_gmem_to_smem(source_ref.at[first, head, here], smem, bar)
            plgpu.barrier_wait(bar)
            plgpu.copy_smem_to_gmem(smem, target_ref.at[last, head, here])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=result if is_gather else (),
        grid=(ids.size, source.shape[1], num_rows // rows),
        grid_names=("pair", "head", "part"),
        scratch_types=[plgpu.SMEM((rows, lanes), source.dtype), plgpu.Barrier()],
        kernel_name="gather_pages" if is_gather else "scatter_pages",
    )(source, ids, *([] if is_gather else [target]))


def refusal(pages: Pages, **arguments: Any) -> str | None:
    """Why these kernels cannot move such pages, or None."""
    del arguments
    if pages.head_dim not in (64, 128, 256):
        return f"the GPU kernels take head sizes 64, 128 and 256, got {pages.head_dim}."
    return None
