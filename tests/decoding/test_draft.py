"""Drafts: what is proposed, what is accepted, and that nothing which is drawn depends on them."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import (
    DraftModel,
    Drafts,
    Engine,
    KVCache,
    Lookup,
    Rollout,
    SamplingParams,
    SamplingState,
    Stepper,
    rollout,
)
from paged_jax.decoding.draft import add_drafts, update_trust
from paged_jax.decoding.rollout import hint_texts
from paged_jax.decoding.rows import NO_TOKEN, DecodeState, Rows
from paged_jax.decoding.step import step
from paged_jax.decoding.stepper import token_counts_for


@functools.cache
def program_of(lookup: Lookup):
    return jax.jit(functools.partial(lookup.propose, None))


def proposals(*texts: list[int], hints=(), seeds: Sequence[int] = range(4), **options) -> list[list[int]]:
    """What is proposed for each of up to four rows."""
    tokens, told = np.zeros((4, 32), np.int32), np.full((4, 16), NO_TOKEN, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    for row, hint in enumerate(hints):
        told[row, : len(hint)] = hint
    num_known = np.array([*map(len, texts), *[0] * (4 - len(texts))], np.int32)
    sampling = SamplingState.create(4)
    sampling = dataclasses.replace(sampling, seed=jnp.array(np.array(seeds, np.uint32)))
    rows = dataclasses.replace(
        Rows.create(4, 32, sampling, num_hints=16),
        tokens=tokens, hints=told, num_prompt=np.minimum(num_known, 4), num_known=num_known, active=num_known > 0,
    )  # fmt: skip
    lookup = Lookup(**options)
    drafts, _ = jax.device_get(program_of(lookup)(rows, np.full(4, lookup.num_drafts, np.int32)))
    return [drafts.tokens[row, : drafts.counts[row]].tolist() for row in range(len(texts))]


def test_a_lookup_continues_the_latest_earlier_occurrence():
    assert proposals([1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 1, 2, 3], num_drafts=3) == [[6, 7, 1]]
    assert proposals([1, 2, 3, 4, 5, 9, 1, 2, 3], num_drafts=3, num_matched=2) == [[4, 5, 9]]


def test_a_lookup_finds_nothing_in_a_text_without_repetition_and_in_rows_that_are_short_or_idle():
    assert proposals([1, 2, 3, 4, 5, 6], [1, 1], [], [0, 0, 0]) == [[], [], [], []]


def test_a_text_that_repeats_is_taken_to_go_on_so():
    assert proposals([5, 5, 5, 5], [1, 2, 3, 1, 2, 3, 1, 2, 3]) == [[5, 5, 5, 5], [1, 2, 3, 1]]


def test_a_lookup_prefers_hints_and_does_not_read_past_their_end():
    text = [1, 2, 3, 4, 1, 2, 3]
    told = [1, 2, 3, 5, 6, 7, 8, NO_TOKEN, 1, 2, 3, 9, 9]
    assert proposals(text, text, hints=[told, []], num_drafts=2) == [[9, 9], [4, 1]]
    assert proposals(text, hints=[told[7:]]) == [[4, 1, 2, 3]], "the longer continuation"
    assert proposals([4, 1, 2, 3], hints=[told[7:]]) == [[9, 9]]


def test_a_lookup_takes_an_earlier_occurrence_that_goes_on_for_longer():
    assert proposals([0, 1, 2, 3], hints=[[1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 8]]) == [[4, 5, 6, 7]]


def test_a_lookup_reads_the_sibling_that_has_come_farthest():
    texts = [7, 1, 2, 3], [7, 1, 2, 3, 4, 5, 6], [7, 1, 2, 3, 8], [7, 1, 2, 3]
    assert proposals(*texts, seeds=(5, 5, 5, 6)) == [[4, 5, 6], [], [], []]
    assert proposals(*texts, seeds=(5, 5, 5, 6), reads_siblings=False) == [[], [], [], []]
    assert proposals([8, 1, 2, 3], *texts[1:], seeds=(5, 5, 5, 5)) == [[], [], [], [4, 5, 6]], "another prompt"


def test_hints_and_states_that_do_not_fit_are_refused():
    prompts, lengths = np.ones((2, 4), np.int32), np.array([4, 4], np.int32)
    cache = jax.eval_shape(lambda: KVCache.create(decoder.config(9)))
    drafting = Stepper(decoder.forward, (4, 8, 16), drafter=Lookup())
    for stepper, hints, message in (
        (drafting, np.zeros((1, 4), np.int32), r"hints of int32\[1, 4\] for 2 prompts: give token ids of shape \[2,"),
        (drafting, np.zeros((2, 4), np.float32), r"hints of float32\[2, 4\] for 2 prompts"),
        (Stepper(decoder.forward, (4, 8)), np.zeros((2, 4), np.int32), "hints are for a drafter"),
    ):
        with pytest.raises(ValueError, match=message):
            hint_texts(stepper, hints, 2)
    drafting = Stepper(decoder.forward, (4, 8, 16), drafter=DraftModel(decoder.forward))
    with pytest.raises(ValueError, match="a DraftModel needs its state: pass drafter_state"):
        draw = functools.partial(rollout, drafting, jnp.int32(0), prompts, lengths, max_new_tokens=4)
        jax.eval_shape(draw, cache)
    with pytest.raises(ValueError, match="num_tokens=2 must hold a token of each of 4 rows"):
        jax.eval_shape(lambda cache: DraftModel(decoder.forward, num_tokens=2).create(jnp.int32(0), cache, 8), cache)


@dataclasses.dataclass(frozen=True)
class Miscounts:
    """Says that it drafts more, or fewer, tokens than there can be: as many as its state is."""

    num_drafts: int = 3

    def propose(self, state, rows, asks):
        return Drafts(jnp.full((len(asks), self.num_drafts), 5), jnp.full(len(asks), state)), state


@jax.jit
def add_miscounted_drafts(count):
    state = DecodeState.create(decoder.config(9), 16, (4, 8, 16))
    tables, _ = state.cache.tables.reserve(jnp.array([1, 0, 0, 0]))
    rows = dataclasses.replace(
        state.rows, num_known=jnp.array([2, 0, 0, 0]), limit=jnp.array([9, 0, 0, 0]), active=jnp.arange(4) == 0
    )
    state = dataclasses.replace(state.with_tables(tables, rows=rows), drafter=count)
    return add_drafts(Miscounts(), state, jnp.array([1, 0, 0, 0]), jnp.int32(8))[1]


@pytest.mark.parametrize("count, expected", [(-3, 1), (99, 1 + 2)])
def test_a_drafter_that_miscounts_costs_nobody_a_token(count, expected):
    assert add_miscounted_drafts(jnp.int32(count)).tolist() == [expected, 0, 0, 0]


def test_an_earlier_rollout_is_a_hint():
    drawn = draw(Lookup(), {})
    told = hint_texts(Stepper(decoder.forward, drafter=Lookup()), drawn._replace(lengths=drawn.lengths - 1), Q)
    assert told.shape == (Q, 49) and np.array_equal(told[:, :47], drawn.tokens[:, 0, :47])
    assert np.all(told[:, 47:] == NO_TOKEN)


def test_trust_doubles_while_drafts_are_right_and_recovers_slowly_after_they_were_not():
    update = jax.jit(functools.partial(update_trust, num_drafts=7))
    after = update(jnp.array([2.0, 4.0, 4.0, 1.0, 0.5]), jnp.array([2, 4, 4, 1, 0]), jnp.array([2, 3, 0, 0, 0]))
    assert after.tolist() == [4.0, 5.0, 2.0, 0.5, 0.515625]
    assert update(after, jnp.array([4, 4, 0, 0, 0]), jnp.array([4, 4, 0, 0, 0]))[0] == 7


def test_drafters_that_no_pass_can_hold_are_refused():
    with pytest.raises(ValueError, match="num_drafts of the drafter must be from 1 to 7, got 8"):
        Stepper(decoder.forward, drafter=Lookup(num_drafts=8))
    with pytest.raises(ValueError, match="a budget of 32 tokens a step is too small for 16 rows with 4 drafts each"):
        token_counts_for(16, 32, num_drafts=4)
    stepper = Stepper(decoder.forward, (4, 16), drafter=Lookup())
    with pytest.raises(ValueError, match="4 rows with drafts: the largest that may have drafts, 4, must hold more"):
        jax.eval_shape(lambda: step(stepper, None, DecodeState.create(decoder.config(9), 8, (4, 16))))
    with pytest.raises(ValueError, match=r"drafter=<class .*Lookup'> is no drafter: give one, such as Lookup\(\)"):
        Stepper(decoder.forward, drafter=Lookup)  # pyright: ignore[reportArgumentType]  the class, by mistake
    with pytest.raises(ValueError, match="num_matched must be at least 1, got 0"):
        Lookup(num_matched=0)


@dataclasses.dataclass(frozen=True)
class NoRepeat:
    """Never a token that was drawn an odd number of tokens ago: its state is all that a draft's rejection undoes."""

    def process(self, state, logits, tokens, num_known):
        return jnp.where(state, -jnp.inf, logits)

    def advance(self, state, drawn, drew):
        now = ~state & jax.nn.one_hot(drawn, state.shape[1], dtype=bool)
        return jnp.where(drew[:, None], now, state)


