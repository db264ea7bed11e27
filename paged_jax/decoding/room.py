"""Pages for the tokens of a step; where they run short, younger rows give theirs up for older ones."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.page_table import NULL_PAGE
from paged_jax.cache.page_tables import PageTables, Reservations
from paged_jax.decoding.plan import YOUNGEST
from paged_jax.decoding.rows import DecodeState, Rows


def reserve(state: DecodeState, asked: Int32[Array, " B"]) -> tuple[DecodeState, Int32[Array, " B"]]:
    """Make room for the tokens that the rows compute next; older rows first.

    Where pages run short, rows give them up for the oldest row that is refused: first rows that have ended and only
    keep theirs, then the youngest that owns pages by itself. It keeps what it shares, since giving that up would free
    nothing, still knows all its tokens, and catches up later. For the oldest of all rows even shared pages are given
    up, so that it always advances. Nobody is asked on the host.

    Args:
        state: the batch.
        asked: tokens that each row is to compute, of those that it knows.

    Returns:
        The state, and how many tokens each row computes: all it asked for, or none.
    """
    tables, made = state.cache.tables.slide().reserve(asked, state.rows.age)
    attempt = _Attempt(tables, made, (asked > 0) & ~made.granted, jnp.zeros_like(state.rows.active), jnp.int32(0))
    search = functools.partial(_give_up_until_granted, rows=state.rows, asked=asked)
    attempt = lax.cond(jnp.any(attempt.refused), search, lambda attempt: attempt, attempt)
    counters = state.counters._replace(
        preemptions=state.counters.preemptions + jnp.sum(attempt.gave_up & state.rows.active, dtype=jnp.int32),
        recomputed_tokens=state.counters.recomputed_tokens + attempt.lost_tokens,
    )
    pool = state.cache.pool.copy(attempt.made)
    counts = jnp.where(attempt.made.granted & ~attempt.gave_up, asked, 0)
    return dataclasses.replace(state, cache=KVCache(attempt.tables, pool), counters=counters), counts


class _Attempt(NamedTuple):
    tables: PageTables
    made: Reservations
    refused: Bool[Array, " B"]
    gave_up: Bool[Array, " B"]
    lost_tokens: Int32[Array, ""]  # cached tokens of active rows that will be computed again


class _Victim(NamedTuple):
    row: Bool[Array, " B"]  # at most one is set
    kept: Int32[Array, " B"]  # tokens that each row would keep


def _give_up_until_granted(attempt: _Attempt, rows: Rows, asked: Int32[Array, " B"]) -> _Attempt:
    """Let rows give up their pages, one by one, until the oldest refused row has its own or nobody can help it."""

    def next_victim(attempt: _Attempt) -> _Victim:
        return _choose_victim(attempt, rows)

    def give_up(carry: tuple[_Attempt, _Victim]) -> tuple[_Attempt, _Victim]:
        (tables, made, refused, gave_up, lost_tokens), victim = carry
        computed = tables.lengths - jnp.where(made.granted, asked, 0)  # what was granted has not been written yet
        lost = jnp.where(victim.row & rows.active, jnp.maximum(computed - victim.kept, 0), 0)
        tables = tables.truncate(jnp.where(victim.row, victim.kept, tables.lengths))
        gave_up |= victim.row
        refused &= ~victim.row
        tables, again = tables.reserve(jnp.where(refused, asked, 0), rows.age)
        made = _merge(made, again, refused & again.granted, gave_up)
        attempt = _Attempt(
            tables, made, refused & ~again.granted, gave_up, lost_tokens + jnp.sum(lost, dtype=jnp.int32)
        )
        return attempt, next_victim(attempt)

    carry = attempt, next_victim(attempt)
    return lax.while_loop(lambda carry: jnp.any(carry[1].row), give_up, carry)[0]


def _choose_victim(attempt: _Attempt, rows: Rows) -> _Victim:
    """Who gives up pages for the oldest refused row; nobody where no row is refused, or none can help."""
    tables = attempt.tables
    oldest_refused = jnp.min(jnp.where(attempt.refused, rows.age, YOUNGEST))
    is_first = oldest_refused == jnp.min(jnp.where(rows.active & (rows.num_known > 0), rows.age, YOUNGEST))
    holds = tables.lengths > 0
    ended = ~rows.active & holds
    younger = rows.active & holds & (rows.age > oldest_refused)
    owns = younger & _owns_pages(tables)
    wanted = jnp.any(attempt.refused)
    candidates = jnp.where(jnp.any(ended), ended, jnp.where(jnp.any(owns), owns, younger & is_first)) & wanted
    youngest = jnp.max(jnp.where(candidates, rows.age, -1))
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

    0 for a row that could not go on there, because it has given up pages behind a window that its next token would see.
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
