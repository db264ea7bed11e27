"""The decode loop on a toy decoder: everything between two visits of the host."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from paged_jax import DecodeState, SamplingParams
from paged_jax import decode_loop as loop
from paged_jax import decode_step as one_step
from paged_jax import prefill as compute
from paged_jax.decoding import Finish, start, stop
from paged_jax.sampling import SamplingState

PARAMS = toy.init_params()
prefill = jax.jit(functools.partial(compute, toy.forward), donate_argnums=1)
decode_loop = jax.jit(functools.partial(loop, toy.forward), donate_argnums=1)
decode_step = jax.jit(functools.partial(one_step, toy.forward), donate_argnums=1)
begin = jax.jit(start, donate_argnums=0)
GREEDY = SamplingParams(max_new_tokens=24)
T = 64


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, toy.VOCAB, n).tolist() for n in lengths]


def pack(pieces, num_rows):
    """Tokens [T] and query lengths of {row: tokens}."""
    tokens, query_lens = np.zeros(T, np.int32), np.zeros(num_rows, np.int32)
    packed = [t for row in sorted(pieces) for t in pieces[row]]
    tokens[: len(packed)] = packed
    for row, piece in pieces.items():
        query_lens[row] = len(piece)
    return tokens, query_lens


def begun(config, prompts, params: SamplingParams | list[SamplingParams] = GREEDY, capacity=32):
    """A state in which row b is about to decode prompts[b]."""
    num_rows = config.max_sequences
    state = DecodeState.create(config, capacity)
    state, granted = prefill(PARAMS, state, *pack({b: p[:-1] for b, p in enumerate(prompts)}, num_rows))
    assert np.all(granted[: len(prompts)])
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    fill = [0] * (num_rows - len(prompts))
    return begin(
        state,
        np.arange(num_rows) < len(prompts),
        np.array([p[-1] for p in prompts] + fill, np.int32),
        np.array([p.max_new_tokens for p in each] + fill, np.int32),
        SamplingState.of([(p, 0) for p in each] + [None] * len(fill)),
    )


def drawn(state, row):
    return np.asarray(state.tokens)[row, : int(state.num_tokens[row])].tolist()


def test_ragged_greedy_decoding_equals_the_dense_forward():
    texts = prompts(1, 7, 8, 21)
    state, refused = decode_loop(PARAMS, begun(toy.config(), texts))
    assert not np.any(refused)
    for row, prompt in enumerate(texts):
        assert drawn(state, row) == toy.dense_greedy(PARAMS, prompt, 24)
    assert np.all(state.finish == Finish.MAX_TOKENS)


def test_whole_loop_in_jit_equals_step_by_step():
    texts = prompts(3, 9, 16, 2)
    params = [
        SamplingParams(max_new_tokens=n, temperature=t, seed=n) for n, t in [(20, 0), (24, 1.0), (5, 0.7), (1, 2)]
    ]
    whole, _ = decode_loop(PARAMS, begun(toy.config(), texts, params))
    stepped = begun(toy.config(), texts, params)
    while np.any(stepped.active):
        stepped, refused = decode_step(PARAMS, stepped)
        assert not np.any(refused)
    for row in range(4):
        assert drawn(whole, row) == drawn(stepped, row)
        assert len(drawn(whole, row)) == params[row].max_new_tokens


def test_a_sequence_draws_the_same_tokens_alone_and_in_a_batch():
    texts = prompts(5, 12, 30)
    params = [SamplingParams(max_new_tokens=16, temperature=t, seed=4) for t in (0.0, 1.0, 0.5)]
    batch, _ = decode_loop(PARAMS, begun(toy.config(), texts, params))
    for row in range(3):
        alone, _ = decode_loop(PARAMS, begun(toy.config(), texts[row : row + 1], params[row]))
        assert drawn(alone, 0) == drawn(batch, row)


def test_chunks_of_a_prompt_give_the_tokens_of_one_prefill():
    (prompt,) = prompts(50)
    config = toy.config()
    state = DecodeState.create(config, 32)
    for at in range(0, 49, 13):
        state, granted = prefill(PARAMS, state, *pack({2: prompt[at : min(at + 13, 49)]}, 4))
        assert granted[2]
    rows = np.arange(4) == 2
    state = begin(
        state, rows, np.where(rows, prompt[-1], 0).astype(np.int32), np.full(4, 10, np.int32), SamplingState.create(4)
    )
    state, _ = decode_loop(PARAMS, state)
    assert drawn(state, 2) == toy.dense_greedy(PARAMS, prompt, 10)


def test_a_finished_row_is_released_in_the_step_that_ends_it():
    state = begun(toy.config(), prompts(6, 10), [SamplingParams(max_new_tokens=1), SamplingParams(max_new_tokens=3)])
    state, _ = decode_step(PARAMS, state)
    assert int(state.tables.lengths[0]) == 0 and not np.any(state.tables.groups[0].pages[0])
    assert int(state.tables.lengths[1]) == 10 and bool(state.active[1])
    state, _ = decode_loop(PARAMS, state)
    assert int(state.tables.num_free[0]) == toy.config().num_pages - 1


def test_a_stop_token_ends_a_row_alone_and_in_a_batch():
    texts = prompts(6, 10, 11)
    free_run = [toy.dense_greedy(PARAMS, p, 12) for p in texts]
    params = [SamplingParams(max_new_tokens=12, stop_tokens=(run[5],)) for run in free_run]
    state, _ = decode_loop(PARAMS, begun(toy.config(), texts, params))
    for row, run in enumerate(free_run):
        expected = run[: run.index(run[5]) + 1]
        assert drawn(state, row) == expected
        assert int(state.finish[row]) == Finish.STOP_TOKEN


def test_max_steps_and_a_full_buffer_return_to_the_host():
    texts = prompts(4, 4)
    state, _ = decode_loop(PARAMS, begun(toy.config(), texts), jnp.int32(5))
    assert drawn(state, 0) == toy.dense_greedy(PARAMS, texts[0], 5)
    state, _ = decode_loop(PARAMS, begun(toy.config(), texts, capacity=8))
    assert [int(n) for n in state.num_tokens[:2]] == [8, 8] and np.all(state.active[:2])
    state, _ = decode_loop(PARAMS, dataclasses.replace(state, num_tokens=jnp.zeros(4, jnp.int32)))
    assert drawn(state, 1) == toy.dense_greedy(PARAMS, texts[1], 16)[8:]


def test_a_full_row_finishes():
    config = toy.config(max_pages_per_sequence=3)
    state, _ = decode_loop(PARAMS, begun(config, prompts(10)))
    # 9 tokens are cached, 3 more fit: the row draws three tokens after the ones it computes, then is full.
    assert len(drawn(state, 0)) == 3 and int(state.finish[0]) == Finish.ROW_FULL
    assert int(state.tables.num_free[0]) == config.num_pages - 1


def test_out_of_pages_returns_with_every_sequence_intact_and_goes_on_after_pages_were_freed():
    texts = prompts(9, 9, 9, 9)
    expected = [toy.dense_greedy(PARAMS, p, 24) for p in texts]
    config = toy.config(num_pages=1 + 16)  # 2 pages each at the start, 8 each at the end
    state, refused = decode_loop(PARAMS, begun(config, texts))
    assert np.any(refused) and np.all(np.asarray(state.active)[np.asarray(refused)])
    assert int(state.tables.fault) != 0
    for row in range(4):
        so_far = drawn(state, row)
        assert 0 < len(so_far) < 24 and so_far == expected[row][: len(so_far)]
        assert int(state.tables.lengths[row]) == 8 + len(so_far)
    # Give up the last two; the others go on as if nothing had happened.
    state = stop(state, jnp.array([False, False, True, True]))
    state, refused = decode_loop(PARAMS, state)
    assert not np.any(refused)
    assert [drawn(state, row) for row in (0, 1)] == expected[:2]


def test_refused_prefill_leaves_the_other_rows_their_tokens():
    texts = prompts(9, 41, 5)
    config = toy.config(num_pages=1 + 8)
    state = DecodeState.create(config, 32)
    state, granted = prefill(PARAMS, state, *pack({b: p[:-1] for b, p in enumerate(texts)}, 4))
    assert np.asarray(granted)[:2].tolist() == [True, False]
    assert int(state.tables.lengths[1]) == 0
    rows = np.arange(4) == 0
    state = begin(state, rows, np.full(4, texts[0][-1], np.int32), np.full(4, 8, np.int32), SamplingState.create(4))
    state, _ = decode_loop(PARAMS, state)
    assert drawn(state, 0) == toy.dense_greedy(PARAMS, texts[0], 8)


@pytest.mark.parametrize("prompt_length", [1, 4, 5, 7, 30])
def test_forked_samples_share_the_prompt_and_copy_on_write(prompt_length):
    (prompt,) = prompts(prompt_length)
    config = toy.config()
    state = DecodeState.create(config, 32)
    state, _ = prefill(PARAMS, state, *pack({0: prompt[:-1]}, 4))
    pages_of_prompt = config.num_pages - 1 - int(state.tables.num_free[0])
    tables, ok = state.tables.fork(jnp.array([0, 0, 0, -1], jnp.int32), jnp.array([1, 2, 3, -1], jnp.int32))
    assert np.all(ok[:3])
    state = dataclasses.replace(state, tables=tables)
    assert config.num_pages - 1 - int(state.tables.num_free[0]) == pages_of_prompt
    params = [SamplingParams(max_new_tokens=12)] * 2 + [SamplingParams(max_new_tokens=12, temperature=1.0, seed=2)] * 2
    state = begin(
        state, np.full(4, True), np.full(4, prompt[-1], np.int32), np.full(4, 12, np.int32),
        SamplingState.of([(p, i) for i, p in enumerate(params)]),
    )  # fmt: skip
    state, _ = decode_loop(PARAMS, state)
    expected = toy.dense_greedy(PARAMS, prompt, 12)
    assert drawn(state, 0) == drawn(state, 1) == expected, "greedy samples agree with n = 1"
    assert drawn(state, 2) != drawn(state, 3), "samples of one seed differ"
    for row in (2, 3):
        alone, _ = decode_loop(PARAMS, _alone(config, prompt, params[row], row))
        assert drawn(alone, 0) == drawn(state, row), "and repeat"
    assert int(state.tables.num_free[0]) == config.num_pages - 1


def _alone(config, prompt, params, number):
    state = begun(config, [prompt], params)
    return dataclasses.replace(state, sampler=SamplingState.of([(params, number), None, None, None]))


def test_one_program_allocates_copies_finishes_and_releases_for_64_sequences():
    """Three batches, one compilation, no host callback."""
    config = toy.config(num_pages=512, max_sequences=64)
    traces = []

    def forward(*args):
        traces.append(1)
        return toy.forward(*args)

    loop64 = jax.jit(functools.partial(loop, forward), donate_argnums=1)
    prefill64 = jax.jit(functools.partial(compute, toy.forward), donate_argnums=1)
    fork64 = jax.jit(lambda tables, parents, children: tables.fork(parents, children)[0])
    for batch in range(3):
        rng = np.random.default_rng(batch)
        state = DecodeState.create(config, 32)
        text = rng.integers(0, toy.VOCAB, (8, 6)).astype(np.int32)
        lens = rng.integers(2, 7, 8)
        state, _ = prefill64(PARAMS, state, *pack({r * 8: text[r, : lens[r] - 1] for r in range(8)}, 64))
        parents, children = np.full((2, 64), -1, np.int32)
        parents[:56] = np.repeat(np.arange(8) * 8, 7)
        children[:56] = [row for row in range(64) if row % 8]
        state = dataclasses.replace(state, tables=fork64(state.tables, parents, children))
        feed = np.repeat(text[np.arange(8), lens - 1], 8)
        limits = rng.integers(1, 25, 64).astype(np.int32)
        params = [(SamplingParams(temperature=float(row % 2), seed=batch), row) for row in range(64)]
        state = begin(state, np.full(64, True), feed, limits, SamplingState.of(params))
        if batch == 0:
            text_of_program = loop64.lower(PARAMS, state).as_text()
            assert "callback" not in text_of_program and "infeed" not in text_of_program
        state, refused = loop64(PARAMS, state)
        if batch == 0:
            traces.clear()
        assert not np.any(refused) and not np.any(state.active)
        assert [len(drawn(state, row)) for row in range(64)] == limits.tolist()
        for row in (0, 10, 34):  # the greedy ones
            prompt = text[row // 8, : lens[row // 8]].tolist()
            assert drawn(state, row) == toy.dense_greedy(PARAMS, prompt, int(limits[row]))
        assert int(state.tables.num_free[0]) == config.num_pages - 1
    assert not traces, "one compilation served all batches"
