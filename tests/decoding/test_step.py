"""A step and what comes before it, at the edges of what a row may be."""

from batch_model import PLAIN, Batch, M, Request, S
from paged_jax.decoding.rows import Finish


def test_a_row_whose_limit_leaves_no_token_to_draw_ends_at_once():
    batch = Batch(PLAIN)
    batch.start(0, Request((1, 2, 3), 0, 0, 0), oldest=False, keeps=False)
    assert not batch.rows.active[0] and batch.rows.finish[0] == Finish.MAX_TOKENS and batch.rows.num_known[0] == 3


def test_a_prompt_that_fills_the_row_draws_one_token_and_a_longer_one_none():
    batch = Batch(PLAIN)
    batch.start(0, Request(tuple(range(M * S)), 5, 0, 0), oldest=False, keeps=False)
    batch.start(1, Request(tuple(range(M * S + 1)), 5, 0, 0), oldest=False, keeps=False)
    batch.run(20)
    assert batch.rows.num_known[0] == M * S + 1 and batch.rows.finish[0] == Finish.MAX_TOKENS
    assert batch.rows.finish[1] == Finish.TOO_LONG


def test_a_row_that_has_ended_gives_up_its_pages_though_its_age_is_negative():
    batch = Batch(PLAIN)
    batch.start(0, Request((1, 2, 3), 2, 0, 0), oldest=True, keeps=True, age=-5)
    batch.run(5)
    assert batch.rows.age[0] == -5 and batch.lengths[0] == 4 and not batch.rows.active[0]
    batch.start(1, Request(tuple(range(20)), 12, 1, 0), oldest=False, keeps=False)
    batch.run(40)
    assert not batch.rows.active[1] and batch.rows.num_known[1] == M * S and batch.lengths[0] == 0
