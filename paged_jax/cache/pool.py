"""The memory: the pages of every layer, allocated once."""

import dataclasses
import os
import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from paged_jax.cache.config import CacheConfig, LayerGroup
from paged_jax.cache.mesh import HEADS, MODEL_AXIS, WHOLE, find_mesh, model_mesh, split_heads
from paged_jax.cache.page_table import NULL_PAGE, Reservation
from paged_jax.cache.page_tables import Reservations
from pallas_kernels import Pages, copy_pages, init_pages
from pallas_kernels.platform import target_device_kind, target_platform

PACKAGE = os.path.dirname(os.path.dirname(__file__))


class LayerPlace(NamedTuple):
    """Where the pages of a layer lie: in the array of its group, at its place among the layers of the group.

    The group must be static; the index may be traced, so that layers can run in a loop. `PagePool.place` makes it.

    Examples:
        The layers of a model that has a window in every other layer:

        >>> mixed = dataclasses.replace(config, num_layers=4, windows=(16, None, 16, None))
        >>> [PagePool.create(mixed).place(layer) for layer in range(4)]
        [LayerPlace(group=1, index=0), LayerPlace(group=0, index=0),
         LayerPlace(group=1, index=1), LayerPlace(group=0, index=1)]
    """

    group: int
    index: int | Array


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["groups", "array_per_layer"])
@dataclasses.dataclass(frozen=True)
class PagePool:
    """The KV pages of all layers. Page p of each layer belongs to whoever owns p in the page table of its group.

    A group is all layers with the same window. Its layers lie one after the other in one array of L * P pages: page p
    of its layer i is page i * P + p there. So layers can run in a loop, and one operation copies a page for all of
    them. With `CacheConfig.array_per_layer`, each layer has an array of P pages instead.

    Donate the pool at the outermost jit boundary: then every write is in place and no step copies it.

    Args:
        arrays: the pages, one array for each group of layers, or one for each layer.
        groups: the groups of layers; static.
        array_per_layer: whether each layer has an array of its own; static.

    Examples:
        >>> pool = PagePool.create(config)
        >>> pool.num_layers, pool.num_bytes, pool.arrays[0].num_pages
        (1, 4608, 9)
    """

    arrays: tuple[Pages, ...]
    groups: tuple[LayerGroup, ...]
    array_per_layer: bool = False

    @classmethod
    def create(cls, config: CacheConfig, mesh: Mesh | None = None) -> "PagePool":
        """A pool of zeros.

        Args:
            config: sizes of the cache.
            mesh: devices with an axis "model", over which the KV heads are split: each device holds the pages of its
                own heads. Along other axes the pages are replicated. None: the default device holds all.

        Raises:
            ValueError: the mesh has no such axis, or K does not divide by it.

        Warns:
            UserWarning: on a TPU, pages of this size are slow; it names a size that is not.
        """
        if config.array_per_layer:
            num_pages = {layer: group.num_pages for group in config.groups for layer in group.layers}
            pages_per_array = [num_pages[layer] for layer in range(config.num_layers)]
        else:
            pages_per_array = [len(group.layers) * group.num_pages for group in config.groups]

        def make(num_kv_heads: int) -> tuple[Pages, ...]:
            sizes = num_kv_heads, config.page_size, config.head_dim, config.dtype
            return tuple(init_pages(num_pages, *sizes) for num_pages in pages_per_array)

        if mesh is None:
            _advise(config, config.num_kv_heads)
            return cls(make(config.num_kv_heads), config.groups, config.array_per_layer)
        mesh = model_mesh(mesh)
        num_heads = config.num_kv_heads // mesh.shape[MODEL_AXIS]
        _advise(config, num_heads)
        make_split = split_heads(lambda: make(num_heads), mesh, config.num_kv_heads, (), HEADS)
        return cls(jax.jit(make_split)(), config.groups, config.array_per_layer)

    def __repr__(self) -> str:
        from paged_jax.cache import show  # which knows pools

        return show.pool_text(self)

    def _repr_html_(self) -> str:
        from paged_jax.cache import show

        return show.pool_html(self)

    @property
    def num_layers(self) -> int:
        """L."""
        return sum(len(group.layers) for group in self.groups)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory, scales included."""
        return sum(pages.num_bytes for pages in self.arrays)

    def place(self, layer: int) -> LayerPlace:
        """Where a layer's pages lie.

        Raises:
            ValueError: there is no such layer.
        """
        for group, layers in enumerate(group.layers for group in self.groups):
            if layer in layers:
                return LayerPlace(group, layers.index(layer))
        raise ValueError(f"there is no layer {layer}: this pool has pages for the layers 0 to {self.num_layers - 1}")

    def locate(self, place: LayerPlace) -> tuple[int, int | Array]:
        """The array that holds a layer's pages, and the number of its page 0 there."""
        if not self.array_per_layer:
            return place.group, place.index * self.groups[place.group].num_pages
        return self.groups[place.group].layers[int(place.index)], 0

    def copy(self, reservation: Reservations) -> "PagePool":
        """Make the copies that `reserve` asked for (copy-on-write), in every layer.

        Do this before anything else is written to the pool: a row that was granted a copy owns the target from now on,
        and the owners of the source may write to it in this very step. All sources are read before any target is
        written.
        """
        arrays = list(self.arrays)
        for group, layers in enumerate(group.layers for group in self.groups):
            if self.array_per_layer:
                indices, num_layers = layers, 1
            else:
                indices, num_layers = (group,), len(layers)
            copied = _copy(tuple(arrays[i] for i in indices), reservation.groups[group], num_layers)
            for i, pages in zip(indices, copied, strict=True):
                arrays[i] = pages
        return dataclasses.replace(self, arrays=tuple(arrays))

    def replace(self, array: int, pages: Pages) -> "PagePool":
        """The pool with other pages in one of its arrays."""
        arrays = list(self.arrays)
        arrays[array] = pages
        return dataclasses.replace(self, arrays=tuple(arrays))


