"""Layers with windows give up pages, and prefixes are found all the same, where prompts part and where turns end.

The engine may run beam searches, too, so that one program does for all.
"""

import numpy as np

import hash_decoder as decoder
from engine_cases import pool_is_empty
from paged_jax.engine.core import Core
from paged_jax.sampling import SamplingParams
from traffic_cases import HYBRID, make_engine, run_traffic

PARAMS = SamplingParams(max_new_tokens=4)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, decoder.VOCAB, length).tolist()


def test_prompts_that_begin_alike_compute_their_beginning_once():
    common = text(0, 24)
    prompts = [common + text(seed, 3) for seed in range(1, 6)]
    engine = make_engine(HYBRID, max_beams=2)
    completions = engine.generate(prompts, PARAMS)
    assert [list(sample.tokens) for (sample,) in completions] == [
        decoder.dense_greedy(prompt, 4, HYBRID) for prompt in prompts
    ]
    assert engine.stats().computed_tokens == 24 + 5 * (3 + 3), "what one computed, the others found"
    later = common + text(7, 6)
    before = engine.stats()
    assert list(engine.generate([later], PARAMS)[0][0].tokens) == decoder.dense_greedy(later, 4, HYBRID)
    assert engine.stats().cached_tokens - before.cached_tokens == 24
    assert pool_is_empty(engine)


def test_a_prompt_that_parts_from_a_known_one_is_published_where_it_does():
    engine, first = make_engine(HYBRID, max_beams=2), text(0, 30)
    engine.generate([first], PARAMS)
    computed = []
    for seed in (1, 2):
        prompt = first[:20] + text(seed, 5)
        before = engine.stats().computed_tokens
        assert list(engine.generate([prompt], PARAMS)[0][0].tokens) == decoder.dense_greedy(prompt, 4, HYBRID)
        computed.append(engine.stats().computed_tokens - before)
    assert computed == [25 + 3, 5 + 3], "the second finds where the first parted"


def test_each_turn_of_a_conversation_computes_only_what_is_new():
    engine, history = make_engine(HYBRID, max_beams=2), []
    for turn in range(8):
        said = text(turn, 3)
        history += said
        before = engine.stats().computed_tokens
        ((answer,),) = engine.generate([history], PARAMS)
        assert list(answer.tokens) == decoder.dense_greedy(history, 4, HYBRID)
        assert engine.stats().computed_tokens - before == len(said) + 3 + (turn > 0)
        history += answer.tokens


def test_random_traffic_with_beams(monkeypatch):
    """One of the two groups of rows, or both, or none, hold beams; the others draw meanwhile."""
    again, begin_again = [], Core._begin_searches_again
    monkeypatch.setattr(Core, "_begin_searches_again", lambda core: (again.append(core), begin_again(core)))
    statistics = run_traffic(30, seed=36, windows=HYBRID, max_beams=2).stats()
    assert again, "beams that share nothing any more began again"
    assert statistics.preemptions > 5 and statistics.cached_tokens > 100 and statistics.evicted_pages > 10, statistics
