"""The generator: admission, sharing, shortage, and the same tokens whatever runs beside a request."""

from typing import Any

import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax.generator import Generator
from paged_jax.sampling import SamplingParams

PARAMS = np.int32(0)
GREEDY = SamplingParams(max_new_tokens=12)
CONFIG = decoder.config(64)


def generator(config=None, **options):
    defaults: dict[str, Any] = {"token_counts": (8, 32), "steps_per_visit": 4}
    return Generator(decoder.forward, PARAMS, config or CONFIG, **(defaults | options))


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, decoder.VOCAB, n).tolist() for n in lengths]


def tokens(completions):
    return [[list(sample.tokens) for sample in samples] for samples in completions]


def pool_is_empty(generator):
    """Nothing holds a page but the prefix cache."""
    free = int(generator.state.cache.tables.num_free[0])
    cached = 0 if generator.cache is None else generator.cache.num_pages
    return free + cached == generator.config.num_pages - 1


def test_more_prompts_than_rows_each_get_their_own_tokens():
    texts = prompts(1, 2, 30, 7, 8, 9, 40, 3, 17)
    g = generator()
    assert tokens(g.run(texts, GREEDY)) == [[decoder.dense_greedy(p, 12)] for p in texts]
    assert pool_is_empty(g)


def test_a_prompt_longer_than_a_step_is_cut():
    texts = prompts(50, 33, 32, 31, 5)
    expected = [[decoder.dense_greedy(p, 6)] for p in texts]
    for counts in ((7,), (8, 32)):
        assert tokens(generator(token_counts=counts).run(texts, SamplingParams(max_new_tokens=6))) == expected


def test_log_probabilities_are_the_models_own():
    (text,) = prompts(20)
    for params in (GREEDY, SamplingParams(max_new_tokens=12, temperature=0.3, top_k=5, seed=1)):
        ((completion,),) = generator().run([text], params)
        expected = decoder.dense_logprobs(text, list(completion.tokens))
        assert np.allclose(completion.logprobs, expected, atol=1e-5, rtol=0)


def test_cached_and_cold_prompts_give_the_same_tokens():
    (common,) = prompts(21)
    texts = [common + tail for tail in prompts(1, 6, 9, seed=1)] + [common, common[:9]]
    cold = generator(prefix_cache=False).run(texts, GREEDY)
    g = generator()
    first, second = g.run(texts, GREEDY), g.run(texts, GREEDY)
    assert tokens(first) == tokens(second) == tokens(cold)
    assert tokens(cold) == [[decoder.dense_greedy(p, 12)] for p in texts]
    assert pool_is_empty(g)


def test_prompts_with_a_common_beginning_compute_it_once():
    (common,) = prompts(24)
    texts = [common + tail for tail in prompts(3, 4, 5, seed=1)]

    def computed(g):
        g.run(texts, GREEDY)
        return int(g.state.counters.computed_tokens)

    drawn_and_computed = 3 * 11
    assert computed(generator()) == 24 + (3 + 4 + 5) + drawn_and_computed
    assert computed(generator(prefix_cache=False)) == 3 * 24 + (3 + 4 + 5) + drawn_and_computed


def test_the_next_turn_of_a_conversation_finds_the_first_answer_too():
    (first, second) = prompts(13, 5)
    g = generator()
    ((answer,),) = g.run([first], GREEDY)
    before = g.statistics
    history = first + list(answer.tokens)
    ((reply,),) = g.run([history + second], GREEDY)
    assert list(reply.tokens) == decoder.dense_greedy(history + second, 12)
    assert g.statistics.cached_tokens - before.cached_tokens == (len(history) - 1) // 4 * 4


def test_samples_of_a_prompt_share_its_pages_and_equal_those_drawn_alone():
    (prompt,) = prompts(23)
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, num_samples=4)
    g = generator()
    together = tokens(g.run([prompt], params))[0]
    assert len({tuple(sample) for sample in together}) == 4
    statistics = g.statistics
    assert statistics.prompt_tokens == 4 * 23 and statistics.cached_tokens == 3 * 22
    assert int(g.state.counters.computed_tokens) == 23 + 3 + 4 * 9
    one_row = generator(decoder.config(64, max_sequences=1))
    assert tokens(one_row.run([prompt], params))[0] == together


def test_greedy_samples_agree_with_one():
    (prompt,) = prompts(10)
    many = tokens(generator().run([prompt], SamplingParams(max_new_tokens=9, num_samples=3)))[0]
    assert many == [decoder.dense_greedy(prompt, 9)] * 3


