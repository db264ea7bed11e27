"""The contents of whole pages, in a form that does not depend on layout, padding or platform."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Num

from pallas_kernels.pages import (
    Pages,
    gather_pages,
    is_mapped,
    is_stacked,
    put_pages,
    split_kv,
    split_scales,
)


class PageContents(NamedTuple):
    """The numbers in some pages, as `export_pages` reads them: bit for bit, float8 as its bytes (uint8).

    Args:
        keys: `[n, S, K, H]`.
        values: `[n, S, K, H]`.
        key_scales: float32 `[n, S, K]` of quantised pages, else None.
        value_scales: likewise.
    """

    keys: Num[Array, "*n S K H"]
    values: Num[Array, "*n S K H"]
    key_scales: Float[Array, "*n S K"] | None = None
    value_scales: Float[Array, "*n S K"] | None = None


def export_pages(pages: Pages, page_ids: Int32[Array, " n"]) -> PageContents:
    """What some pages hold, for `import_pages` into any pages of the same sizes and dtype, padded or not.

    Args:
        pages: one layer's pages.
        page_ids: int32 `[n]`; an id outside `1 .. P-1` stands for a page of zeros.

    Returns:
        Their numbers, and the scales of quantised ones.

    Examples:
        >>> pages = init_pages(num_pages=4, num_kv_heads=1, page_size=2, head_dim=8, dtype=jnp.float32, is_padded=False)
        >>> contents = export_pages(pages, jnp.array([1, 3]))
        >>> contents.keys.shape, contents.key_scales
        ((2, 2, 1, 8), None)
    """
    mapped = is_mapped(page_ids, pages)

    def tokens_first(x: Array) -> Array:
        mask = mapped.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.swapaxes(jnp.where(mask, x, jnp.zeros((), x.dtype)), 1, 2)

    data, scales = gather_pages(pages, jnp.where(mapped, page_ids, 0))
    keys, values = (tokens_first(x[..., : pages.head_dim]) for x in split_kv(pages, data))
    if scales is None:
        return PageContents(keys, values)
    return PageContents(keys, values, *(tokens_first(x) for x in split_scales(pages, scales)))


def import_pages(pages: Pages, page_ids: Int32[Array, " n"], contents: PageContents) -> Pages:
    """Puts what `export_pages` returned into pages.

    Args:
        pages: one layer's pages; donate them at the jit boundary, then the write is in place.
        page_ids: int32 `[n]`, the pages to fill; one with an id outside `1 .. P-1` is dropped, and none is named twice.
        contents: of n pages.

    Returns:
        The pages after that.

    Raises:
        ValueError: contents of another number of pages, of other sizes or dtypes, or with scales where these pages
            have none, or without where they have.

    Examples:
        >>> pages = init_pages(num_pages=4, num_kv_heads=1, page_size=2, head_dim=8, dtype=jnp.float32, is_padded=False)
        >>> ones = jax.tree.map(jnp.ones_like, export_pages(pages, jnp.array([1])))
        >>> pages = import_pages(pages, jnp.array([2]), ones)
        >>> export_pages(pages, jnp.array([1, 2])).keys[:, 0, 0, 0].tolist()
        [0.0, 1.0]
    """
    _check(pages, page_ids, contents)
    heads_first = [None if x is None else jnp.swapaxes(x, 1, 2) for x in contents]
    keys, values, key_scales, value_scales = heads_first
    assert keys is not None and values is not None
    padding = ((0, 0),) * 3 + ((0, pages.padding),)
    axis = 2 if is_stacked(pages) else 3
    data = jnp.concatenate([jnp.pad(keys, padding), jnp.pad(values, padding)], axis=axis)
    scales = None
    if key_scales is not None and value_scales is not None:
        scales = jnp.concatenate([key_scales, value_scales], axis=2)
        scales = jnp.pad(scales, ((0, 0), (0, 0), (0, pages.scales.shape[2] - scales.shape[2])))
    target = jnp.where(is_mapped(page_ids, pages), page_ids, pages.num_pages)  # past the end: dropped
    return put_pages(pages, target, data, scales)


def _check(pages: Pages, page_ids: Int32[Array, " n"], contents: PageContents) -> None:
    shape = page_ids.size, pages.page_size, pages.num_kv_heads, pages.head_dim
    scales = None if pages.scales is None else (shape[:3], pages.scales.dtype)
    wanted = (shape, pages.data.dtype), (shape, pages.data.dtype), scales, scales
    for name, one, expected in zip(PageContents._fields, contents, wanted, strict=True):
        got = None if one is None else (one.shape, one.dtype)
        if got != expected:
            raise ValueError(
                f"contents.{name} is {_describe(got)}, but {page_ids.size} of these pages hold {_describe(expected)}: "
                "import what was exported from pages of the same sizes and dtype"
            )


def _describe(what: tuple[tuple[int, ...], Any] | None) -> str:
    return "None" if what is None else f"{what[1]}{list(what[0])}"
