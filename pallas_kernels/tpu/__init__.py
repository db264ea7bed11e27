"""Pallas Mosaic kernels for Cloud TPU; README.md here has the reasons."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import LANES, SUBLANES, Pages, is_mapped
from pallas_kernels.reference import AttentionResult
from pallas_kernels.sharing import Sharing
from pallas_kernels.tpu import attention
from pallas_kernels.tpu.copy import copy_arrays
from pallas_kernels.tpu.write import tiles_of_step, write_tiles

__all__ = ["copy_pages", "paged_attention", "refusal", "write_pages"]


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
    if k is not None and v is not None:
        # Decoding sequences append in their own pass.
        pages = write_pages(pages, k, v, page_table, jnp.where(query_lens > 1, lengths, 0), query_starts)
    # Queries of the others go where their outputs will be: a step then holds one array of that size, not two.
    is_query = attention.is_prefilled(lengths, query_starts, q.shape[0])
    queries = jnp.where(is_query[:, None, None], q, 0)
    out, pages, lse = attention.decode_some(
        q, k, v, pages, page_table, lengths, query_starts, queries, sharing=sharing, return_lse=return_lse, **options
    )  # fmt: skip
    out, lse = attention.prefill(
        out, lse, pages, page_table, lengths, query_starts, max_query_len=max_query_len, **options
    )
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
