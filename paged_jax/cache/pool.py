"""The memory: the pages of every layer, allocated once."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.mesh import HEADS, MODEL_AXIS, WHOLE, find_mesh, model_mesh, split_heads
from paged_jax.cache.page_table import NULL_PAGE, Reservation
from paged_jax.cache.page_tables import Reservations
from pallas_kernels import Pages, copy_pages, init_pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """The KV pages of all layers; page p of each layer belongs to whoever owns p in the page table of its group.

    Donate the pool at the outermost jit boundary: then every write is in place and no step copies it.
    """

    layers: tuple[Pages, ...]

    @classmethod
    def create(cls, config: CacheConfig, mesh: Mesh | None = None) -> "PagePool":
        """A pool of zeros.

        Args:
            config: sizes of the cache.
            mesh: has an axis "model", whose devices hold the pages of K / (its size) KV heads each; other axes hold
                copies. None: the default device holds all.

        Raises:
            ValueError: the mesh has no such axis, or K does not divide by it.
        """
        num_pages = {layer: group.num_pages for group in config.groups for layer in group.layers}

        def make(num_kv_heads: int) -> tuple[Pages, ...]:
            sizes = num_kv_heads, config.page_size, config.head_dim, config.dtype
            return tuple(init_pages(num_pages[layer], *sizes) for layer in range(config.num_layers))

        if mesh is None:
            return cls(make(config.num_kv_heads))
        mesh = model_mesh(mesh)
        num_heads = config.num_kv_heads // mesh.shape[MODEL_AXIS]
        return cls(jax.jit(split_heads(lambda: make(num_heads), mesh, config.num_kv_heads, (), HEADS))())

    def copy(self, reservation: Reservation | Reservations) -> "PagePool":
        """Make the copies that `reserve` asked for (copy-on-write), in every layer.

        Do this before anything else is written to the pool: a row that was granted a copy owns the target from now on,
        and the owners of the source may write to it in this very step. All sources are read before any target is
        written.
        """
        if isinstance(reservation, Reservation):
            return PagePool(_copy(self.layers, reservation))
        layers = list(self.layers)
        for group, indices in zip(reservation.groups, reservation.layers, strict=True):
            copied = _copy(tuple(layers[i] for i in indices), group)
            for i, pages in zip(indices, copied, strict=True):
                layers[i] = pages
        return PagePool(tuple(layers))

    def replace_layer(self, index: int, pages: Pages) -> "PagePool":
        """The pool with other pages for one layer."""
        layers = list(self.layers)
        layers[index] = pages
        return PagePool(tuple(layers))

    @property
    def num_pages(self) -> int:
        """P of the first layer, the null page included."""
        return self.layers[0].num_pages

    @property
    def num_bytes(self) -> int:
        """Bytes of memory, scales included."""
        return sum(pages.num_bytes for pages in self.layers)


def _copy(layers: tuple[Pages, ...], reservation: Reservation) -> tuple[Pages, ...]:
    def copy_all(layers, source, target):
        return tuple(copy_pages(pages, source, target) for pages in layers)

    source, target = reservation.copy_source, reservation.copy_target
    copy_split = split_heads(copy_all, find_mesh(layers), layers[0].num_kv_heads, (HEADS, WHOLE, WHOLE), HEADS)
    return lax.cond(
        jnp.any(target != NULL_PAGE), lambda layers: copy_split(layers, source, target), lambda layers: layers, layers
    )
