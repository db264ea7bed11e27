"""Pages of prefixes outside of the pool: in host memory, and in a folder that outlives the process."""

from paged_jax.store.folder import Store

__all__ = ["Store"]
