"""Handles on the host, where a handle that is dropped twice can be noticed."""

import jax
import numpy as np

from paged_jax.cache.page_tables import Handles, PageTables

_publish = jax.jit(PageTables.publish)
_attach = jax.jit(PageTables.attach)
_drop = jax.jit(PageTables.drop)
_can_cut = jax.jit(PageTables.can_cut)


class HandleBook:
    """Publishes, attaches and drops handles, and raises where the transitions of the tables only note a fault.

    Inside jit nobody can tell that a handle was dropped twice, as long as others still own its pages. The book can: it
    remembers which handles were published and not dropped. Use one book for all handles of a `PageTables`. Its methods
    wait for the device; the tables that are passed stay valid.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([20, 0]))
        >>> book = HandleBook()
        >>> tables, handles = book.publish(tables, row=0, num_tokens=20)
        >>> tables = book.drop(book.attach(tables, 1, handles), handles)
        >>> tables.lengths.tolist(), book.num_handles
        ([20, 20], 0)
    """

    def __init__(self):
        self._out: set[tuple[int, int]] = set()  # epoch and serial of the first group's handle

    @property
    def num_handles(self) -> int:
        """How many publications have not been dropped yet."""
        return len(self._out)

    def publish(self, tables: PageTables, row: int, num_tokens: int) -> tuple[PageTables, Handles]:
        """Handles to the first tokens of a row, one for each group of layers.

        Raises:
            ValueError: no such row, it does not hold these tokens, or it has given up pages that the next one sees.
        """
        if not 0 <= row < tables.num_rows:
            raise ValueError(f"row must lie in 0..{tables.num_rows - 1}, got {row}")
        length = int(tables.lengths[row])
        if not 0 <= num_tokens <= length:
            raise ValueError(f"num_tokens={num_tokens} of row {row}: it holds {length} tokens")
        if not _can_cut(tables, np.full(tables.num_rows, num_tokens, np.int32))[row]:
            raise ValueError(
                f"num_tokens={num_tokens} of row {row}: it has given up pages that the token after them sees through a "
                "window; publish them before they are given up (see PageTables.slide)"
            )
        tables, handles = _publish(tables, np.int32(row), np.int32(num_tokens))
        self._out.add(self._key(handles))
        return tables, handles

    def attach(self, tables: PageTables, row: int, handles: Handles) -> PageTables:
        """Make an empty row share the tokens of the handles of one `publish`.

        Raises:
            ValueError: the handles are stale or dropped, or the row is not empty.
        """
        self._check(tables, handles)
        attached, ok = _attach(tables, np.int32(row), handles)
        if not ok:
            raise ValueError(f"cannot attach a handle to row {row}: there is no such row, or it is not empty")
        return attached

    def drop(self, tables: PageTables, handles: Handles) -> PageTables:
        """Give up the handles of one `publish`.

        Raises:
            ValueError: they are stale, or were dropped before.
        """
        self._out.remove(self._check(tables, handles))
        return _drop(tables, handles)

    @staticmethod
    def _key(handles: Handles) -> tuple[int, int]:
        return int(handles[0].epoch), int(handles[0].serial)

    def _check(self, tables: PageTables, handles: Handles) -> tuple[int, int]:
        key, epoch = self._key(handles), int(tables.groups[0].epoch)
        if key[0] != epoch:
            raise ValueError(f"this handle is of epoch {key[0]}, the tables of epoch {epoch}: a reset freed its pages")
        if key not in self._out:
            raise ValueError(
                f"handle {key[1]} of epoch {epoch} is not out: it was dropped before (each is dropped exactly once), "
                "or this book did not publish it"
            )
        return key
