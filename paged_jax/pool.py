"""The memory: the pages of every layer, allocated once."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from paged_jax.config import CacheConfig
from paged_jax.page_table import NULL_PAGE, Reservation
from paged_jax.page_tables import Reservations
from pallas_kernels import Pages, copy_pages, init_pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePool:
    """The KV pages of all layers; page p of each layer belongs to whoever owns p in the page table of its group.

    Donate the pool at the outermost jit boundary: then every write is in place and no step copies it.
    """

    layers: tuple[Pages, ...]

    @classmethod
    def create(cls, config: CacheConfig) -> "PagePool":
        """A pool of zeros."""
        num_pages = {layer: group.num_pages for group in config.groups for layer in group.layers}
        sizes = config.num_kv_heads, config.page_size, config.head_dim, config.dtype
        return cls(tuple(init_pages(num_pages[layer], *sizes) for layer in range(config.num_layers)))

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
    def copy_all(layers: tuple[Pages, ...]) -> tuple[Pages, ...]:
        source, target = reservation.copy_source, reservation.copy_target
        return tuple(copy_pages(pages, source, target) for pages in layers)

    has_copies = jnp.any(reservation.copy_target != NULL_PAGE)
    return lax.cond(has_copies, copy_all, lambda layers: layers, layers)
