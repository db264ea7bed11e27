"""Each function from logits to logits against plain numpy; penalties and restrictions as transformers defines them."""

import jax
import numpy as np
import pytest

from paged_jax.sampling import processors

V = 40
NEVER = -np.inf


def logits(rows, seed=0, vocab=V, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


def column(*values):
    return np.array(values, np.float32)


def whole(*values):
    return np.array(values, np.int32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def compiled(name):
    return jax.jit(getattr(processors, name))


def test_bias_adds_to_the_named_tokens_only():
    x = logits(3)
    tokens = np.array([[5, -1, 0], [-1, -1, -1], [V - 1, 7, 2]], np.int32)
    values = np.array([[1.5, 9, -np.inf], [9, 9, 9], [-2, 0.5, -np.inf]], np.float32)
    expected = x.copy()
    for row in range(3):
        for token, value in zip(tokens[row], values[row], strict=True):
            if token >= 0:
                expected[row, token] += value
    np.testing.assert_array_equal(compiled("bias")(x, tokens, values), expected)


def penalised(x, tokens, num_prompt, num_known, repetition, presence, frequency):
    """One row, token by token."""
    prompt, drawn = tokens[:num_prompt].tolist(), tokens[num_prompt:num_known].tolist()
    expected = x.copy()
    for token in set(prompt) | set(drawn):
        expected[token] = x[token] * repetition if x[token] < 0 else x[token] / repetition
    for token in set(drawn):
        expected[token] -= np.float32(frequency * drawn.count(token)) + np.float32(presence)
    return expected


def test_penalties_count_the_prompt_for_repetition_and_drawn_tokens_for_all():
    rng = np.random.default_rng(3)
    x = logits(5)
    x[:, 4] = NEVER  # forbidden before: a penalty must not bring it back
    tokens = rng.integers(0, 12, (5, 20)).astype(np.int32)
    num_prompt, num_known = whole(0, 3, 9, 6, 20), whole(0, 12, 9, 20, 20)
    given = column(1.5, 2, 1.3, 0.5, 100), column(0.5, 0, 2, -2, 1), column(0.25, 1, 0, 0.5, 2)
    result = np.asarray(compiled("penalties")(x, *given, tokens, num_prompt, num_known))
    for row in range(5):
        expected = penalised(x[row], tokens[row], num_prompt[row], num_known[row], *(float(g[row]) for g in given))
        np.testing.assert_allclose(result[row], expected, rtol=1e-6)


def test_penalties_that_change_nothing_change_nothing():
    x = logits(2)
    tokens = np.array([[1, 2, 3, 3]] * 2, np.int32)
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    at = whole(1, 2), whole(4, 4)
    np.testing.assert_array_equal(compiled("penalties")(x, ones, zeros, zeros, tokens, *at), x)


def test_tokens_past_those_that_are_known_count_for_nothing():
    x = logits(2)
    tokens = np.array([[1, 2, 3, 3]] * 2, np.int32)
    harsh = column(5, 5), column(2, 2), column(2, 2)
    at = whole(0, 0)
    np.testing.assert_array_equal(compiled("penalties")(x, *harsh, tokens, at, at), x)


def test_temperature_divides_the_distance_to_the_maximum():
    x = logits(4)
    result = compiled("temperature")(x, column(0, 0.5, 1, 3))
    for row, divisor in enumerate([1, 0.5, 1, 3]):
        np.testing.assert_allclose(result[row], (x[row] - x[row].max()) / divisor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 3e38])
def test_the_most_extreme_temperatures_give_no_nan(temperature):
    x = logits(2)
    x[:, 3] = NEVER
    result = np.asarray(compiled("temperature")(x, np.full(2, temperature, np.float32)))
    assert not np.any(np.isnan(result)) and np.all(result.max(axis=1) == 0) and np.all(result[:, 3] == NEVER)
    if temperature < 1:
        np.testing.assert_array_equal(result.argmax(axis=1), x.argmax(axis=1))


def test_top_k_keeps_k_tokens():
    x = logits(6)
    ks = whole(0, 1, 3, V - 1, V, V + 10)
    result = compiled("top_k")(x, ks)
    for row, k in enumerate([V, 1, 3, V - 1, V, V]):
        nth = np.sort(x[row])[-k]
        np.testing.assert_array_equal(result[row], np.where(x[row] < nth, NEVER, x[row]))


def test_tokens_that_tie_at_the_edge_of_top_k_are_all_kept():
    x = np.array([[1, 0.0, -0.0, -1, 2]], np.float32)
    np.testing.assert_array_equal(compiled("top_k")(x, whole(3)), [[1, 0, 0, NEVER, 2]])


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(scale):
    ps = [1e-45, 1e-6, 0.1, 0.5, 0.9, 0.99, 0.999999, 1.0]
    x = logits(len(ps), scale=scale)
    result = compiled("top_p")(x, column(*ps))
    for row, p in enumerate(ps):
        order = np.argsort(-x[row])
        mass = np.cumsum(softmax(x[row])[order])
        count = V if p == 1 else int(np.sum(mass < p)) + 1
        expected = np.full(V, NEVER, np.float32)
        expected[order[:count]] = x[row, order[:count]]
        np.testing.assert_array_equal(result[row], expected)


def test_tokens_that_tie_at_the_edge_of_top_p_are_all_kept():
    x = np.log(np.array([[0.4, 0.25, 0.25, 0.1]], np.float32))
    np.testing.assert_array_equal(compiled("top_p")(x, column(0.5)), np.where(x < -2, NEVER, x))


def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely():
    ps = [0.0, 1e-45, 1e-3, 0.05, 0.3, 1.0]
    x = logits(len(ps))
    result = compiled("min_p")(x, column(*ps))
    for row, p in enumerate(ps):
        probability = softmax(x[row])
        keep = probability >= p * probability.max() * (1 - 1e-6)
        np.testing.assert_array_equal(result[row], np.where(keep, x[row], NEVER))
    assert np.isfinite(result).sum(axis=1).tolist() == sorted(np.isfinite(result).sum(axis=1), reverse=True)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_what_was_forbidden_stays_forbidden(name):
    x = logits(3)
    x[:, ::2] = NEVER
    x[2] = NEVER
    value = whole(3, 3, 3) if name == "top_k" else column(0.5, 0.9, 0.9)
    result = np.asarray(compiled(name)(x, value))
    assert np.all(result[:, ::2] == NEVER) and np.all(result[2] == NEVER)
    assert np.all(np.isfinite(result[:2]).sum(axis=1) > 0)


@pytest.mark.parametrize("vocab", [50, 30_000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_log_probabilities_equal_those_in_float64(vocab, scale):
    x = logits(4, vocab=vocab, scale=scale)
    result = np.asarray(compiled("log_probabilities")(x), np.float64)
    exact = x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True))
    # 1e-6, and what the float32 of a number that far from 0 cannot hold: two roundings of half a unit
    np.testing.assert_allclose(result, exact, atol=1e-6, rtol=2**-23)
    np.testing.assert_allclose(np.exp(result).sum(axis=1), 1, atol=1e-6)


def test_log_probabilities_of_rows_with_infinities_are_no_nan():
    x = logits(4)
    x[0, 5:] = NEVER
    x[1] = NEVER
    x[2, 7] = np.inf
    result = np.asarray(compiled("log_probabilities")(x))
    assert np.all(result[0, 5:] == NEVER) and np.isclose(np.exp(result[0, :5]).sum(), 1)
    assert np.all(result[1] == NEVER)
    assert result[2, 7] == 0 and np.all(np.delete(result[2], 7) < -1e38)
    assert np.all(np.isfinite(result[3]))
