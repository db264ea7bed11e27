"""The generator on a toy decoder: admission, sharing, shortage, and the same tokens whatever runs beside a request."""

from typing import Any

import numpy as np
import pytest

import toy
from paged_jax.generator import Generator, generate
from paged_jax.sampling import SamplingParams

PARAMS = toy.init_params()
GREEDY = SamplingParams(max_new_tokens=12)


def generator(config=None, **options):
    defaults: dict[str, Any] = {"prefill_tokens": 32, "steps_per_visit": 4}
    return Generator(toy.forward, PARAMS, config or toy.config(), **(defaults | options))


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, toy.VOCAB, n).tolist() for n in lengths]


def tokens(completions):
    return [[list(sample.tokens) for sample in samples] for samples in completions]


def pool_is_empty(generator):
    """After the cache let go of its pages, nothing is left."""
    if generator.cache is not None:
        generator._evict(np.array([generator.config.num_pages]))
    return int(generator.state.tables.num_free[0]) == generator.config.num_pages - 1


def test_more_prompts_than_rows_each_get_their_own_tokens():
    texts = prompts(1, 2, 30, 7, 8, 9, 40, 3, 17)
    g = generator()
    assert tokens(g.run(texts, GREEDY)) == [[toy.dense_greedy(PARAMS, p, 12)] for p in texts]
    assert pool_is_empty(g)


def test_a_prompt_longer_than_a_prefill_step_is_cut():
    texts = prompts(50, 33, 32, 31, 5)
    for prefill_tokens in (7, 32):
        g = generator(prefill_tokens=prefill_tokens)
        assert tokens(g.run(texts, SamplingParams(max_new_tokens=6))) == [
            [toy.dense_greedy(PARAMS, p, 6)] for p in texts
        ]


def test_cached_and_cold_prompts_give_the_same_tokens():
    (common,) = prompts(21)
    texts = [common + tail for tail in prompts(1, 6, 9, seed=1)] + [common, common[:9]]
    cold = generator(prefix_cache=False).run(texts, GREEDY)
    g = generator()
    first, second = g.run(texts, GREEDY), g.run(texts, GREEDY)
    assert tokens(first) == tokens(second) == tokens(cold)
    assert tokens(cold) == [[toy.dense_greedy(PARAMS, p, 12)] for p in texts]
    assert pool_is_empty(g)


def test_prompts_with_a_common_beginning_compute_it_once(monkeypatch):
    (common,) = prompts(24)
    texts = [common + tail for tail in prompts(3, 4, 5, seed=1)]
    computed = []
    inner = Generator._compute_contexts

    def counting(self, samples):
        computed.append(sum(len(s.context) - s.num_cached for s in samples))
        inner(self, samples)

    monkeypatch.setattr(Generator, "_compute_contexts", counting)
    generator().run(texts, GREEDY)
    assert sum(computed) == 24 + (2 + 3 + 4)
    computed.clear()
    generator(prefix_cache=False).run(texts, GREEDY)
    assert sum(computed) == 3 * 24 + (2 + 3 + 4)


def test_samples_of_a_prompt_share_its_pages_and_equal_those_drawn_alone():
    (prompt,) = prompts(23)
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, num_samples=4)
    g = generator()
    g.submit(prompt, params)
    g._admit()
    in_use = g.config.num_pages - 1 - int(g.state.tables.num_free[0])
    assert in_use == 6, "22 tokens of context in pages of 4, once"
    together = tokens(generator().run([prompt], params))[0]
    assert len({tuple(sample) for sample in together}) == 4
    one_row = generator(toy.config(max_sequences=1))
    assert tokens(one_row.run([prompt], params))[0] == together


def test_greedy_samples_agree_with_one():
    (prompt,) = prompts(10)
    many = tokens(generator().run([prompt], SamplingParams(max_new_tokens=9, num_samples=3)))[0]
    assert many == [toy.dense_greedy(PARAMS, prompt, 9)] * 3


@pytest.mark.parametrize(("temperature", "prefix_cache"), [(0.0, True), (1.0, False)])
def test_when_pages_run_short_samples_are_preempted_and_draw_the_same_tokens(temperature, prefix_cache):
    texts = prompts(17, 18, 19, 20, 21)
    params = SamplingParams(max_new_tokens=30, temperature=temperature, seed=5)
    plenty = tokens(generator().run(texts, params))
    preempted = []

    class Counting(Generator):
        def _release(self, samples):
            preempted.extend(s for s in samples if s.remaining > 0)
            super()._release(samples)

    config = toy.config(num_pages=1 + 16)
    g = Counting(toy.forward, PARAMS, config, prefill_tokens=32, steps_per_visit=4, prefix_cache=prefix_cache)
    assert tokens(g.run(texts, params)) == plenty
    assert preempted
    assert pool_is_empty(g)


def test_the_pool_may_be_exactly_as_large_as_one_request():
    texts = prompts(20, 20)
    g = generator(toy.config(num_pages=1 + 8))
    params = SamplingParams(max_new_tokens=13)  # 32 tokens are cached at the end: 8 pages
    assert tokens(g.run(texts, params)) == [[toy.dense_greedy(PARAMS, p, 13)] for p in texts]


