"""Beam searches as requests of an engine, beside samples."""

import numpy as np
import pytest

import hash_decoder as decoder
import plain_beams
from engine_cases import Numbers, pool_is_empty
from paged_jax import Automaton, Completion, Engine, Lookup
from paged_jax.sampling import BeamParams, SamplingParams

CONFIG = decoder.config(64, max_sequences=9)  # two groups of four rows, and a row of no group
STOPS = (5, 9, 60, 61, 62, 63)


def engine(**options) -> Engine:
    options = {"max_beams": 4, "token_counts": (16, 32), "visit_steps": 4} | options
    return Engine(decoder.forward, np.int32(0), CONFIG, Numbers(), **options)


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, decoder.VOCAB, n).tolist() for n in lengths]


def expected(prompt: list[int], params: BeamParams, is_allowed=None) -> list[plain_beams.Sequence]:
    def logprobs_after(drawn):
        logits = decoder.dense_logits([*prompt, *drawn]).astype(np.float64)
        logprobs = logits - np.log(np.sum(np.exp(logits)))
        return logprobs if is_allowed is None else np.where(is_allowed(drawn), logprobs, -np.inf)

    sizes = params.width, params.max_new_tokens
    rules = {"penalty": params.length_penalty, "early": params.early_stopping, "stop": tuple(params.stop_tokens)}
    return plain_beams.search(logprobs_after, *sizes, **rules)[: params.num_return]


def check(found: list[Completion], wanted: list[plain_beams.Sequence]) -> None:
    assert [sequence.tokens for sequence in found] == [sequence.tokens for sequence in wanted]
    for one, sequence in zip(found, wanted, strict=True):
        assert one.score == pytest.approx(sequence.score, abs=1e-5)
        assert sum(one.logprobs) == pytest.approx(sequence.total, abs=1e-5)
        assert one.text == Numbers().decode(one.tokens)


def test_searches_of_several_widths_and_rules_run_beside_samples():
    texts = prompts(9, 20, 3, 14, 30, 7)
    each = [
        BeamParams(4, 10, 3, 1.0, False, STOPS),
        SamplingParams(max_new_tokens=12, num_samples=3),
        BeamParams(2, 8, length_penalty=0.5, early_stopping=True, stop_tokens=STOPS),
        BeamParams(3, 6, length_penalty=2.0, early_stopping="never", stop_tokens=STOPS),
        SamplingParams(max_new_tokens=5),
        BeamParams(1, 7),
    ]
    g = engine()
    for text, params, found in zip(texts, each, g.generate(texts, each), strict=True):
        if isinstance(params, BeamParams):
            check(found, expected(text, params))
        else:
            greedy = decoder.dense_greedy(text, params.max_new_tokens)
            assert [list(one.tokens) for one in found] == [greedy] * params.num_samples
            assert found[0].score is None
    assert pool_is_empty(g)
    g.generate(texts[0], each[0])  # which finds cached pages
    compiled = g.stats().compilations
    for text, params in zip(texts, reversed(each), strict=True):
        g.generate(text, params)
    assert g.stats().compilations == compiled, "widths, rules and penalties are data"


def test_a_search_waits_for_a_group_of_rows_and_takes_those_of_lower_priority():
    (text,) = prompts(10)
    g = engine()
    samples = g.add_request(text, SamplingParams(max_new_tokens=30, num_samples=9))
    while g.stats().running < 9:
        g.step()
    later = g.add_request(text, BeamParams(4, 6))
    for _ in range(3):
        g.step()
    assert g.stats().running == 9 and g.stats().waiting == 1, "it came later"
    urgent = g.add_request(text, BeamParams(4, 6), priority=-1)
    pieces = list(g.stream(urgent))
    check([Completion.join([piece]) for piece in pieces], expected(text, BeamParams(4, 6)))
    assert g.stats().preemptions == 4
    check([Completion.join([piece]) for piece in g.stream(later)], expected(text, BeamParams(4, 6)))
    assert len({piece.sample for piece in g.stream(samples)}) == 9 and pool_is_empty(g)


def test_the_pages_of_a_prompt_are_found_by_later_searches_and_samples():
    (text,) = prompts(22)
    params = BeamParams(4, 5)
    g = engine()
    for _ in range(2):
        check(g.generate(text, params)[0], expected(text, params))
    computed = 22 + 4 * 4 + 1 + 4 * 4
    assert g.stats().computed_tokens == computed, "the second search finds all but the last token"
    g.generate(text, SamplingParams(max_new_tokens=1))
    assert g.stats().computed_tokens == computed + 1 and pool_is_empty(g)


def test_a_search_that_is_aborted_leaves_nothing():
    g = engine()
    number = g.add_request(prompts(10)[0], BeamParams(4, 40))
    for _ in range(4):
        g.step()
    g.abort(number)
    assert not g.step() and not g.has_work and g.stats().running == 0
    check(g.generate(prompts(10), BeamParams(4, 6))[0], expected(prompts(10)[0], BeamParams(4, 6)))
    assert pool_is_empty(g)


@pytest.mark.long  # a program of its own; a search under a trie stands in tests/sampling/test_automaton.py
def test_only_sequences_of_a_trie_are_found_and_no_more_than_there_are():
    text, sequences = prompts(8)[0], [(7, 3, 11), (7, 3, 20), (50, 1, 2)]
    trie = Automaton.of_sequences(sequences, 96, decoder.VOCAB)
    options = {"processor": trie, "processor_state": trie.start(CONFIG.max_sequences), "token_counts": (16,)}
    g = engine(**options, stop_tokens=(96,))

    def is_allowed(drawn):
        whole = [(*sequence, 96) for sequence in sequences]
        return np.isin(np.arange(decoder.VOCAB), [s[len(drawn)] for s in whole if s[: len(drawn)] == tuple(drawn)])

    params = BeamParams(4, 8, stop_tokens=(96,))
    (found,) = g.generate([text], params)
    check(found, expected(text, params, is_allowed))
    assert {one.tokens[:-1] for one in found} == set(sequences) and len(found) == 3


def test_what_cannot_be_is_named():
    (text,) = prompts(10)
    with pytest.raises(ValueError, match=r"BeamParams\(width=5.* of an Engine with max_beams=4: narrow the search"):
        engine().add_request(text, BeamParams(5, 6))
    with pytest.raises(ValueError, match="best_of=3 is for samples"):
        engine().add_request(text, BeamParams(2, 6), best_of=3)
    with pytest.raises(ValueError, match=r"max_beams=10\): beams need a row each, so give a number from 0 to"):
        engine(max_beams=10)
    with pytest.raises(ValueError, match="drafts are for rows that draw; leave one out"):
        engine(drafter=Lookup(2), token_counts=(16, 32))
    with pytest.raises(ValueError, match="10 tokens with max_new_tokens=54 and 4 beams needs 58 pages, but the pool"):
        Engine(decoder.forward, np.int32(0), decoder.config(50, 4), max_beams=4).add_request(text, BeamParams(4, 54))
    wrong = [("width", 0, "at least 1"), ("num_return", 9, "from 1 to width=4"), ("length_penalty", np.nan, "a number")]
    wrong += [("early_stopping", "soon", 'True, False or "never"'), ("stop_tokens", 5, r"write \(5,\)")]
    for field, value, rule in wrong:
        with pytest.raises(ValueError, match=rf"BeamParams\({field}=.*{rule}"):
            BeamParams(**{field: value})
