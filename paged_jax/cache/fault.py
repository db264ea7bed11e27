"""Why a page table refused something, as bits that stay set until they are cleared."""

import enum


class Fault(enum.IntFlag):
    """Why something was refused since the last `clear_fault`.

    Examples:
        Two rows of at most 64 tokens; one asks for 65.

        >>> tables, reservation = PageTables.create(config).reserve(jnp.array([65, 3]))
        >>> reservation.granted.tolist(), Fault(int(tables.fault)).name
        ([False, True], 'ROW_FULL')
    """

    OUT_OF_PAGES = 1  # reserve: fewer free pages than the rows need
    ROW_FULL = 2  # reserve: more tokens than M pages hold
    BAD_ARGUMENT = 4  # a request that makes no sense in this state: a row out of range, a child that is not empty, ...
    STALE_HANDLE = 8  # a handle from before a reset, or one whose pages have been freed
