"""Handles: they keep the pages of some tokens, whatever becomes of the row that computed them."""

import dataclasses

import jax
from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageHandle:
    """The pages of a sequence's first tokens, held until the handle is dropped.

    `PageTables.publish` makes handles and adds a reference to each of their pages; `attach` makes an empty row share
    those pages, as often as you like; `drop` gives them up, which must be done exactly once. Nothing is copied: the
    row that was published, the handle and all rows that attach it share the same pages. Whoever appends to a partly
    filled last page gets a copy of that page.

    Args:
        pages: page ids, as in a row of the table; null outside the columns from `first_column` on that hold tokens.
        num_tokens: how many tokens the pages hold.
        first_column: the first column with a page; above 0 where a window has passed the pages before it.
        epoch: of the table that made the handle; `reset` begins a new one, in which the handle is stale.
        serial: a number that no other handle of this epoch has.

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