def test_stop_tokens_stop_strings_and_max_tokens_end_at_the_same_token_alone_and_in_a_batch():
    texts = prompts(6, 9, 12)

    def decode_text(ids):
        return "".join(chr(65 + t) for t in ids)

    runs = [toy.dense_greedy(PARAMS, p, 12) for p in texts]
    params = [
        SamplingParams(max_new_tokens=12, stop_tokens=(runs[0][5],)),
        SamplingParams(max_new_tokens=12, stop_strings=(decode_text(runs[1][4:7]),)),
        SamplingParams(max_new_tokens=7),
    ]
    batch = generator(decode_text=decode_text).run(texts, params)
    expected = [runs[0][: runs[0].index(runs[0][5]) + 1], None, runs[2][:7]]
    text = decode_text(runs[1])
    expected[1] = runs[1][: text.index(decode_text(runs[1][4:7])) + 3]
    assert [list(samples[0].tokens) for samples in batch] == expected
    assert [samples[0].finish for samples in batch] == ["stop", "stop", "length"]
    for text, each, together in zip(texts, params, batch, strict=True):
        assert generator(decode_text=decode_text).run([text], each) == [together]


def test_chunks_stream_in_order_and_requests_may_come_meanwhile():
    texts = prompts(5, 6)
    g = generator()
    g.submit(texts[0], GREEDY)
    received = {0: [], 1: []}
    for chunk in g.stream():
        if not received[1] and len(received[0]) == 0:
            assert g.submit(texts[1], GREEDY) == 1
        assert 0 < len(chunk.tokens) <= 4
        received[chunk.request] += chunk.tokens
    assert [received[0], received[1]] == [toy.dense_greedy(PARAMS, p, 12) for p in texts]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_aborted_request_frees_its_pages_at_once_and_the_others_go_on(after):
    texts = prompts(9, 10, 11)
    g = generator(prefix_cache=False)
    for text in texts:
        g.submit(text, GREEDY)
    if after == 0:
        g.abort(1)
    received = {0: [], 1: [], 2: []}
    for count, chunk in enumerate(g.stream()):
        received[chunk.request] += chunk.tokens
        if count == 2 * after and after:
            g.abort(1)
            rows = [row for row, sample in g._running.items() if sample.request == 1]
            assert not rows
    for request in (0, 2):
        assert received[request] == toy.dense_greedy(PARAMS, texts[request], 12)
    assert len(received[1]) < 12
    assert pool_is_empty(g)


def test_nothing_is_compiled_again_after_the_first_run():
    traces = []

    def forward(*arguments):
        traces.append(1)
        return toy.forward(*arguments)

    g = Generator(forward, PARAMS, toy.config(), prefill_tokens=32, steps_per_visit=4)
    g.run(prompts(3, 30, 9), [GREEDY, SamplingParams(max_new_tokens=5, temperature=1.0, num_samples=2), GREEDY])
    compiled = len(traces)
    for seed in range(3):
        many = SamplingParams(max_new_tokens=4 + seed, temperature=0.5, top_k=3, num_samples=2, seed=seed)
        g.run(prompts(1, 14, 22, 8, 31, seed=seed), many)
    assert len(traces) == compiled


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "the prompt has 0 tokens; it needs at least 1"),
        ([1] * 60, SamplingParams(max_new_tokens=6), "prompt of 60 tokens .* needs a row of 65 tokens, .* hold 64"),
        ([1] * 50, SamplingParams(max_new_tokens=10), "needs 15 pages, but the pool has 8 .* num_pages to 16"),
        ([1], SamplingParams(max_new_tokens=2, stop_tokens=tuple(range(9))), "9 stop tokens; at most 8"),
        ([1], SamplingParams(max_new_tokens=2, stop_strings=("x",)), "pass decode_text to the Generator"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_at_once(prompt, params, message):
    g = generator(toy.config(num_pages=9))
    with pytest.raises(ValueError, match=message):
        g.submit(prompt, params)
    assert tokens(g.run(prompts(4), GREEDY)) == [[toy.dense_greedy(PARAMS, prompts(4)[0], 12)]], "nothing was lost"


@pytest.mark.parametrize("wish", [{"min_new_tokens": 2}, {"presence_penalty": 0.5}, {"logit_bias": {3: 1.0}}])
def test_a_wish_that_it_would_ignore_is_refused(wish):
    with pytest.raises(NotImplementedError, match=f"{next(iter(wish))}=.*: the Generator does not support it"):
        generator().submit([1], SamplingParams(max_new_tokens=4, **wish))


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"prefill_tokens=0\): prefill_tokens must be at least 1"):
        generator(prefill_tokens=0)
    with pytest.raises(ValueError, match="steps_per_visit must be at least 1"):
        generator(steps_per_visit=0)


def test_generate_is_a_generator_run_once():
    texts = prompts(4, 11)
    result = generate(toy.forward, PARAMS, texts, GREEDY, config=toy.config(), steps_per_visit=5)
    assert tokens(result) == [[toy.dense_greedy(PARAMS, p, 12)] for p in texts]
