"""Pallas Mosaic kernels for Cloud TPU; README.md here has the reasons."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import LANES, SUBLANES, Pages, init_pages, is_mapped, stored
from pallas_kernels.reference import AttentionResult
from pallas_kernels.sharing import Sharing
from pallas_kernels.tpu import attention
from pallas_kernels.tpu.blocks import V7X
from pallas_kernels.tpu.copy import copy_arrays
from pallas_kernels.tpu.write import tiles_of_step, write_tiles

__all__ = ["copy_pages", "page_advice", "paged_attention", "refusal", "write_pages"]

PAGE_SIZES = (16, 32, 64, 128)  # the last one suits every head
# Starting the copy of a page takes v7x as long as moving 7 KB. The HBM of other chips is slower, and they keep up with
# small pages.
ENOUGH_BYTES = 32 << 10


def refusal(op: str, **arguments: Any) -> str | None:
    """Why the kernels cannot run `op`, in one sentence, or None if they can."""
    pages: Pages = arguments["pages"]
    if op == "copy_pages":
        return None
    tile_rows = SUBLANES * 4 // pages.dtype.itemsize
    is_one_tile = pages.scales is not None and pages.data.shape[2] == tile_rows
    if pages.page_size % tile_rows and not is_one_tile:
        return (
            f"it does not take page size {pages.page_size}: copies move tiles of {tile_rows} rows, so a page of "
            f"{pages.dtype.name} holds a multiple of that, or, of 8 bits, is one tile of keys and values."
        )
    if pages.data.shape[3] % LANES:
        return (
            f"it does not take head size {pages.head_dim}: XLA would copy all pages, whose rows of key and value "
            f"are {pages.data.shape[3]} lanes and not a multiple of {LANES}; init_pages(is_padded=True) makes them so."
        )
    if pages.scales is not None and pages.scales.shape[2] % LANES:
        return (
            f"it does not take {pages.dtype.name} pages of {pages.page_size} tokens: XLA would copy all their "
            f"scales, {pages.scales.shape[2]} for each head and not a multiple of {LANES}; init_pages(is_padded=True) "
            "makes them so."
        )
    return None


def page_advice(num_kv_heads: int, page_size: int, head_dim: int, dtype: Any, device_kind: str) -> str | None:
    """Why pages of this size are slow on a kind of TPU, and which size is not, in one sentence; None: they are fast.

    Args:
        num_kv_heads: K of one device.

    Examples:
        >>> sizes = dict(num_kv_heads=2, page_size=16, head_dim=64, dtype="bfloat16")
        >>> page_advice(**sizes, device_kind="TPU v6 lite")
        >>> page_advice(**sizes, device_kind="TPU7x")  # doctest: +ELLIPSIS
        'page_size=16 is slow on a TPU7x: a page ... 8192 bytes, and the kernels keep up with 32768. Take page_size=64.'
    """

    def reason(size: int) -> str | None:
        pages = stored(jax.eval_shape(lambda: init_pages(1, num_kv_heads, size, head_dim, dtype, is_padded=True)))
        if refusal("paged_attention", pages=pages):
            return f"a page of {pages.dtype.name} heads of {head_dim} is no whole tile, so XLA attends, not the kernels"
        num_bytes = pages.data.size * pages.data.dtype.itemsize
        if device_kind == V7X and num_bytes < ENOUGH_BYTES and size < PAGE_SIZES[-1]:
            return (
                f"a page of {num_kv_heads} KV heads has {num_bytes} bytes, and the kernels keep up with {ENOUGH_BYTES}"
            )
        return None

    if (wrong := reason(page_size)) is None:
        return None
    better = next(size for size in PAGE_SIZES if reason(size) is None)
    return f"page_size={page_size} is slow on a {device_kind}: {wrong}. Take page_size={better}."


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    pages: Pages,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " N"] | None,
    sharing: Sharing | None,
    max_query_len: int,
    return_lse: bool,
) -> AttentionResult:
    options: dict[str, Any] = dict(scale=scale, window=window, soft_cap=soft_cap, sinks=sinks)
    if max_query_len == 1:
        decode = attention.decode if sharing is None else partial(attention.decode_shared, sharing=sharing)
        return decode(q, k, v, pages, page_table, lengths, query_starts, return_lse=return_lse, **options)
    query_lens = query_starts[1:] - query_starts[:-1]
    # Most steps only decode, and skip what is for sequences with several new tokens: two kernels and their operands.
    any_several = jnp.any(query_lens > 1)
    if k is not None and v is not None:
        # Decoding sequences append in their own pass.
        several = jnp.where(query_lens > 1, lengths, 0)
        pages = lax.cond(
            any_several, lambda pages: write_pages(pages, k, v, page_table, several, query_starts), lambda pages: pages,
            pages,
        )  # fmt: skip
    # Queries of the others go where their outputs will be: a step then holds one array of that size, not two.
    is_query = attention.is_prefilled(lengths, query_starts, q.shape[0])
    queries = jnp.where(is_query[:, None, None], q, 0)
    out, pages, lse = attention.decode_some(
        q, k, v, pages, page_table, lengths, query_starts, queries, sharing=sharing, return_lse=return_lse, **options
    )  # fmt: skip

    def prefill(out: Array, lse: Array | None):
        return attention.prefill(
            out, lse, pages, page_table, lengths, query_starts, max_query_len=max_query_len, **options
        )

    out, lse = lax.cond(any_several, prefill, lambda out, lse: (out, lse), out, lse)
    return AttentionResult(out, pages, lse)


def write_pages(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
) -> Pages:
    ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
    return write_tiles(tiles_of_step(ids, lengths, query_starts, k.shape[0], pages), k, v, pages)


def copy_pages(pages: Pages, source: Int32[Array, " C"], target: Int32[Array, " C"]) -> Pages:
    source = jnp.where(is_mapped(source, pages), source, 0)
    target = jnp.where(is_mapped(target, pages), target, 0)
    arrays = [pages.data] if pages.scales is None else [pages.data, pages.scales]
    copies = copy_arrays(source, target, arrays)
    return Pages(copies[0], None if pages.scales is None else copies[1], pages.page_size)
