"""The invariants of a page table, which every transition keeps; checked inside jit or on the host."""

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.handles import PageHandle
from paged_jax.cache.page_table import NULL_PAGE, PageTable


class Violation(enum.IntFlag):
    """What can be wrong with a table."""

    NULL_PAGE = 1
    NEGATIVE_REFCOUNT = 2
    REFCOUNT = 4
    NUM_FREE = 8
    FREE_STACK = 16
    LENGTH = 32
    MAPPING = 64
    REPEATED_PAGE = 128
    SHARED_APPEND = 256


_SENTENCES = {
    Violation.NULL_PAGE: "the null page has another refcount than 1",
    Violation.NEGATIVE_REFCOUNT: "a page has a refcount below 0",
    Violation.REFCOUNT: "a page's refcount is not how often it stands in rows and handles",
    Violation.NUM_FREE: "num_free is not how many pages have refcount 0",
    Violation.FREE_STACK: "the free stack does not hold each free page once and nothing else",
    Violation.LENGTH: "a row's length or first column is out of range",
    Violation.MAPPING: "a row has no page inside its mapped columns, or one outside",
    Violation.REPEATED_PAGE: "a row holds a page twice",
    Violation.SHARED_APPEND: "a row appended to a page that has other owners",
}


class InvariantError(AssertionError):
    """A page table that breaks its invariants; `violations` holds which."""

    def __init__(self, message: str, violations: Violation):
        super().__init__(message)
        self.violations = violations


def find(
    table: PageTable, held: Int32[Array, " n"], appended: Int32[Array, " B"] | None = None
) -> dict[Violation, Bool[Array, " _"]]:
    """For each invariant the pages or rows that break it (one entry where it is about the whole table); jittable.

    Args:
        table: the table.
        held: pages of all handles that are out, once for each handle; null pages do not count.
        appended: tokens that the last `reserve` granted to each row; None if something else came last.
    """
    num_pages, (num_rows, max_pages) = table.num_pages, table.pages.shape
    page = jnp.arange(num_pages, dtype=jnp.int32)
    column = jnp.arange(max_pages, dtype=jnp.int32)[None, :]
    in_range = (table.pages >= 0) & (table.pages < num_pages)

    def count(ids: Array) -> Array:
        return jnp.zeros(num_pages, jnp.int32).at[jnp.where(ids < 0, num_pages, ids)].add(1, mode="drop")

    owners = count(table.pages.reshape(-1)) + count(held)
    is_free = (table.refcounts == 0) & (page != NULL_PAGE)
    on_stack = count(jnp.where(page < table.num_free, table.free_stack, num_pages))
    stop = -(-table.lengths // table.page_size)
    is_mapped = (column >= table.first_column[:, None]) & (column < stop[:, None])
    ordered = jnp.sort(table.pages, axis=1)
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NULL_PAGE)
    bad_length = (table.lengths < 0) | (table.lengths > table.max_length) | (table.first_column < 0)
    bad_length |= (table.first_column * table.page_size > table.lengths) | (
        (table.lengths == 0) & (table.first_column != 0)
    )
    new = jnp.zeros(num_rows, jnp.int32) if appended is None else appended
    is_written = is_mapped & (column >= ((table.lengths - new) // table.page_size)[:, None]) & (new > 0)[:, None]
    return {
        Violation.NULL_PAGE: table.refcounts[NULL_PAGE : NULL_PAGE + 1] != 1,
        Violation.NEGATIVE_REFCOUNT: table.refcounts < 0,
        Violation.REFCOUNT: (table.refcounts != owners) & (page != NULL_PAGE),
        Violation.NUM_FREE: (table.num_free != jnp.sum(is_free, dtype=jnp.int32))[None],
        Violation.FREE_STACK: on_stack != is_free.astype(jnp.int32),
        Violation.LENGTH: bad_length,
        Violation.MAPPING: jnp.any(is_mapped != (table.pages != NULL_PAGE), axis=1) | ~jnp.all(in_range, axis=1),
        Violation.REPEATED_PAGE: jnp.any(repeats, axis=1),
        Violation.SHARED_APPEND: jnp.any(is_written & (table.refcounts[table.pages] != 1), axis=1),
    }


def violations(
    table: PageTable, held: Int32[Array, " n"], appended: Int32[Array, " B"] | None = None
) -> Int32[Array, ""]:
    """The bits of Violation that hold, 0 for a sound table; jittable. Arguments as for `find`."""
    bits = [
        jnp.where(jnp.any(where), jnp.int32(bit), jnp.int32(0)) for bit, where in find(table, held, appended).items()
    ]
    return jnp.sum(jnp.stack(bits), dtype=jnp.int32)


_find = jax.jit(find)


def check(
    table: PageTable,
    handles: Sequence[PageHandle | np.ndarray | Array] = (),
    appended: Int32[Array, " B"] | None = None,
) -> None:
    """Check a table on the host; this waits for the device.

    Args:
        table: the table.
        handles: all that hold pages besides the rows: handles, or arrays of page ids (such as `PrefixCache.pages`).
        appended: tokens that the last `reserve` granted to each row, to check that they went to pages of their own.

    Raises:
        InvariantError: naming every invariant that does not hold and the pages or rows that break it.
    """
    ids = [np.asarray(handle.pages if isinstance(handle, PageHandle) else handle).reshape(-1) for handle in handles]
    held = np.concatenate([np.zeros(1, np.int32), *ids]).astype(np.int32)
    size = 1 << len(held).bit_length()  # a power of two: few shapes, few compilations
    held = jnp.asarray(np.pad(held, (0, size - len(held)), constant_values=NULL_PAGE))
    broken = {bit: np.flatnonzero(where) for bit, where in _find(table, held, appended).items()}
    broken = {bit: where for bit, where in broken.items() if len(where)}
    if broken:
        lines = [_SENTENCES[bit] + _where(bit, where) for bit, where in broken.items()]
        raise InvariantError("the page table is broken\n" + "\n".join(lines), Violation(sum(broken)))


def _where(bit: Violation, indices: np.ndarray) -> str:
    if bit in (Violation.NULL_PAGE, Violation.NUM_FREE):
        return ""
    kind = "rows" if bit >= Violation.LENGTH else "pages"
    shown = ", ".join(str(i) for i in indices[:8]) + (", ..." if len(indices) > 8 else "")
    return f": {kind} {shown}"
