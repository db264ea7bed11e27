"""The contents of pages that leave the pool and come back: in all layers of a group, and as bytes on the host."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from paged_jax.cache.config import QUANTISED, CacheConfig
from paged_jax.cache.mesh import HEADS, MODEL_AXIS, WHOLE, find_mesh, split_heads
from paged_jax.cache.pool import PagePool, layer_pages
from pallas_kernels import PageContents, Pages, export_pages, import_pages

_SPLIT = PartitionSpec(None, None, None, MODEL_AXIS)  # contents [n, L, S, K, ...]


def export_from_pool(pool: PagePool, group: int, page_ids: Int32[Array, " n"]) -> PageContents:
    """What some pages of a group hold, in all of its layers.

    Args:
        pool: the pages.
        group: of layers; static.
        page_ids: int32 `[n]`; null stands for a page of zeros.

    Returns:
        Contents `[n, L, S, K, H]`, and scales `[n, L, S, K]` where the pages are quantised.
    """
    arrays = [pool.arrays[i] for i in _arrays_of(pool, group)]
    num_layers = len(pool.groups[group].layers)

    def export(arrays: list[Pages], ids: Array) -> PageContents:
        if pool.array_per_layer:
            layers = [export_pages(pages, ids) for pages in arrays]
            return jax.tree.map(lambda *each: jnp.stack(each, axis=1), *layers)
        return jax.tree.map(
            lambda x: x.reshape(len(ids), num_layers, *x.shape[1:]),
            export_pages(arrays[0], _in_all_layers(pool, group, ids)),
        )

    num_heads = arrays[0].num_kv_heads
    return split_heads(export, find_mesh(arrays), num_heads, (HEADS, WHOLE), _SPLIT)(arrays, page_ids)


def import_to_pool(pool: PagePool, group: int, page_ids: Int32[Array, " n"], contents: PageContents) -> PagePool:
    """Put what `export_from_pool` returned into other pages of the group.

    Args:
        pool: the pages; donate them at the jit boundary, then the write is in place.
        group: of layers; static.
        page_ids: int32 `[n]`, distinct; null ones are dropped.
        contents: `[n, L, S, K, H]`, and scales.
    """
    indices = _arrays_of(pool, group)
    arrays = [pool.arrays[i] for i in indices]

    def fill(arrays: list[Pages], ids: Array, contents: PageContents) -> list[Pages]:
        if pool.array_per_layer:
            layers = [jax.tree.map(lambda x, i=i: x[:, i], contents) for i in range(len(arrays))]
            return [import_pages(pages, ids, one) for pages, one in zip(arrays, layers, strict=True)]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), contents)
        return [import_pages(arrays[0], _in_all_layers(pool, group, ids), flat)]

    num_heads = arrays[0].num_kv_heads
    split = split_heads(fill, find_mesh(arrays), num_heads, (HEADS, WHOLE, _SPLIT), HEADS)
    for index, pages in zip(indices, split(arrays, page_ids, contents), strict=True):
        pool = pool.replace(index, pages)
    return pool


def _arrays_of(pool: PagePool, group: int) -> Sequence[int]:
    return pool.groups[group].layers if pool.array_per_layer else (group,)


def _in_all_layers(pool: PagePool, group: int, ids: Int32[Array, " n"]) -> Int32[Array, " m"]:
    """The numbers of pages in the array that the layers of a group share, a page's layers side by side."""
    first = jnp.arange(len(pool.groups[group].layers), dtype=jnp.int32) * pool.groups[group].num_pages
    return layer_pages(jnp.repeat(ids, len(first)), jnp.tile(first, len(ids))).reshape(-1)


@dataclasses.dataclass(frozen=True)
class PageFormat:
    """How the bytes of a page of a group are laid out on the host: keys, values, then their scales, all layers of each.

    Args:
        num_layers: L, of the group.
        page_size: S.
        num_kv_heads: K.
        head_dim: H.
        dtype: of the cache; see `CacheConfig`.
    """

    num_layers: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, config: CacheConfig) -> tuple["PageFormat", ...]:
        """Those of each group."""
        sizes = config.page_size, config.num_kv_heads, config.head_dim, config.dtype
        return tuple(cls(len(group.layers), *sizes) for group in config.groups)

    @property
    def _leaves(self) -> list[tuple[tuple[int, ...], np.dtype]]:
        shape = self.num_layers, self.page_size, self.num_kv_heads, self.head_dim
        name = "uint8" if self.dtype == "float8_e4m3fn" else self.dtype
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        scales = [(shape[:3], np.dtype(np.float32))] * 2 if self.dtype in QUANTISED else []
        return [(shape, dtype)] * 2 + scales

    @property
    def num_bytes(self) -> int:
        """Bytes of a page."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._leaves)

    def page(self, contents: PageContents, index: int) -> bytes:
        """The bytes of one page of contents that are on the host."""
        return b"".join(np.asarray(leaf[index]).tobytes() for leaf in contents if leaf is not None)

    def contents(self, pages: Sequence[bytes | memoryview], width: int) -> PageContents:
        """The contents of pages, followed by zeros up to a number of pages.

        Args:
            pages: bytes as `page` returned them, at most `width`.
            width: n.
        """
        leaves: list[Any] = [np.zeros((width, *shape), dtype) for shape, dtype in self._leaves]
        for index, page in enumerate(pages):
            start = 0
            for leaf, (shape, dtype) in zip(leaves, self._leaves, strict=True):
                count = math.prod(shape)
                leaf[index] = np.frombuffer(page, dtype, count, start).reshape(shape)
                start += count * dtype.itemsize
        return PageContents(*leaves)
