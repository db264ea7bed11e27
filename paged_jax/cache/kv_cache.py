"""The cache of a batch: the pages, and the tables that say who owns them."""

import dataclasses

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.mesh import everywhere
from paged_jax.cache.page_tables import PageTables
from paged_jax.cache.pool import PagePool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The page tables, and the pool of the pages that they give to rows. Donate it at the outermost jit boundary.

    Examples:
        >>> cache, granted = KVCache.create(config).reserve(jnp.array([20, 3]))
        >>> granted.tolist(), cache.tables.lengths.tolist()
        ([True, True], [20, 3])
    """

    tables: PageTables
    pool: PagePool

    def __repr__(self) -> str:
        return f"{self.pool!r}\n{self.tables!r}"

    def _repr_html_(self) -> str:
        html = (getattr(part, "_repr_html_", lambda: "") for part in (self.pool, self.tables))
        return "".join(part() for part in html)

    @classmethod
    def create(cls, config: CacheConfig, mesh: Mesh | None = None) -> "KVCache":
        """An empty cache; with a mesh the pool is split over it, as in `PagePool.create`."""
        pool = PagePool.create(config, mesh)
        return cls(everywhere(PageTables.create(config), pool), pool)

    def reserve(
        self, new_tokens: Int32[Array, " B"], priority: Int32[Array, " B"] | None = None
    ) -> tuple["KVCache", Bool[Array, " B"]]:
        """Make room for the next tokens of every row: give up pages before windows, take new ones, copy shared ones.

        Args:
            new_tokens: tokens to append to each row.
            priority: the lowest is served first; None: in the order of the rows.

        Returns:
            The cache, and which rows were granted their tokens; see `PageTables.reserve`.
        """
        tables, reservation = self.tables.slide().reserve(new_tokens, priority)
        return KVCache(tables, self.pool.copy(reservation)), reservation.granted
