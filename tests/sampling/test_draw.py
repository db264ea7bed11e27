"""Draws: their order of rules, their distribution, and what they depend on."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from paged_jax import sampling
from paged_jax.sampling import SamplingParams, SamplingState

R, V, C = 6, 50, 12
SIZES = {"max_stop_tokens": 2, "max_bias_tokens": 4}
STATIC = ("processor", "num_logprobs", "processed_logprobs")
draw = jax.jit(sampling.draw, static_argnames=STATIC)


def logits(rows=R, seed=0, vocab=V):
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * 2).astype(np.float32)


def state_of(*params, numbers=None):
    return SamplingState.of([(p, i) for p, i in zip(params, numbers or [0] * len(params), strict=True)], **SIZES)


def known(rows=R, at: Any = 0, prompt=None, tokens=None):
    """The tokens that rows know, how many are of the prompt, and how many there are."""
    tokens = np.zeros((rows, C)) if tokens is None else tokens
    at = np.broadcast_to(np.asarray(at, np.int32), rows)
    prompt = at if prompt is None else np.broadcast_to(np.asarray(prompt, np.int32), rows)
    return np.asarray(tokens, np.int32), prompt, at


def test_temperature_zero_takes_the_most_likely_token_and_of_equal_ones_the_lowest():
    x = logits()
    x[2, [9, 4, 30]] = 20.0
    tokens = draw(x, state_of(*[SamplingParams(top_k=5, top_p=0.5, min_p=0.5)] * R), *known()).tokens
    np.testing.assert_array_equal(tokens, np.argmax(x, axis=1))
    assert int(tokens[2]) == 4
    mixed = state_of(SamplingParams(temperature=1.0), *[SamplingParams()] * (R - 1))
    assert draw(x, mixed, *known()).tokens.tolist()[1:] == tokens.tolist()[1:]


def test_greedy_and_sampled_rows_stand_in_one_batch():
    x = logits()
    mixed = state_of(*[SamplingParams(), SamplingParams(temperature=100.0)] * (R // 2))
    tokens = [np.asarray(draw(x, mixed, *known(at=at)).tokens) for at in range(20)]
    assert {int(t[0]) for t in tokens} == {int(np.argmax(x[0]))}
    assert len({int(t[1]) for t in tokens}) > 5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logit_bias={0: -50.0, 3: 2.0, 7: 60.0}),
        SamplingParams(forbidden_tokens=(0, 1, 2, 7)),
        SamplingParams(min_new_tokens=5, stop_tokens=(7, 3)),
        SamplingParams(presence_penalty=2.0),
        SamplingParams(frequency_penalty=1.5),
        SamplingParams(repetition_penalty=10.0),
    ],
)
def test_a_greedy_row_respects_every_rule(params):
    """The reference applies the rule in numpy; its greatest logit differs from that without the rule."""
    x = np.zeros((1, V), np.float32)
    x[0, [7, 3, 4]] = [3.0, 2.5, 1.0]
    tokens = np.full((1, C), 7)
    tokens[0, 4:6] = 3  # the prompt is 7 7 7 7, then 3 3 7 was drawn
    expected = x[0].copy()
    for token, value in params.logit_bias:
        expected[token] += value
    expected[list(params.forbidden_tokens)] = -np.inf
    if params.min_new_tokens:
        expected[list(params.stop_tokens)] = -np.inf
    expected[[3, 7]] /= params.repetition_penalty
    expected[[3, 7]] -= params.presence_penalty + params.frequency_penalty * np.array([2, 1])
    got = draw(jnp.asarray(x), state_of(params), *known(1, 7, 4, tokens), num_logprobs=V, processed_logprobs=True)
    assert int(got.tokens[0]) == np.argmax(expected)
    exact = expected.max() - np.log(np.exp(expected.astype(np.float64)).sum())
    np.testing.assert_allclose(got.logprobs, [exact], atol=1e-6)


def test_stop_tokens_can_be_drawn_once_there_are_enough_tokens():
    x = np.zeros((R, V), np.float32)
    x[:, 7] = 5.0
    state = state_of(*[SamplingParams(min_new_tokens=3, stop_tokens=(7,))] * R)
    assert draw(x, state, *known(R, [4, 5, 6, 7, 8, 9], 4)).tokens.tolist() == [0, 0, 0, 7, 7, 7]


def test_the_order_is_processor_then_bias_then_penalties_then_temperature():
    """Each step reads what the one before it left: a bias lifts token 2 to 4, which repetition then halves."""
    x = np.array([[1.0, 0.0, -1.0, -2.0]], np.float32)
    params = SamplingParams(
        logit_bias={2: 5.0}, repetition_penalty=2.0, frequency_penalty=0.5, temperature=0.5, top_k=3
    )
    got = draw(
        x, state_of(params), *known(1, 2, 1, [[2] * C]), num_logprobs=4, processed_logprobs=True, processor=AddOne()
    )
    # processor: 2 1 0 -1; bias: 2 1 5 -1; repetition: 2 1 2.5 -1; frequency: 2 1 2 -1; temperature: 4 2 4 -2
    exact = np.array([4, 4, 2, -np.inf]) - np.log(2 * np.exp(4) + np.exp(2))
    assert got.top_tokens.tolist() == [[0, 2, 1, 3]]
    np.testing.assert_allclose(got.top_logprobs[0], exact, atol=1e-6)


def test_top_p_measures_what_top_k_left_and_min_p_comes_last():
    x = np.full((1, 8), -np.inf, np.float32)
    x[0, :4] = np.log([0.4, 0.3, 0.2, 0.1])

    def kept(**options):
        state = state_of(SamplingParams(temperature=1.0, **options))
        got = draw(x, state, *known(1), num_logprobs=8, processed_logprobs=True)
        return sorted(np.asarray(got.top_tokens)[np.isfinite(got.top_logprobs)].tolist())

    assert kept(top_k=2, top_p=0.5) == [0]  # of the two most likely, the first has 4/7 of the mass
    assert kept(top_p=0.5) == [0, 1]
    assert kept(min_p=0.6, top_p=0.5) == [0, 1]  # of what min-p would leave alone, the first has more than one half
    assert kept(min_p=0.8, top_p=0.5) == [0]


def test_where_nothing_may_be_drawn_token_zero_is():
    x = logits(2)
    x[1] = -np.inf
    every = state_of(SamplingParams(), SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1))
    with jax.debug_nans(True):
        for processed in (False, True):
            got = draw(x, every, *known(2), num_logprobs=1, processed_logprobs=processed)
            assert int(got.tokens[1]) == 0
            assert float(got.logprobs[1]) == -np.inf and float(got.top_logprobs[1, 0]) == -np.inf
            assert np.isfinite(got.logprobs[0])


# ---- the distribution ------------------------------------------------------------------------------------------


def distribution(x, params):
    """Probabilities of one row, in float64, as transformers' warpers define them."""
    scaled = x.astype(np.float64) / params.temperature
    keep = np.full(len(x), True)
    if params.top_k:
        keep &= scaled >= np.sort(scaled)[-params.top_k]
    scaled = np.where(keep, scaled, -np.inf)
    probability = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    order = np.argsort(-probability)
    before = np.cumsum(probability[order]) - probability[order]
    keep[order[before >= params.top_p]] = False
    keep &= probability >= params.min_p * probability.max()
    probability = np.where(keep, probability, 0)
    return probability / probability.sum()


