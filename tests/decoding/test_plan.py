"""Plans as pure functions: who computes how many tokens."""

import dataclasses

import hash_decoder as decoder
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.cache.kv_cache import KVCache
from paged_jax.decoding.plan import first_come_first_served
from paged_jax.decoding.rows import NO_ROW, DecodeState

PLAIN, HYBRID = (None, None), (None, 6)
S = decoder.PAGE_SIZE


def batch(known, cached, *, age=None, active=None, source=None, num_pages=1 + 40, windows=PLAIN, **sizes) -> DecodeState:
    """Rows that know and cache so many tokens, with pages for what they cache."""
    num_rows = len(known)
    state = DecodeState.create(decoder.config(num_pages, num_rows, 16, windows, **sizes), 65, (16,))
    tables, reservation = state.cache.tables.reserve(jnp.array(cached, jnp.int32))
    assert np.all(reservation.granted)
    rows = dataclasses.replace(
        state.rows,
        num_prompt=jnp.array(known, jnp.int32),
        num_known=jnp.array(known, jnp.int32),
        age=jnp.array(range(num_rows) if age is None else age, jnp.int32),
        active=jnp.array([True] * num_rows if active is None else active),
        source=jnp.array([NO_ROW] * num_rows if source is None else source, jnp.int32),
    )
    return dataclasses.replace(state, cache=KVCache(tables, state.cache.pool), rows=rows)


def plan(state: DecodeState, budget: int) -> list[int]:
    return first_come_first_served(state, budget).tolist()


def test_decoding_rows_compute_their_token_and_the_oldest_others_get_the_rest():
    state = batch(known=[30, 9, 20, 5], cached=[0, 8, 0, 4], age=[7, 9, 3, 1])
    assert plan(state, 8) == [0, 1, 6, 1]
    assert plan(state, 30) == [8, 1, 20, 1]
    assert plan(state, 60) == [30, 1, 20, 1]


def test_rows_that_are_not_active_or_wait_for_a_prompt_get_nothing():
    state = batch(known=[9, 9, 9, 9], cached=[8, 0, 0, 0], active=[False, True, True, True], source=[-1, -1, 1, -1])
    assert plan(state, 60) == [0, 9, 0, 9]


def test_nobody_gets_anything_where_all_have_caught_up():
    assert plan(batch(known=[4, 4], cached=[4, 4], active=[True, False]), 8) == [0, 0]


def test_a_budget_of_one_token_a_row_still_advances_the_oldest():
    state = batch(known=[30, 9, 9, 9], cached=[0, 8, 8, 8])
    assert plan(state, 4) == [1, 1, 1, 1]


def test_rows_that_do_not_fit_wait_for_the_older_ones():
    # 10 pages are free; the second needs 5, and the third would fit only without it
    state = batch(known=[24, 20, 20, 9], cached=[0, 0, 0, 8], num_pages=1 + 14)
    assert int(state.cache.tables.num_free[0]) == 12
    assert plan(state, 60) == [24, 20, 0, 1], "11 pages for the first two, one for the row that decodes"
    state = batch(known=[24, 24, 4, 9], cached=[0, 0, 0, 8], num_pages=1 + 14)
    assert plan(state, 60) == [24, 0, 0, 1], "a small young row does not overtake"


def test_the_oldest_of_all_goes_on_though_it_does_not_fit():
    state = batch(known=[30, 20, 20], cached=[0, 19, 16], num_pages=1 + 9)
    assert int(state.cache.tables.num_free[0]) == 0
    assert plan(state, 8) == [7, 1, 0]
    state = batch(known=[30, 20, 20], cached=[0, 19, 16], num_pages=1 + 9, age=[2, 0, 1])
    assert plan(state, 8) == [0, 1, 0], "the oldest decodes"


def test_a_window_bounds_the_pages_that_a_row_needs():
    # A step of 8 reads 5 tokens behind and writes 8: at most 4 pages of 4, though the row knows 60 tokens.
    sizes = {"windows": HYBRID, "num_pages": 1 + 40}
    assert plan(batch(known=[60, 60], cached=[0, 0], window_pages=1 + 8, **sizes), 8) == [8, 0]
    assert plan(batch(known=[4, 60, 60], cached=[0, 0, 0], window_pages=1 + 5, **sizes), 8) == [4, 4, 0]
    assert plan(batch(known=[4, 60, 60], cached=[0, 0, 0], window_pages=1 + 4, **sizes), 8) == [4, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_any_batch_gets_at_most_the_budget_and_its_oldest_row_gets_some(seed):
    rng = np.random.default_rng(seed)
    known = rng.integers(1, 40, 4)
    cached = np.minimum(rng.integers(0, 40, 4), known - 1)
    cached = np.where(rng.random(4) < 0.4, known - 1, cached)
    age, active = rng.permutation(4), rng.random(4) < 0.8
    state = batch(known, cached, age=age, active=active, num_pages=1 + int(sum(-(-cached // S))) + int(seed % 5))
    counts = np.array(plan(state, 4 + seed % 7))
    behind = np.where(active, known - cached, 0)
    assert np.all((counts >= 0) & (counts <= behind)) and counts.sum() <= 4 + seed % 7
    assert np.all(counts[behind == 1] == 1)
    if np.any(active):
        assert counts[np.argmin(np.where(active, age, 99))] > 0
