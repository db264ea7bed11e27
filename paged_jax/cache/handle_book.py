"""The host's account of the handles that are out."""

import jax
import numpy as np

from paged_jax.cache.handles import PageHandle
from paged_jax.cache.page_table import PageTable

_publish = jax.jit(PageTable.publish)
_attach = jax.jit(PageTable.attach)
_drop = jax.jit(PageTable.drop)


class HandleBook:
    """Publishes, attaches and drops handles, and raises where the transitions of a table only note a fault.

    Inside jit a handle is a value and nobody can tell that it was dropped twice while others still own its pages. The
    book can: use one for each table, for all its handles. Its methods wait for the device; tables passed in stay valid.

    Args:
        weights: names the weights that compute the pages; see `renew`.
    """

    def __init__(self, weights: str = ""):
        self._weights = weights
        self._out: dict[tuple[int, int], str] = {}  # (epoch, serial) -> the weights that computed its pages

    @property
    def num_handles(self) -> int:
        """Handles that were published and not dropped."""
        return len(self._out)

    def publish(self, table: PageTable, row: int, num_tokens: int) -> tuple[PageTable, PageHandle]:
        """A handle to the first tokens of a row.

        Raises:
            ValueError: no such row, or it does not hold these tokens.
        """
        if not 0 <= row < table.num_rows:
            raise ValueError(f"row must lie in 0..{table.num_rows - 1}, got {row}")
        length, first = int(table.lengths[row]), int(table.first_column[row]) * table.page_size
        if not first <= num_tokens <= length:
            raise ValueError(
                f"num_tokens={num_tokens} of row {row}: it holds tokens up to {length} and can be cut from {first} on"
            )
        table, handle = _publish(table, np.int32(row), np.int32(num_tokens))
        self._out[self._key(handle)] = self._weights
        return table, handle

    def attach(self, table: PageTable, row: int, handle: PageHandle) -> PageTable:
        """Make an empty row share the tokens of a handle.

        Raises:
            ValueError: the handle is stale or dropped, its weights are not the present ones, or the row is not empty.
        """
        weights = self._out[self._check(table, handle)]
        if weights != self._weights:
            raise ValueError(
                f"this handle's pages were computed by weights {weights!r}, the present ones are {self._weights!r}: "
                "drop it and publish again"
            )
        attached, ok = _attach(table, np.int32(row), handle)
        if not ok:
            raise ValueError(f"cannot attach a handle to row {row}: there is no such row, or it is not empty")
        return attached

    def drop(self, table: PageTable, handle: PageHandle) -> PageTable:
        """Give up a handle.

        Raises:
            ValueError: the handle is stale, or was dropped before.
        """
        del self._out[self._check(table, handle)]
        return _drop(table, handle)

    def renew(self, weights: str) -> None:
        """The weights changed: handles from before can be dropped, but not attached."""
        self._weights = weights

    def _key(self, handle: PageHandle) -> tuple[int, int]:
        return int(handle.epoch), int(handle.serial)

    def _check(self, table: PageTable, handle: PageHandle) -> tuple[int, int]:
        key, epoch = self._key(handle), int(table.epoch)
        if key[0] != epoch:
            raise ValueError(f"this handle is of epoch {key[0]}, the table of epoch {epoch}: a reset freed its pages")
        if key not in self._out:
            raise ValueError(
                f"handle {key[1]} of epoch {epoch} is not out: it was dropped before (each is dropped exactly once), "
                "or this book did not publish it"
            )
        return key
