"""Handles: a claim on the pages of some tokens, independent of any row."""

import dataclasses

import jax
from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageHandle:
    """The pages of a sequence's first tokens, held until the handle is dropped.

    An immutable value, which shares its pages with the row that it came from and with all rows that attach it: nothing
    is copied, and whoever appends to its last page gets a copy of that page. `PageTable.publish` makes it and adds one
    reference to each of its pages, `attach` makes empty rows share them any number of times, `drop` gives them up,
    exactly once.

    Args:
        pages: a table row; null outside the columns `first_column` to `ceil(num_tokens / S) - 1`.
        num_tokens: tokens that the pages hold.
        first_column: above 0 if the first pages are missing, as where a window has passed them.
        epoch: of the table that made it.
        serial: different for every handle of an epoch.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([20, 0]))
        >>> tables, handles = tables.publish(row=0, num_tokens=20)  # a tuple: one for each group of layers
        >>> tables = tables.release(jnp.array([True, False]))  # the row has ended, its pages stay
        >>> tables, attached = tables.attach(1, handles)
        >>> handles[0].pages.tolist(), tables.lengths.tolist()
        ([1, 2, 0, 0], [0, 20])
        >>> tables = tables.drop(handles)
    """

    pages: Int32[Array, " M"]
    num_tokens: Int32[Array, ""]
    first_column: Int32[Array, ""]
    epoch: Int32[Array, ""]
    serial: Int32[Array, ""]
