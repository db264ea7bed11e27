import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.sampling import Sampler, SamplingParams, sample

VOCAB = 50
draw = jax.jit(sample)


def logits(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, VOCAB)) * 2, jnp.float32)


def sampler(*params, numbers=None):
    return Sampler.of([(p, i) for p, i in zip(params, numbers or [0] * len(params), strict=True)], 4)


def draws(params, row, count=4000):
    """Many draws of one row: one a position."""
    many = Sampler.of([(params, 0)] * count, 4)
    return np.asarray(draw(jnp.tile(row, (count, 1)), many, jnp.arange(count, dtype=jnp.int32)))


def test_temperature_zero_takes_the_most_likely_token():
    x = logits(3)
    tokens = draw(x, sampler(*[SamplingParams(top_k=5, top_p=0.5)] * 3), jnp.arange(3, dtype=jnp.int32))
    np.testing.assert_array_equal(tokens, np.argmax(x, axis=1))


def test_greedy_and_sampled_rows_stand_in_one_batch():
    x = logits(2)
    mixed = sampler(SamplingParams(), SamplingParams(temperature=100.0))
    tokens = [np.asarray(draw(x, mixed, jnp.full(2, at, jnp.int32))) for at in range(20)]
    assert {int(t[0]) for t in tokens} == {int(np.argmax(x[0]))}
    assert len({int(t[1]) for t in tokens}) > 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_of_the_scaled_logits(temperature):
    x = logits(1)
    counts = np.bincount(draws(SamplingParams(temperature=temperature, seed=3), x), minlength=VOCAB)
    expected = np.asarray(jax.nn.softmax(x[0] / temperature)) * counts.sum()
    # each count is binomial: five standard deviations, and one for the rare tokens
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected) + 1)


@pytest.mark.parametrize("k", [1, 3, VOCAB, VOCAB + 10])
def test_top_k_draws_the_k_most_likely_tokens_only(k):
    x = logits(1)
    allowed = set(np.argsort(-np.asarray(x[0]))[:k].tolist())
    drawn = set(draws(SamplingParams(temperature=3.0, top_k=k), x).tolist())
    assert drawn <= allowed and len(drawn) >= min(k, 20)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999999])
def test_top_p_draws_the_smallest_set_that_reaches_p(p):
    x = logits(1)
    order = np.argsort(-np.asarray(x[0]))
    mass = np.cumsum(np.asarray(jax.nn.softmax(x[0].astype(jnp.float32)))[order])
    allowed = set(order[: int(np.searchsorted(mass, p)) + 1].tolist())
    drawn = set(draws(SamplingParams(temperature=1.0, top_p=p), x).tolist())
    assert drawn <= allowed
    assert len(allowed) > 10 or drawn == allowed


def test_top_p_measures_what_top_k_left():
    x = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]], jnp.float32))
    # Of the two most likely the first has 4/7 of the mass: more than one half, so it stands alone.
    drawn = draws(SamplingParams(temperature=1.0, top_k=2, top_p=0.5), x)
    assert set(drawn.tolist()) == {0}
    assert set(draws(SamplingParams(temperature=1.0, top_p=0.5), x).tolist()) == {0, 1}


def test_a_draw_does_not_depend_on_its_neighbours():
    x = logits(4)
    params = [SamplingParams(temperature=1.0, seed=s, top_p=0.9) for s in (5, 6, 5, 7)]
    at = jnp.array([9, 9, 9, 2], jnp.int32)
    together = draw(x, sampler(*params), at)
    for row in range(4):
        alone = draw(x[row : row + 1], sampler(params[row]), at[row : row + 1])
        assert int(alone[0]) == int(together[row])


def test_samples_of_one_request_differ_and_repeat():
    x = jnp.tile(logits(1), (8, 1))
    at = jnp.zeros(8, jnp.int32)
    many = sampler(*[SamplingParams(temperature=2.0, seed=1)] * 8, numbers=list(range(8)))
    first = np.asarray(draw(x, many, at))
    assert len(set(first.tolist())) > 3
    np.testing.assert_array_equal(first, draw(x, many, at))
    other_seed = dataclasses.replace(many, seed=many.seed + jnp.uint32(1))
    assert np.any(first != np.asarray(draw(x, other_seed, at)))


def test_new_parameters_do_not_compile_again():
    traces = []

    @jax.jit
    def counted(x, params, at):
        traces.append(1)
        return sample(x, params, at)

    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=3), SamplingParams(seed=9, top_p=0.5)):
        counted(logits(1), sampler(params), jnp.zeros(1, jnp.int32))
    assert len(traces) == 1


def test_stop_tokens_are_found_per_row():
    params = sampler(SamplingParams(stop_tokens=(3, 7)), SamplingParams(stop_tokens=(0,)), SamplingParams())
    np.testing.assert_array_equal(params.is_stop(jnp.array([7, 7, 0], jnp.int32)), [True, False, False])
    np.testing.assert_array_equal(params.is_stop(jnp.array([1, 0, 3], jnp.int32)), [False, True, False])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens=0\): max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, r"temperature=-1.0\): temperature must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be at least 0; 0 keeps every token"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\)"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"stop_tokens": (-1,)}, "stop_tokens must be token ids"),
        ({"stop_strings": ("",)}, "stop_strings must be non-empty strings"),
    ],
)
def test_wrong_parameters_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**wrong)