@pytest.mark.parametrize(("temperature", "prefix_cache"), [(0.0, True), (1.0, False)])
def test_when_pages_run_short_samples_are_preempted_and_draw_the_same_tokens(temperature, prefix_cache):
    texts = prompts(17, 18, 19, 20, 21)
    params = SamplingParams(max_new_tokens=30, temperature=temperature, seed=5)
    plenty = tokens(generator().run(texts, params))
    g = generator(decoder.config(num_pages=1 + 16), prefix_cache=prefix_cache)
    assert tokens(g.run(texts, params)) == plenty
    assert g.statistics.preemptions > 0 and g.statistics.recomputed_tokens > 0
    assert g.statistics.prompt_tokens == sum(map(len, texts)), "each prompt counts once"
    assert pool_is_empty(g)


def test_a_pool_full_of_cached_prefixes_gives_them_up_before_a_sample_is_preempted():
    g = generator(decoder.config(num_pages=1 + 24))
    for seed in range(6):
        texts = prompts(20, 21, seed=seed)
        assert tokens(g.run(texts, GREEDY)) == [[decoder.dense_greedy(p, 12)] for p in texts]
    assert g.statistics.preemptions == 0 and pool_is_empty(g)


def test_the_pool_may_be_exactly_as_large_as_one_request():
    texts = prompts(20, 20)
    g = generator(decoder.config(num_pages=1 + 8))
    params = SamplingParams(max_new_tokens=13)  # 32 tokens are cached at the end: 8 pages
    assert tokens(g.run(texts, params)) == [[decoder.dense_greedy(p, 13)] for p in texts]


def test_stop_tokens_stop_strings_and_max_tokens_end_at_the_same_token_alone_and_in_a_batch():
    texts = prompts(6, 9, 12)

    def decode_text(ids):
        return "".join(chr(65 + t) for t in ids)

    runs = [decoder.dense_greedy(p, 12) for p in texts]
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
    assert [received[0], received[1]] == [decoder.dense_greedy(p, 12) for p in texts]


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
    for request in (0, 2):
        assert received[request] == decoder.dense_greedy(texts[request], 12)
    assert len(received[1]) < 12
    assert pool_is_empty(g)


def test_nothing_is_compiled_again_after_the_first_run():
    traces = []

    def forward(*arguments):
        traces.append(1)
        return decoder.forward(*arguments)

    g = Generator(forward, PARAMS, CONFIG, token_counts=(8, 32), steps_per_visit=4)
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
        (
            [1],
            SamplingParams(max_new_tokens=2, stop_tokens=tuple(range(9))),
            "9 tokens in stop_tokens, but max_stop_tokens=8: raise it to 9",
        ),
        ([1], SamplingParams(max_new_tokens=2, stop_strings=("x",)), "pass decode_text to the Generator"),
        ("text", SamplingParams(), "the prompt is the text 'text': pass token ids"),
        ([3, -1], SamplingParams(), "the prompt holds -1: token ids are at least 0"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_at_once(prompt, params, message):
    g = generator(decoder.config(num_pages=9))
    with pytest.raises(ValueError, match=message):
        g.submit(prompt, params)
    assert tokens(g.run(prompts(4), GREEDY)) == [[decoder.dense_greedy(prompts(4)[0], 12)]], "nothing was lost"


@pytest.mark.parametrize("wish", [{"min_new_tokens": 3}, {"presence_penalty": 2.0}, {"forbidden_tokens": (3, 4)}])
def test_whatever_a_request_asks_of_the_draw_is_done_beside_others_that_ask_for_nothing(wish):
    (prompt,) = prompts(9)
    first = decoder.dense_greedy(prompt, 12)
    wishes = SamplingParams(max_new_tokens=12, stop_tokens=(first[0],), **wish)
    g = generator(decoder.config(64, max_sequences=2), max_bias_tokens=2)
    (one,), (other,) = g.run([prompt, prompt], [wishes, GREEDY])
    assert list(other.tokens) == first
    if "min_new_tokens" in wish:
        assert len(one.tokens) >= 3 and first[0] not in one.tokens[:2]
    elif "forbidden_tokens" in wish:
        assert not {3, 4} & set(one.tokens)
    else:
        assert one.tokens == (first[0],)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"token_counts=\(3,\) for a batch of 4 rows"):
        generator(token_counts=(3,)).run(prompts(3), GREEDY)
    with pytest.raises(ValueError, match="steps_per_visit must be at least 1"):
        generator(steps_per_visit=0)
