"""Plans as pure functions: who computes how many tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hash_decoder as decoder
from paged_jax.decoding.plan import first_come_first_served
from paged_jax.decoding.rows import NO_ROW, DecodeState

B, S = 4, decoder.PAGE_SIZE
WINDOWS = (None, 6)  # a group of layers that sees everything, and one with a window


@functools.cache
def empty() -> DecodeState:
    return DecodeState.create(decoder.config(1 + 60, B, 16, WINDOWS), 65, (16,))


plan_jit = jax.jit(first_come_first_served, static_argnums=1)
reserve_jit = jax.jit(lambda tables, lengths: tables.reserve(lengths)[0].slide())


def plan(
    known,
    cached,
    budget: int,
    *,
    age: Any = range(B),
    active: Any = True,
    source: Any = NO_ROW,
    free=60,
    window_free=60,
):
    """The tokens of rows that know and cache so many, where so many pages of both groups are free."""

    def each(values) -> np.ndarray:
        return np.broadcast_to(np.array(values), B)

    state = empty()
    tables = reserve_jit(state.cache.tables, each(cached).astype(np.int32))
    num_free = [jnp.int32(free), jnp.int32(window_free)]
    groups = (dataclasses.replace(t, num_free=n) for t, n in zip(tables.groups, num_free, strict=True))
    tables = dataclasses.replace(tables, groups=tuple(groups))
    known, age, source = (jnp.array(each(x), jnp.int32) for x in (known, list(age), source))
    rows = dataclasses.replace(state.rows, num_known=known, age=age, active=jnp.array(each(active)), source=source)
    state = state.with_tables(tables, rows=rows)
    return plan_jit(state, budget).tolist()


def test_decoding_rows_compute_their_token_and_the_oldest_others_get_the_rest():
    rows: dict[str, Any] = {"known": [30, 9, 20, 5], "cached": [0, 8, 0, 4], "age": [7, 9, 3, 1]}
    assert plan(**rows, budget=8) == [0, 1, 6, 1]
    assert plan(**rows, budget=60) == [30, 1, 20, 1]


def test_rows_that_are_not_active_or_wait_for_a_prompt_get_nothing():
    assert plan(9, [8, 0, 0, 0], 60, active=[False, True, True, True], source=[-1, -1, 1, -1]) == [0, 9, 0, 9]
    assert plan(9, 0, 60, active=False) == [0, 0, 0, 0]


def test_nobody_gets_anything_where_all_have_caught_up():
    assert plan([4, 4, 9, 9], [4, 4, 9, 9], 8) == [0, 0, 0, 0]


def test_a_budget_of_one_token_a_row_still_advances_the_oldest():
    assert plan([30, 9, 9, 9], [0, 8, 8, 8], 4) == [1, 1, 1, 1]


def test_rows_that_do_not_fit_wait_and_no_younger_row_overtakes():
    assert plan([24, 20, 20, 9], [0, 0, 0, 8], 60, free=12) == [24, 20, 0, 1], "11 pages, and one for who decodes"
    assert plan([24, 20, 20, 9], [0, 0, 0, 8], 60, free=11) == [24, 0, 0, 1]
    assert plan([24, 24, 4, 9], [0, 0, 0, 8], 60, free=11) == [24, 0, 0, 1]


def test_the_oldest_of_all_goes_on_though_it_does_not_fit():
    rows: dict[str, Any] = {"known": [30, 20, 20, 20], "cached": [0, 19, 16, 19]}
    assert plan(**rows, budget=8, free=0) == [6, 1, 0, 1]
    assert plan(**rows, budget=8, free=0, age=[2, 0, 1, 3]) == [0, 1, 0, 1], "the oldest decodes"


def test_a_window_bounds_the_pages_that_a_row_needs():
    # A step of 8 reads 5 tokens behind and writes 8, which touch at most 4 pages, though the row knows 60 tokens.
    rows: dict[str, Any] = {"known": [4, 60, 60, 1], "cached": [0, 0, 0, 1], "budget": 8}
    assert plan(**rows, window_free=5) == [4, 4, 0, 0]
    assert plan(**rows, window_free=4) == [4, 0, 0, 0]


def test_pages_given_up_behind_a_window_are_not_needed_again():
    assert plan([60, 60, 60, 1], [40, 40, 0, 1], 60, window_free=10) == [20, 20, 0, 0], "5 pages each"


def test_any_batch_gets_at_most_the_budget_and_its_oldest_row_gets_some():
    rng = np.random.default_rng(0)
    for budget in (4, 8):
        for _ in range(30):
            known = rng.integers(1, 40, B)
            cached = np.where(rng.random(B) < 0.4, known - 1, rng.integers(0, known))
            age, active = rng.permutation(B), rng.random(B) < 0.8
            counts = np.array(plan(known, cached, budget, age=age, active=active, free=int(rng.integers(0, 20))))
            behind = np.where(active, known - cached, 0)
            assert np.all((counts >= 0) & (counts <= behind)) and counts.sum() <= budget
            assert np.all(counts[behind == 1] == 1)
            assert not np.any(active) or counts[np.argmin(np.where(active, age, 99))] > 0
