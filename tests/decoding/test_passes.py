"""Which of the compiled passes runs a step, and that it changes nothing but the time."""

import dataclasses
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import Engine, KVCache, Lookup, SamplingParams, Stepper, rollout, token_counts_for

HYBRID = (None, 6)


@pytest.mark.parametrize(
    ("prefill_passes", "counts", "expected"),
    [
        (1, (1, 0, 1, 1), 8),
        (1, (8, 8, 1, 0), 32),
        (1, (9, 0, 0, 0), 64),
        (2, (1, 1, 1, 1), 8),
        (2, (8, 8, 1, 0), 32),
        (2, (9, 0, 0, 0), 32),
        (2, (9, 20, 1, 2), 32),
        (2, (30, 1, 1, 1), 64),
        (3, (9, 0, 0, 0), 16),
        (4, (9, 0, 0, 0), 16),
    ],
)
def test_a_step_runs_the_smallest_pass_that_holds_it_and_can_prefill_where_it_must(prefill_passes, counts, expected):
    stepper = Stepper(decoder.forward, (8, 16, 32, 64), prefill_passes=prefill_passes)
    assert stepper.token_counts[int(stepper.choose_pass(jnp.array(counts, jnp.int32)))] == expected
    assert stepper.prefills(expected) or max(counts) <= 8


@pytest.mark.long  # two more programs of the steps that the engine below runs
@pytest.mark.parametrize("drafter", [None, Lookup(num_drafts=2)], ids=["plain", "drafts"])
def test_prompts_of_all_lengths_draw_what_a_dense_forward_does_in_passes_of_their_size(drafter):
    lens = np.array([3, 9, 16, 17, 30, 12], np.int32)
    prompts = np.random.default_rng(0).integers(0, decoder.VOCAB, (len(lens), 30)).astype(np.int32)
    stepper = Stepper(decoder.forward_with(HYBRID), (8, 16, 32), prefill_passes=2, drafter=drafter)

    @functools.partial(jax.jit, donate_argnums=0)
    def draw(cache, prompts, lens, limits):
        options = {"max_new_tokens": 6, "sampling": SamplingParams(temperature=0.0), "limits": limits}
        return rollout(stepper, jnp.int32(0), prompts, lens, cache, **options)

    config = decoder.config(1 + 56, windows=HYBRID)
    result, cache = draw(KVCache.create(config), prompts, lens, np.full(len(lens), 6, np.int32))
    for prompt, length, tokens in zip(prompts, lens, result.tokens[:, 0], strict=True):
        assert tokens.tolist() == decoder.dense_greedy(prompt[:length].tolist(), 6, HYBRID, ())
    # The last prompts come in beside rows that decode; a prompt by itself runs a pass of its size.
    only = np.arange(len(lens)) == 2
    for length, size in ((3, 8), (9, 16), (16, 16), (17, 32)):
        sizes = np.where(only, length, 1), np.where(only, 6, 0)  # a prompt that may draw nothing computes nothing
        alone, cache = draw(cache, prompts, *(x.astype(np.int32) for x in sizes))
        steps = dict(zip(stepper.token_counts, alone.counters.steps.tolist(), strict=True))
        assert steps[size] >= 1 and not sum(n for t, n in steps.items() if t > max(size, 8))


def test_an_engine_computes_prompts_in_passes_of_their_size():
    """With a drafter that finds nothing to draft in most of these texts."""
    config, passes = decoder.config(1 + 56), {"token_counts": (8, 16, 32), "prefill_passes": 2}
    engine = Engine(decoder.forward, np.int32(0), config, drafter=Lookup(num_drafts=2), **passes)

    def check(*lengths: int) -> dict[int, int]:
        """Prompts of these lengths draw what they should; the steps of each size that it took."""
        prompts = [np.random.default_rng(n).integers(0, decoder.VOCAB, n).tolist() for n in lengths]
        before = engine.stats().steps
        completions = engine.generate(prompts, SamplingParams(max_new_tokens=4))
        for prompt, (completion,) in zip(prompts, completions, strict=True):
            assert list(completion.tokens) == decoder.dense_greedy(prompt, 4)
        return {size: count - before[size] for size, count in engine.stats().steps.items()}

    check(3, 9, 16, 17, 31, 11)  # the last come in beside rows that decode
    for length, size in ((4, 8), (10, 16), (15, 16), (18, 32), (30, 32)):
        expected = {8: 3, 16: 0, 32: 0}
        expected[size] += 1
        assert check(length) == expected


def test_passes_that_do_not_fit_together_are_named():
    unchecked: Any = getattr(Stepper.__post_init__, "__wrapped__", Stepper.__post_init__)
    for passes in (0, 3, 2.0, None, True):
        stepper = Stepper(decoder.forward, (8, 64))
        object.__setattr__(stepper, "prefill_passes", passes)  # as where nobody checks the annotations
        with pytest.raises(ValueError, match=rf"prefill_passes={passes} of token_counts=\(8, 64\): .* from 1 to 2"):
            unchecked(stepper)
    with pytest.raises(ValueError, match="prefill_passes=3 halve a budget of 256 tokens down to 64, but .* to 260"):
        token_counts_for(64, prefill_passes=3)
    with pytest.raises(ValueError, match="prefill_passes=0 must be an integer of at least 1"):
        token_counts_for(64, prefill_passes=0)


def test_a_stepper_takes_no_hash_along_to_another_process():
    stepper = Stepper(decoder.forward, (8, 64))
    expected = hash(stepper)
    there = pickle.loads(pickle.dumps(stepper))
    assert set(vars(there)) == {field.name for field in dataclasses.fields(Stepper)}
    assert there == stepper and hash(there) == expected