def _advise(config: CacheConfig, num_kv_heads: int) -> None:
    """Warns of pages that are slow on the device that the pool is made for."""
    if target_platform() == "tpu":
        from pallas_kernels.tpu import page_advice  # with Pallas, which other platforms need not import

        advice = page_advice(num_kv_heads, config.page_size, config.head_dim, config.dtype, target_device_kind())
        if advice is not None:
            warnings.warn(advice, skip_file_prefixes=(PACKAGE,))


def layer_pages(page_ids: Int32[Array, "*n"], first_page: int | Array) -> Int32[Array, "*n"]:
    """The numbers of a layer's pages in the array that its group shares; the null page stays itself."""
    if isinstance(first_page, int) and first_page == 0:
        return page_ids
    return jnp.where(page_ids > NULL_PAGE, page_ids + jnp.asarray(first_page, jnp.int32), NULL_PAGE)


def _copy(arrays: tuple[Pages, ...], reservation: Reservation, num_layers: int) -> tuple[Pages, ...]:
    """The copies of one group, in arrays that hold the pages of `num_layers` layers each."""

    def copy_all(arrays, source, target):
        # Layer by layer, so that what is read before it is written is never more than one layer's pages.
        def copy_layer(layer, arrays):
            first = layer * (arrays[0].num_pages // num_layers)
            return tuple(copy_pages(p, layer_pages(source, first), layer_pages(target, first)) for p in arrays)

        return copy_layer(0, arrays) if num_layers == 1 else lax.fori_loop(0, num_layers, copy_layer, arrays)

    source, target = reservation.copy_source, reservation.copy_target
    copy_split = split_heads(copy_all, find_mesh(arrays), arrays[0].num_kv_heads, (HEADS, WHOLE, WHOLE), HEADS)
    return lax.cond(
        jnp.any(target != NULL_PAGE), lambda arrays: copy_split(arrays, source, target), lambda arrays: arrays, arrays
    )