Q, NEW = 16, 48  # prompts, and the most tokens of each


@functools.cache
def program(drafter):
    """A rollout of some prompts under a processor with a state, through four rows with a drafter and three without."""
    stepper = Stepper(decoder.forward, (16, 32) if drafter else (16,), drafter=drafter, processor=NoRepeat())

    @jax.jit
    def run(cache, prompts, lengths, limits, sampling, hints):
        options = {"sampling": sampling, "limits": limits, "hints": hints if drafter else None}
        return rollout(stepper, jnp.int32(0), prompts, lengths, cache, max_new_tokens=NEW, **options)

    config = decoder.config(1 + 64, max_sequences=4 if drafter else 3)
    return functools.partial(run, KVCache.create(config))


def run(drafter, prompts, lengths, limit: int, params: list[SamplingParams], hints=None) -> Rollout:
    state = np.zeros((Q, decoder.VOCAB), bool)
    sampling = SamplingState.of([(p, 0) for p in params], processor=state, max_stop_tokens=1, max_bias_tokens=2)
    hints = np.full((Q, NEW), NO_TOKEN, np.int32) if hints is None else hints
    arrays = (np.asarray(x, np.int32) for x in (prompts, lengths, np.full(Q, limit)))
    result, cache = program(drafter)(*arrays, sampling, hints)
    assert cache.tables.num_free.tolist() == [64]
    return jax.device_get(result)


