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

NUM_PROMPTS, LONGEST, NEW_TOKENS = 104, 1500, 8
PARAMS = SamplingParams(max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def model():
    return models.load(models.DEMO, "float32")


@pytest.fixture(scope="module")
def prompts(model):
    """Pieces of a module of the standard library, from 1 to 1500 tokens."""
    text = model.tokenizer.encode(inspect.getsource(random))
    rng = np.random.default_rng(0)
    lengths = np.geomspace(1, LONGEST, NUM_PROMPTS).round().astype(int)
    starts = [rng.integers(0, len(text) - n) for n in lengths]
    return [text[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def make_engine(model, page_size=16, max_sequences=16, **options):
    config = model.cache_config(
        num_pages=8192 // page_size + 1,
        max_sequences=max_sequences,
        max_pages_per_sequence=1536 // page_size,
        page_size=page_size,
    )
    return Engine(model.forward, model.params, config, token_counts=(16, 512), **options)


def drawn(completions):
    return [list(samples[0].tokens) for samples in completions]


def test_greedy_tokens_equal_a_dense_forward_of_the_whole_context(model, prompts):
    # The tokens are greedy for the dense forward if each is the most likely after the prompt and those before it.
    @jax.jit
    def greedy_after(tokens):
        return jnp.argmax(model.dense_forward(model.params, tokens), axis=-1)

    paged = drawn(make_engine(model, page_size=16).generate(prompts, PARAMS))
    assert drawn(make_engine(model, page_size=64).generate(prompts[::4], PARAMS)) == paged[::4]
    assert len(paged) >= 100 and len({tuple(tokens) for tokens in paged}) > 50, "the texts differ"
    for prompt, tokens in zip(prompts, paged, strict=True):
        whole = prompt + tokens
        size = next(size for size in (64, 256, 640, LONGEST + NEW_TOKENS) if size >= len(whole))
        dense = np.asarray(greedy_after(jnp.asarray(whole + [0] * (size - len(whole)), jnp.int32)))
        assert dense[len(prompt) - 1 : len(whole) - 1].tolist() == tokens, f"prompt of {len(prompt)} tokens"


def test_cached_cold_alone_and_batched_prompts_give_the_same_tokens(model, prompts):
    common = prompts[80]
    texts = [common + prompt for prompt in prompts[10:40:6]]
    cold = drawn(make_engine(model, prefix_cache=False).generate(texts, PARAMS))
    engine = make_engine(model)
    assert drawn(engine.generate(texts, PARAMS)) == cold
    assert drawn(engine.generate(texts, PARAMS)) == cold, "every prompt was cached"
    alone = make_engine(model, max_sequences=1)
    assert [drawn(alone.generate([text], PARAMS))[0] for text in texts] == cold
