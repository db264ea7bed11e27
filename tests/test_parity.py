"""The shipped model on real text: greedy tokens over the paged cache are those of a dense forward."""

import inspect
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import models
from paged_jax.engine import Engine
from paged_jax.sampling import SamplingParams

NEW_TOKENS = 8
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def model():
    return models.load(models.DEMO, "float32", stacked=True)


def pieces(model, number: int, longest: int) -> list[list[int]]:
    """Prompts from a module of the standard library, from 1 token to so many."""
    text = model.tokenizer.encode(inspect.getsource(random))
    rng = np.random.default_rng(0)
    lengths = np.geomspace(1, longest, number).round().astype(int)
    starts = [rng.integers(0, len(text) - n) for n in lengths]
    return [text[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def make_engine(model, page_size=16, **options):
    config = model.cache_config(
        num_pages=8192 // page_size + 1,
        max_sequences=16,
        max_pages_per_sequence=1536 // page_size,
        page_size=page_size,
    )
    return Engine(model.forward, model.params, config, token_counts=(16, 128), **options)


def drawn(completions):
    return [list(samples[0].tokens) for samples in completions]


@pytest.mark.parametrize(
    ("number", "longest", "page_size"),
    [(40, 300, 16), *(pytest.param(104, 1500, size, marks=pytest.mark.long) for size in (16, 64))],
)
def test_greedy_tokens_equal_a_dense_forward_of_the_whole_context(model, number, longest, page_size):
    # The tokens are greedy for the dense forward if each is the most likely after the prompt and those before it.
    @jax.jit
    def greedy_after(tokens):
        return jnp.argmax(model.dense_forward(model.params, tokens), axis=-1)

    prompts = pieces(model, number, longest)
    paged = drawn(make_engine(model, page_size).generate(prompts, PARAMS))
    assert len({tuple(tokens) for tokens in paged}) > number // 2, "the texts differ"
    for prompt, tokens in zip(prompts, paged, strict=True):
        whole = prompt + tokens
        size = next(size for size in (64, longest + NEW_TOKENS) if size >= len(whole))
        dense = np.asarray(greedy_after(jnp.asarray(whole + [0] * (size - len(whole)), jnp.int32)))
        assert dense[len(prompt) - 1 : len(whole) - 1].tolist() == tokens, f"prompt of {len(prompt)} tokens"


def test_cached_cold_alone_and_batched_prompts_give_the_same_tokens(model):
    prompts = pieces(model, 40, 300)
    common = prompts[-1]
    texts = [common + prompt for prompt in prompts[5:25:4]]
    without_cache, engine = make_engine(model, prefix_cache=False), make_engine(model)
    cold = drawn(without_cache.generate(texts, PARAMS))
    assert drawn(engine.generate(texts, PARAMS)) == cold
    assert drawn(engine.generate(texts, PARAMS)) == cold, "every prompt was cached"
    assert [drawn(without_cache.generate([text], PARAMS))[0] for text in texts] == cold
