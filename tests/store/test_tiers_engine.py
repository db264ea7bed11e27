"""An engine whose pages go to host memory and to a store, and come back: always the tokens of a cold one."""

import numpy as np
import pytest

import hash_decoder as decoder
from engine_cases import pool_is_empty
from paged_jax.engine import Engine
from paged_jax.sampling import SamplingParams
from paged_jax.store import Store

GREEDY = SamplingParams(max_new_tokens=6)
HYBRID = (None, 9)
CONFIGS = {
    "plain": decoder.config(1 + 16),
    "windows": decoder.config(1 + 16, windows=HYBRID, window_pages=1 + 14),
}


def make(config=CONFIGS["plain"], windows=(None, None), params=0, **options):
    forward = decoder.forward if windows == (None, None) else decoder.forward_with(windows)
    options = {"token_counts": (8, 32), "visit_steps": 4} | options
    return Engine(forward, np.int32(params), config, **options)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, decoder.VOCAB, length).tolist()


def run(engine, prompts, windows=(None, None), params=GREEDY):
    tokens = [[list(s.tokens) for s in samples] for samples in engine.generate(prompts, params)]
    assert tokens == [[decoder.dense_greedy(p, 6, windows)] for p in prompts]
    return engine.stats()


def test_what_the_pool_gives_up_comes_back_from_host_memory():
    engine = make(host_cache_bytes=1 << 20)
    prompts = [text(seed, 33) for seed in range(4)]
    for prompt in prompts:
        run(engine, [prompt])
    before = engine.stats()
    assert before.evicted_pages > 0 and before.tier_pages["host"] > 0
    for prompt in prompts:
        run(engine, [prompt])
    after = engine.stats()
    assert after.computed_tokens - before.computed_tokens <= 4 * (6 + 4)
    assert after.loaded_tokens["host"] > 0
    assert pool_is_empty(engine)


@pytest.mark.parametrize("name, windows", [("plain", (None, None)), ("windows", HYBRID)])
def test_a_conversation_goes_on_after_a_restart(tmp_path, name, windows):
    prompts = [text(seed, 33) for seed in range(4)]
    first = make(CONFIGS[name], windows, store=Store(tmp_path))
    cold = run(first, prompts, windows)
    first.flush()
    answers = [decoder.dense_greedy(prompt, 6, windows) for prompt in prompts]
    turns = [prompt + answer + text(9, 5) for prompt, answer in zip(prompts, answers, strict=True)]
    second = make(CONFIGS[name], windows, store=Store(tmp_path))
    warm = run(second, turns, windows)
    assert cold.computed_tokens == 4 * (33 + 5) and cold.loaded_tokens == {}
    assert warm.loaded_tokens == {"store": 4 * 38}, "to the last token, which is in the middle of a page"
    assert warm.computed_tokens == 4 * (1 + 5 + 5)
    assert pool_is_empty(second)