COUNT = 20_000


@pytest.mark.parametrize("axis", ["position", "sample", "seed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_draws_follow_the_distribution_along_every_axis_of_the_noise(axis, options):
    params = SamplingParams(**{"temperature": 1.0, "seed": 3, **options})
    x = logits(1, seed=5, vocab=8)
    every = np.arange(COUNT, dtype=np.int32)
    state = jax.tree.map(lambda leaf: np.repeat(leaf, COUNT, axis=0), state_of(params))
    if axis == "sample":
        state = dataclasses.replace(state, sample=every)
    if axis == "seed":
        state = dataclasses.replace(state, seed=every.astype(np.uint32))
    tokens = draw(np.tile(x, (COUNT, 1)), state, *known(COUNT, every if axis == "position" else 0)).tokens
    counts = np.bincount(np.asarray(tokens), minlength=8)
    expected = COUNT * distribution(np.asarray(x)[0], params)
    assert np.all(counts[expected == 0] == 0)
    possible = expected > 0
    statistic = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    assert statistic < chi2.ppf(1 - 1e-4, max(1, possible.sum() - 1))


def threefry2x32(key, counter):
    """Salmon et al. 2011, on Python integers."""

    def rotate(x, by):
        return (x << by | x >> (32 - by)) & 0xFFFFFFFF

    keys = [*key, 0x1BD11BDA ^ key[0] ^ key[1]]
    a, b = ((word + k) & 0xFFFFFFFF for word, k in zip(counter, keys, strict=False))
    for block in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            a = (a + b) & 0xFFFFFFFF
            b = rotate(b, by) ^ a
        a = (a + keys[(block + 1) % 3]) & 0xFFFFFFFF
        b = (b + keys[(block + 2) % 3] + block + 1) & 0xFFFFFFFF
    return a, b


def test_the_noise_is_threefry_of_seed_sample_position_and_token():
    assert threefry2x32((0, 0), (0, 0)) == (0x6B200159, 0x99BA4EFE)  # the authors' known answer
    x, seeds, numbers, at = logits(), [0, 7, 2**32 - 1, 7, 0, 1], [0, 3, 1, 4, 0, 0], [0, 9, 100, 9, 1, 0]
    state = state_of(*[SamplingParams(temperature=1.0, seed=s) for s in seeds], numbers=numbers)
    tokens = draw(x, state, *known(R, at)).tokens
    for row in range(R):
        hashes = [threefry2x32((seeds[row], numbers[row]), (at[row], token)) for token in range(-(-V // 2))]
        bits = [word[i] for i in (0, 1) for word in hashes][:V]
        noise = -np.log(-np.log(((np.array(bits) >> 9) + 0.5) / 2**23))
        assert int(tokens[row]) == np.argmax(np.asarray(x[row], np.float64) + noise)


# ---- what a draw depends on --------------------------------------------------------------------------------------

RULES = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=5, top_p=0.9),
    SamplingParams(temperature=0.7, seed=6, top_k=8, presence_penalty=1.0),
    SamplingParams(temperature=1.3, seed=5, min_p=0.05, repetition_penalty=1.4, logit_bias={4: 1.0}),
    SamplingParams(frequency_penalty=0.5, forbidden_tokens=(3, 8)),
    SamplingParams(temperature=2.0, seed=2**32 - 1, min_new_tokens=4, stop_tokens=(1, 9)),
]


def ruled_batch():
    rng = np.random.default_rng(1)
    at = rng.integers(3, C, R)
    return logits(), state_of(*RULES, numbers=list(range(R))), known(R, at, 3, rng.integers(0, V, (R, C)))


def drawn_by_batch():
    """Traced anew: a setting of JAX acts on what is traced after it."""
    x, state, rows = ruled_batch()
    run = jax.jit(functools.partial(sampling.draw, num_logprobs=V, processed_logprobs=True))
    return jax.tree.map(np.asarray, run(x, state, *rows))


@pytest.fixture(scope="module")
def batch():
    return drawn_by_batch()


def test_a_draw_does_not_depend_on_its_neighbours_bit_for_bit(batch):
    x, state, rows = jax.tree.map(np.asarray, ruled_batch())
    for row in range(R):
        given = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (x, state, *rows))
        alone = draw(*given, num_logprobs=V, processed_logprobs=True)
        jax.tree.map(lambda a, b, row=row: np.testing.assert_array_equal(a[0], b[row]), alone, batch)


def test_samples_of_one_request_differ_and_repeat():
    x = np.tile(logits(1), (R, 1))
    many = state_of(*[SamplingParams(temperature=2.0, seed=1)] * R, numbers=list(range(R)))
    first = np.asarray(draw(x, many, *known()).tokens)
    assert len(set(first.tolist())) > 3
    np.testing.assert_array_equal(first, draw(x, many, *known()).tokens)
    other_seed = dataclasses.replace(many, seed=many.seed + jnp.uint32(1))
    assert np.any(first != np.asarray(draw(x, other_seed, *known()).tokens))


@pytest.mark.parametrize(
    "settings",
    [
        {"default_prng_impl": "rbg", "enable_x64": True},
        {"default_prng_impl": "unsafe_rbg", "debug_nans": True},
        {"default_prng_impl": "threefry2x32", "threefry_partitionable": False, "numpy_dtype_promotion": "standard"},
    ],
    ids=lambda settings: settings["default_prng_impl"],
)
def test_a_draw_is_the_same_whatever_jax_is_set_to(settings, batch):
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(getattr(jax, name)(value))
        got = drawn_by_batch()
    jax.tree.map(np.testing.assert_array_equal, got, batch)
    assert [x.dtype for x in got[:4]] == [np.int32, np.float32, np.int32, np.float32]


def test_rows_that_are_not_active_change_nothing():
    x, state, rows = ruled_batch()
    got = draw(x, state, *rows, active=np.arange(R) == 4)
    assert int(got.tokens[4]) == int(draw(x, state, *rows).tokens[4])


# ---- log-probabilities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probabilities_are_the_models_own_unless_asked_otherwise(dtype, batch):
    x, state, rows = ruled_batch()
    x = x.astype(dtype)
    got = draw(x, state, *rows, num_logprobs=5)
    exact = np.asarray(x, np.float64)
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(got.logprobs, exact[np.arange(R), got.tokens], atol=1e-6)
    np.testing.assert_array_equal(got.top_tokens, np.argsort(-exact, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(got.top_logprobs, -np.sort(-exact, axis=1)[:, :5], atol=1e-6)
    if dtype == jnp.float32:
        np.testing.assert_array_equal(batch.tokens, got.tokens)
        np.testing.assert_allclose(np.exp(batch.top_logprobs.astype(np.float64)).sum(axis=1), 1, atol=1e-6)
        assert np.any(np.abs(batch.logprobs - got.logprobs) > 0.1)


def test_log_probabilities_after_the_rules_are_those_of_the_distribution_drawn_from():
    params = SamplingParams(temperature=1.5, top_k=6, top_p=0.9, min_p=0.2)
    x = logits(1, vocab=8)
    got = draw(x, state_of(params), *known(1), num_logprobs=8, processed_logprobs=True)
    probability = np.zeros(8)
    probability[np.asarray(got.top_tokens[0])] = np.exp(np.asarray(got.top_logprobs[0], np.float64))
    np.testing.assert_allclose(probability, distribution(np.asarray(x)[0], params), atol=1e-6)


def test_as_many_log_probabilities_as_asked_for():
    def traced(**options):
        return jax.eval_shape(functools.partial(sampling.draw, **options), logits(), state_of(*RULES), *known())

    none = traced()
    assert none.logprobs is None and none.top_tokens.shape == none.top_logprobs.shape == (R, 0)
    only = traced(num_logprobs=0)
    assert only.logprobs is not None and only.logprobs.shape == (R,)
    assert only.top_tokens.shape == only.top_logprobs.shape == (R, 0)


# ---- a processor of the user's -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AddOne:
    def process(self, state, logits, tokens, num_known):
        return logits + 1.0

    def advance(self, state, drawn, drew):
        return state


@dataclasses.dataclass(frozen=True)
class Trie:
    """Only the words of a list: a row's state is its node; children[node, token] is the next one, 0 for none."""

    words: tuple[tuple[int, ...], ...]

    def table(self):
        children, nodes = np.zeros((1 + sum(map(len, self.words)), V), np.int32), 1
        for word in self.words:
            node = 0
            for token in word:
                if not children[node, token]:
                    children[node, token], nodes = nodes, nodes + 1
                node = children[node, token]
        return jnp.asarray(children)

    def process(self, state, logits, tokens, num_known):
        return jnp.where(self.table()[state["node"]] > 0, logits, -jnp.inf)

    def advance(self, state, drawn, drew):
        return {"node": jnp.where(drew, self.table()[state["node"], drawn], state["node"])}


def test_a_users_trie_decides_what_is_drawn_and_its_state_follows():
    words = ((3, 4, 5), (3, 7, 8), (9, 4, 6))
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(12)]
    state = dataclasses.replace(state_of(*params), processor={"node": jnp.zeros(12, jnp.int32)})
    active = np.arange(12) != 5
    words_drawn = []
    for at in range(3):
        got = draw(logits(12, seed=at), state, *known(12, at), processor=Trie(words), active=active)
        state = dataclasses.replace(state, processor=got.processor)
        words_drawn.append(np.asarray(got.tokens))
    drawn = {tuple(word.tolist()) for word in np.stack(words_drawn, axis=1)[active]}
    assert drawn <= set(words) and len(drawn) > 1
    assert int(state.processor["node"][5]) == 0, "a row that draws nothing stays where it was"


@dataclasses.dataclass(frozen=True)
class Wrong:
    logits: bool

    def process(self, state, logits, tokens, num_known):
        return logits[:, :-1] if self.logits else logits

    def advance(self, state, drawn, drew):
        return state.astype(jnp.float32)


def refuse(message, x, state, **options):
    with pytest.raises(ValueError, match=message):
        draw(x, state, *known(len(x)), **options)


def test_what_does_not_fit_is_refused_when_it_is_traced():
    state = dataclasses.replace(state_of(*RULES[:2]), processor=jnp.zeros(2, jnp.int32))
    x = logits(2)
    refuse(r"Wrong.process returned float32\[2, 49\]: return the float32\[2, 50\]", x, state, processor=Wrong(True))
    refuse(
        r"Wrong.advance returned a state of float32\[2\], but was given int32\[2\]: keep",
        x,
        state,
        processor=Wrong(False),
    )
    refuse("3 rows of logits, but a SamplingState of 2 rows: gather the rows", logits(3), state)
    refuse("num_logprobs=-1 must be None or from 0 to the 50 tokens", x, state, num_logprobs=-1)
    refuse("num_logprobs=51 must be None or from 0 to the 50 tokens", x, state, num_logprobs=51)