TEMPERATURE, STOP, NUM_NEW = 0.06, 6, 5
PROMPTS = [3, 1, 4, 1], [2, 7, 1, 8]


@functools.cache
def sampled(drafter) -> list[Rollout]:
    """300 samples of each of two prompts; hints say what would be drawn greedily."""
    hints = np.full((Q, NEW), NO_TOKEN, np.int32)
    texts = [prompt + decoder.dense_greedy(prompt, NUM_NEW) for prompt in PROMPTS]
    hints[:, : 4 + NUM_NEW] = np.tile(texts, (Q // 2, 1))

    def some(first_seed: int) -> Rollout:
        seeds = range(first_seed, first_seed + Q)
        params = [SamplingParams(temperature=TEMPERATURE, seed=seed, stop_tokens=(STOP,)) for seed in seeds]
        return run(drafter, np.tile(PROMPTS, (Q // 2, 1)), np.full(Q, 4), NUM_NEW, params, hints)

    return [some(first_seed) for first_seed in range(0, 600, Q)]


def test_sampled_tokens_are_those_without_drafts_whatever_is_rejected():
    accepted = rejected = 0
    for plain, drafted in zip(sampled(None), sampled(Lookup()), strict=True):
        accepted += drafted.counters.accepted_tokens
        rejected += drafted.counters.drafted_tokens - drafted.counters.accepted_tokens
        for name in ("tokens", "lengths", "finish"):
            assert np.array_equal(getattr(plain, name), getattr(drafted, name)), name
        assert np.allclose(plain.logprobs, drafted.logprobs, rtol=0, atol=1e-5)  # two programs round differently
    assert accepted > 50 and rejected > 50


def test_sampled_tokens_follow_the_decoder_s_distribution():
    """Pearson's chi-square of the second token, which is the first that may have been drafted."""
    drafted = np.concatenate([some.tokens[::2, 0, :2] for some in sampled(Lookup())])
    observed, expected = np.zeros(decoder.VOCAB), np.zeros(decoder.VOCAB)
    firsts = drafted[:, 0]
    for first in set(firsts.tolist()) - {STOP}:
        same = firsts == first
        logits = decoder.dense_logits([*PROMPTS[0], first]).astype(np.float64) / TEMPERATURE
        logits[first] = -np.inf  # the processor's rule
        weights = np.exp(logits - np.max(logits))
        expected += np.sum(same) * weights / np.sum(weights)
        observed += np.bincount(drafted[same, 1], minlength=decoder.VOCAB)
    frequent = expected >= 5
    seen = np.array([*observed[frequent], np.sum(observed[~frequent])])
    likely = np.array([*expected[frequent], np.sum(expected[~frequent])])
    chi_square, freedom = np.sum((seen - likely) ** 2 / likely), len(seen) - 1
    assert freedom >= 10 and chi_square < freedom + 4 * np.sqrt(2 * freedom), (chi_square, freedom)


FEW_TOKENS = {5: 100.0, 7: 107.0}


def draw(drafter, bias: dict[int, float], hints=None) -> Rollout:
    """Random texts, or such as repeat themselves."""
    params = [SamplingParams(temperature=1.0, seed=seed, logit_bias=bias) for seed in range(3, 3 + Q)]
    return run(drafter, np.arange(4 * Q).reshape(Q, 4), np.tile([4, 3, 2, 1], Q // 4), NEW, params, hints)


def num_steps(result: Rollout) -> int:
    return int(np.sum(result.counters.steps))


def test_a_text_that_repeats_itself_takes_fewer_steps():
    plain, drafted = (draw(drafter, FEW_TOKENS) for drafter in (None, Lookup()))
    assert np.array_equal(plain.tokens, drafted.tokens)
    assert Q * NEW / 4 >= 1.3 * num_steps(drafted), "a step for each token of a row, without drafts"


def test_what_was_drawn_before_takes_a_third_of_the_steps():
    first = draw(Lookup(), {})
    second = draw(Lookup(), {}, first.tokens[:, 0])
    assert np.array_equal(first.tokens, second.tokens)
    assert num_steps(first) >= 3 * num_steps(second)


def test_the_engine_hands_out_the_tokens_of_a_rollout_in_fewer_pieces_than_it_could_without_drafts():
    plain = draw(None, FEW_TOKENS)
    engine = Engine(
        decoder.forward, jnp.int32(0), decoder.config(1 + 64), token_counts=(16, 32), drafter=Lookup(), visit_steps=4,
        max_bias_tokens=2, processor=NoRepeat(), processor_state=jnp.zeros((4, decoder.VOCAB), bool),
    )  # fmt: skip
    lengths, prompts, pieces = (40, 17, 3), ([0, 1, 2, 3], [4, 5, 6], [8, 9]), []
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(max_new_tokens=length, temperature=1.0, seed=3 + i, logit_bias=FEW_TOKENS)
        engine.add_request(prompt, params)
    pieces = list(engine.stream())
    for i, length in enumerate(lengths):
        drawn = [token for piece in pieces if piece.request == i for token in piece.tokens]
        assert drawn == plain.tokens[i, 0, :length].tolist()
    assert len(pieces) < sum(-(-length // 4) for length in lengths)


@functools.cache
def drafted_by_model(windows=(None, None), max_new: int = 40):
    """A rollout in which a decoder drafts that adds another number to its hash; the cache it drafts with is small."""
    drafter = DraftModel(decoder.forward_with(windows), num_tokens=8)
    stepper = Stepper(decoder.forward, (16, 32), drafter=drafter)
    prompts, lengths = np.arange(60, dtype=np.int32).reshape(6, 10), np.array([10, 3, 7, 1, 9, 4], np.int32)
    config = decoder.config(1 + 40, windows=windows)

    @jax.jit
    def run(cache, offset, temperature):
        state = drafter.create(offset, KVCache.create(config), 10 + max_new)
        sampling = SamplingState.of([(SamplingParams(seed=q), q % 2) for q in range(6)])
        sampling = dataclasses.replace(sampling, temperature=sampling.temperature + temperature)
        options = {"max_new_tokens": max_new, "num_samples": 2, "sampling": sampling, "drafter_state": state}
        return rollout(stepper, jnp.int32(0), prompts, lengths, cache, **options)

    def start(offset: int, temperature: float) -> Rollout:
        result, cache = run(KVCache.create(decoder.config(1 + 40)), jnp.int32(offset), jnp.float32(temperature))
        assert cache.tables.num_free.tolist() == [40]
        return jax.device_get(result)

    return start


@pytest.mark.parametrize(
    "windows",
    [pytest.param((None, None), id="plain"), pytest.param((None, 6), id="hybrid", marks=pytest.mark.long)],
)
def test_a_draft_model_changes_nothing_that_is_drawn(windows):
    good, bad = (drafted_by_model(windows)(offset, 1.0) for offset in (0, 1))
    assert np.array_equal(good.tokens, bad.tokens)
    for q, prompt in enumerate(np.arange(60).reshape(6, 10).tolist()):
        greedy = drafted_by_model(windows)(q % 2, 0.0).tokens[q, 0].tolist()
        assert greedy == decoder.dense_greedy(prompt[: (10, 3, 7, 1, 9, 4)[q]], 40)
    assert bad.counters.drafted_tokens - bad.counters.accepted_tokens > 50
    if windows == (None, None):
        assert good.counters.accepted_tokens == good.counters.drafted_tokens, "it is the decoder itself"
        assert num_steps(bad) >= 2 * num_steps(good)
