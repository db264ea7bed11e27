"""Pages for the tokens of a step; where they run short, younger rows give theirs up for older ones."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.page_table import NULL_PAGE, Reservation
from paged_jax.cache.page_tables import PageTables, Reservations
from paged_jax.decoding.plan import OLDEST, YOUNGEST
from paged_jax.decoding.rows import NO_ROW, DecodeState, Rows


def reserve(state: DecodeState, asked: Int32[Array, " B"]) -> tuple[DecodeState, Int32[Array, " B"]]:
    """Make room for the tokens that the rows compute next; older rows first.

    Where pages run short, rows give them up for the oldest row that is refused: first rows that have ended and only
    keep theirs, then the youngest that owns pages by itself. It keeps what it shares, since giving that up would free
    nothing, still knows all its tokens, and catches up later. Refused rows that are younger than it wait for the next
    step, so they do not take those pages. For the oldest of all rows even shared pages are given up, so that it always
    advances. Nobody is asked on the host.

    Args:
        state: the batch.
        asked: tokens that each row is to compute, of those that it knows.

    Returns:
        The state, and how many tokens each row computes: all it asked for, or none.
    """
    tables = state.cache.tables.slide()
    attempt = lax.while_loop(
        lambda attempt: attempt.goes_on,
        functools.partial(_try, rows=state.rows, asked=asked),
        _Attempt.begin(tables, asked > 0),
    )
    counters = state.counters._replace(
        preemptions=state.counters.preemptions + jnp.sum(attempt.gave_up & state.rows.active, dtype=jnp.int32),
        recomputed_tokens=state.counters.recomputed_tokens + attempt.lost_tokens,
    )
    pool = state.cache.pool.copy(attempt.made)
    counts = jnp.where(attempt.made.granted, asked, 0)
    return dataclasses.replace(state, cache=KVCache(attempt.tables, pool), counters=counters), counts


class _Victim(NamedTuple):
    row: Bool[Array, " B"]  # at most one is set
    kept: Int32[Array, " B"]  # tokens that each row would keep


class _Attempt(NamedTuple):
    tables: PageTables
    made: Reservations  # what was granted so far
    refused: Bool[Array, " B"]
    gave_up: Bool[Array, " B"]
    lost_tokens: Int32[Array, ""]  # cached tokens of active rows that will be computed again
    victim: _Victim  # who gives up pages before the next attempt
    goes_on: Bool[Array, ""]

    @classmethod
    def begin(cls, tables: PageTables, asked: Bool[Array, " B"]) -> "_Attempt":
        nobody, nulls = jnp.zeros_like(asked), jnp.full(asked.shape, NULL_PAGE, jnp.int32)
        nothing = Reservations(nobody, tuple(Reservation(nobody, nulls, nulls) for _ in tables.groups))
        return cls(tables, nothing, asked, nobody, jnp.int32(0), _Victim(nobody, nulls), jnp.any(asked))


def _try(attempt: _Attempt, rows: Rows, asked: Int32[Array, " B"]) -> _Attempt:
    """One row may give up pages, then all that were refused so far ask again; and who would give up pages next."""
    attempt = lax.cond(
        jnp.any(attempt.victim.row), lambda attempt: _give_up(attempt, rows, asked), lambda attempt: attempt, attempt
    )
    tables, again = attempt.tables.reserve(jnp.where(attempt.refused, asked, 0), rows.age)
    now = attempt.refused & again.granted
    made = _merge(attempt.made, again, now, attempt.gave_up)
    attempt = attempt._replace(tables=tables, made=made, refused=attempt.refused & ~now)
    victim = lax.cond(
        jnp.any(attempt.refused),
        lambda: _choose_victim(attempt, rows),
        lambda: _Victim(jnp.zeros_like(rows.active), jnp.zeros_like(asked)),
    )
    return attempt._replace(victim=victim, goes_on=jnp.any(victim.row))


def _give_up(attempt: _Attempt, rows: Rows, asked: Int32[Array, " B"]) -> _Attempt:
    row, kept = attempt.victim
    tables = attempt.tables
    computed = tables.lengths - jnp.where(attempt.made.granted, asked, 0)  # what was granted has not been written yet
    lost = jnp.where(row & rows.active, jnp.maximum(computed - kept, 0), 0)
    waits = rows.age >= jnp.min(jnp.where(row & rows.active, rows.age, YOUNGEST))
    return attempt._replace(
        tables=tables.truncate(jnp.where(row, kept, tables.lengths)),
        refused=attempt.refused & ~row & ~waits,
        gave_up=attempt.gave_up | row,
        lost_tokens=attempt.lost_tokens + jnp.sum(lost, dtype=jnp.int32),
    )


def _choose_victim(attempt: _Attempt, rows: Rows) -> _Victim:
    """Who gives up pages for the oldest refused row; nobody if none can help."""
    tables = attempt.tables
    oldest_refused = jnp.min(jnp.where(attempt.refused, rows.age, YOUNGEST))
    takes_part = rows.active & (rows.source == NO_ROW)
    is_first = oldest_refused == jnp.min(jnp.where(takes_part, rows.age, YOUNGEST))
    holds = tables.lengths > 0
    ended = ~rows.active & holds
    younger = rows.active & holds & (rows.age > oldest_refused)
    owns = younger & _owns_pages(tables)
    candidates = jnp.where(jnp.any(ended), ended, jnp.where(jnp.any(owns), owns, younger & is_first))
    youngest = jnp.max(jnp.where(candidates, rows.age, OLDEST))
    row = jnp.arange(len(rows.age), dtype=jnp.int32)
    victim = candidates & (rows.age == youngest)
    victim &= row == jnp.argmax(victim).astype(jnp.int32)  # rows that have ended may be of one age
    return _Victim(victim, jnp.where(owns, _shared_tokens(tables), 0))


def _owns_pages(tables: PageTables) -> Bool[Array, " B"]:
    """Rows that hold a page which would be free without them."""
    found = (jnp.any((t.pages != NULL_PAGE) & (t.refcounts[t.pages] == 1), axis=1) for t in tables.groups)
    return functools.reduce(operator.or_, found)


def _shared_tokens(tables: PageTables) -> Int32[Array, " B"]:
    """The first tokens of each row that stand in pages with other owners in every group, whole pages.

    0 for a row that could not go on there, because it has given up pages before a window that its next token would see.
    """
    shared = tables.lengths
    for table in tables.groups:
        column = jnp.arange(table.pages.shape[1], dtype=jnp.int32)[None, :]
        is_own = (column >= table.first_column[:, None]) & (table.refcounts[table.pages] <= 1)
        is_own |= table.pages == NULL_PAGE
        is_own &= column >= table.first_column[:, None]
        first_own = jnp.where(jnp.any(is_own, axis=1), jnp.argmax(is_own, axis=1).astype(jnp.int32), column.shape[1])
        shared = jnp.minimum(shared, first_own * table.page_size)
    return jnp.where(tables.can_cut(shared), shared, 0)


def _merge(made: Reservations, again: Reservations, now: Bool[Array, " B"], gave_up: Bool[Array, " B"]) -> Reservations:
    """Both reservations as one: rows of the second where they were granted only now, no copies for who gave up."""

    def merge(first: Array, second: Array) -> Array:
        return jnp.where(gave_up, NULL_PAGE, jnp.where(now, second, first))

    groups = tuple(
        old._replace(
            granted=(old.granted | now) & ~gave_up,
            copy_source=merge(old.copy_source, new.copy_source),
            copy_target=merge(old.copy_target, new.copy_target),
        )
        for old, new in zip(made.groups, again.groups, strict=True)
    )
    return Reservations((made.granted | now) & ~gave_up, groups)
