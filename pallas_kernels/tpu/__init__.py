"""Pallas Mosaic kernels for Cloud TPU; README.md here has the reasons."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, is_mapped, is_stacked
from pallas_kernels.tpu.copy import copy_arrays
from pallas_kernels.tpu.write import gather_new, rows_per_tile, tiles_of_step, write_tiles

__all__ = ["copy_pages", "write_pages"]


def write_pages(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    *,
    interpret: Any = False,
) -> Pages:
    tile_rows = rows_per_tile(pages.page_size, pages.dtype.itemsize)
    ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
    tiles = tiles_of_step(ids, lengths, query_starts, k.shape[0], pages.page_size, tile_rows)
    k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    new = gather_new(tiles, k, v, is_stacked(pages), tile_rows)
    data = write_tiles(tiles, new, pages.data, page_size=pages.page_size, interpret=interpret)
    return dataclasses.replace(pages, data=data)


def copy_pages(
    pages: Pages, source: Int32[Array, " C"], target: Int32[Array, " C"], *, interpret: Any = False
) -> Pages:
    source = jnp.where(is_mapped(source, pages), source, 0)
    target = jnp.where(is_mapped(target, pages), target, 0)
    (data,) = copy_arrays(source, target, [pages.data], interpret=interpret)
    return dataclasses.replace(pages, data=data)
