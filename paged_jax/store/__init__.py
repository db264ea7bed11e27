"""Pages of prefixes outside of the pool: in host memory, and in a store that outlives the process."""

from pathlib import Path

from paged_jax.store.folder import Store
from paged_jax.store.interface import PageStore
from paged_jax.store.objects import ObjectStore

__all__ = ["ObjectStore", "PageStore", "Store", "open_store"]


def open_store(where: str | Path) -> PageStore:
    """The store in a folder, or that of a URL, without a byte cap.

    Raises:
        ValueError: it is a file, or a URL that nobody knows, or "".
        ImportError: it is a URL, and obstore is not installed.

    Examples:
        >>> import tempfile
        >>> store = open_store(tempfile.mkdtemp())
        >>> store.contents().pages
        0
        >>> store.close()
    """
    return ObjectStore(where) if isinstance(where, str) and "://" in where else Store(where)
