"""The engine: admission, sharing, shortage, and the same tokens whatever runs beside a request."""

import asyncio
import collections
import dataclasses
import gc
import threading
import weakref
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from engine_cases import Numbers, pool_is_empty
from paged_jax.engine import Engine
from paged_jax.sampling import SamplingParams

PARAMS = np.int32(0)
GREEDY = SamplingParams(max_new_tokens=12)
ROOMY, TIGHT = decoder.config(64), decoder.config(1 + 16)  # two programs for all tests


def engine(config=ROOMY, **options):
    """One whose pool is tight computes no log-probabilities."""
    defaults: dict[str, Any] = {"token_counts": (8, 32), "visit_steps": 4, "max_bias_tokens": 2}
    defaults["num_logprobs"] = None if config is TIGHT else 0
    return Engine(decoder.forward, PARAMS, config, Numbers(), **(defaults | options))


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, decoder.VOCAB, n).tolist() for n in lengths]


def tokens(completions):
    return [[list(sample.tokens) for sample in samples] for samples in completions]


def test_more_prompts_than_rows_each_get_their_own_tokens():
    texts = prompts(1, 2, 30, 7, 8, 9, 40, 3, 17)
    g = engine()
    assert tokens(g.generate(texts, GREEDY)) == [[decoder.dense_greedy(p, 12)] for p in texts]
    assert pool_is_empty(g)


def test_a_prompt_longer_than_a_step_is_cut():
    texts = prompts(50, 33, 32, 31, 5)
    expected = [[decoder.dense_greedy(p, 6)] for p in texts]
    assert tokens(engine().generate(texts, SamplingParams(max_new_tokens=6))) == expected


def test_log_probabilities_are_the_models_own():
    (text,) = prompts(20)
    for params in (GREEDY, SamplingParams(max_new_tokens=12, temperature=0.3, top_k=5, seed=1)):
        ((completion,),) = engine().generate([text], params)
        expected = decoder.dense_logprobs(text, list(completion.tokens))
        assert np.allclose(completion.logprobs, expected, atol=1e-5, rtol=0)


def test_without_log_probabilities_there_are_none_and_no_best_of():
    (text,), g = prompts(20), engine(TIGHT)
    ((completion,),) = g.generate([text], GREEDY)
    assert list(completion.tokens) == decoder.dense_greedy(text, 12) and completion.logprobs == ()
    with pytest.raises(ValueError, match="best_of=2 compares log-probabilities: make the engine with num_logprobs=0"):
        g.add_request(text, GREEDY, best_of=2)


def test_cached_and_cold_prompts_give_the_same_tokens():
    (common,) = prompts(21)
    texts = [common + tail for tail in prompts(1, 6, 9, seed=1)] + [common, common[:9]]
    cold = engine(prefix_cache=False).generate(texts, GREEDY)
    g = engine()
    first, second = g.generate(texts, GREEDY), g.generate(texts, GREEDY)
    assert tokens(first) == tokens(second) == tokens(cold)
    assert tokens(cold) == [[decoder.dense_greedy(p, 12)] for p in texts]
    assert pool_is_empty(g)


def test_prompts_with_a_common_beginning_compute_it_once():
    (common,) = prompts(24)
    texts = [common + tail for tail in prompts(3, 4, 5, seed=1)]

    def computed(g):
        g.generate(texts, GREEDY)
        return g.stats().computed_tokens

    drawn_and_computed = 3 * 11
    assert computed(engine()) == 24 + (3 + 4 + 5) + drawn_and_computed
    assert computed(engine(prefix_cache=False)) == 3 * 24 + (3 + 4 + 5) + drawn_and_computed


def test_each_turn_of_a_conversation_computes_only_what_is_new():
    g, history = engine(), []
    for turn in range(8):
        (said,) = prompts(4, seed=turn)
        history += said
        before = g.stats()
        ((answer,),) = g.generate([history], SamplingParams(max_new_tokens=3))
        new = g.stats()
        assert list(answer.tokens) == decoder.dense_greedy(history, 3)
        computed = new.computed_tokens - before.computed_tokens
        # The last token that the turn before drew was never computed; of the others, nothing is computed again.
        assert computed == len(said) + 2 + (turn > 0)
        assert new.cached_tokens - before.cached_tokens == max(0, len(history) - len(said) - 1)
        history += answer.tokens


def test_a_pool_full_of_cached_prefixes_gives_them_up_before_a_sample_is_preempted():
    g = engine(TIGHT)
    for seed in range(6):
        texts = prompts(17, 18, seed=seed)
        assert tokens(g.generate(texts, SamplingParams(max_new_tokens=8))) == [
            [decoder.dense_greedy(p, 8)] for p in texts
        ]
    assert g.stats().preemptions == 0 and g.stats().evicted_pages > 0 and pool_is_empty(g)


def test_samples_of_a_prompt_share_its_pages_and_equal_those_drawn_alone():
    (prompt,) = prompts(23)
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=3, num_samples=4)
    g = engine()
    together = tokens(g.generate([prompt], params))[0]
    assert len({tuple(sample) for sample in together}) == 4
    statistics = g.stats()
    assert statistics.prompt_tokens == 4 * 23 and statistics.cached_tokens == 3 * 22
    assert g.stats().computed_tokens == 23 + 3 + 4 * 9
    assert tokens(engine(TIGHT).generate([prompt], params))[0] == together


def test_greedy_samples_agree_with_one():
    (prompt,) = prompts(10)
    many = tokens(engine().generate([prompt], SamplingParams(max_new_tokens=9, num_samples=3)))[0]
    assert many == [decoder.dense_greedy(prompt, 9)] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_when_pages_run_short_samples_are_preempted_and_draw_the_same_tokens(temperature):
    texts = prompts(17, 18, 19, 20, 21)
    params = SamplingParams(max_new_tokens=30, temperature=temperature, seed=5)
    plenty = tokens(engine().generate(texts, params))
    g = engine(TIGHT)
    assert tokens(g.generate(texts, params)) == plenty
    assert g.stats().preemptions > 0 and g.stats().recomputed_tokens > 0
    preempted = [event for event in g.events if event.kind == "preempted"]
    assert sum(event.count for event in preempted) == g.stats().preemptions
    assert any(event.request is not None for event in preempted), "the log says who lost pages"
    assert g.stats().prompt_tokens == sum(map(len, texts)), "each prompt counts once"
    assert pool_is_empty(g)


def test_the_pool_may_be_exactly_as_large_as_one_request():
    texts = prompts(52, 52)
    g = engine(TIGHT)
    params = SamplingParams(max_new_tokens=13)  # 64 tokens are cached at the end: 16 pages
    assert tokens(g.generate(texts, params)) == [[decoder.dense_greedy(p, 13)] for p in texts]


def test_stop_tokens_and_max_tokens_end_at_the_same_token_alone_and_in_a_batch():
    texts = prompts(6, 12)
    runs = [decoder.dense_greedy(p, 12) for p in texts]
    params = [SamplingParams(max_new_tokens=12, stop_tokens=(runs[0][5],)), SamplingParams(max_new_tokens=7)]
    batch = engine().generate(texts, params)
    expected = [runs[0][: runs[0].index(runs[0][5]) + 1], runs[1][:7]]
    assert [list(samples[0].tokens) for samples in batch] == expected
    assert [samples[0].finish_reason for samples in batch] == ["stop", "length"]
    for text, each, together in zip(texts, params, batch, strict=True):
        assert engine().generate([text], each) == [together]


def test_pieces_stream_in_order_and_requests_may_come_meanwhile():
    texts = prompts(5, 6)
    g = engine()
    g.add_request(texts[0], GREEDY)
    received = {0: [], 1: []}
    for piece in g.stream():
        if not received[0]:
            assert g.add_request(texts[1], GREEDY) == 1
        assert 0 < len(piece.tokens) <= 4
        received[piece.request] += piece.tokens
    assert [received[0], received[1]] == [decoder.dense_greedy(p, 12) for p in texts]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_aborted_request_frees_its_pages_at_once_and_the_others_go_on(after):
    texts = prompts(9, 10, 11)
    g = engine()
    for text in texts:
        g.add_request(text, GREEDY)
    if after == 0:
        g.abort(1)
    received = {0: [], 1: [], 2: []}
    for count, piece in enumerate(g.stream()):
        received[piece.request] += piece.tokens
        if count == 2 * after and after:
            g.abort(1)
    for request in (0, 2):
        assert received[request] == decoder.dense_greedy(texts[request], 12)
    assert len(received[1]) < 12
    assert pool_is_empty(g)


def test_an_abort_leaves_the_row_alone_that_an_ended_sample_had():
    texts = prompts(9, 10, 11, 12)  # one more sample than rows
    late = SamplingParams(max_new_tokens=40)
    uneven = dataclasses.replace(late, temperature=1.0, num_samples=2, stop_tokens=tuple(range(0, decoder.VOCAB, 13)))
    probe = engine(prefix_cache=False)
    for seed in range(200):
        params = dataclasses.replace(uneven, seed=seed)
        lengths = [len(sample.tokens) for sample in probe.generate([texts[0]], params)[0]]
        if lengths[0] <= 6 and lengths[1] >= 24:
            break
    g, received = engine(), collections.defaultdict(list)
    first = g.add_request(texts[0], params)
    numbers = [g.add_request(text, late) for text in texts[1:]]
    for piece in g.stream():
        received[piece.request, piece.sample] += piece.tokens
        if len(received[first, 1]) >= 16:
            assert len(received[first, 0]) == lengths[0], "sample 0 has ended"
            g.abort(first)
    assert len(received[first, 1]) < lengths[1]
    for text, number in zip(texts[1:], numbers, strict=True):
        assert received[number, 0] == decoder.dense_greedy(text, 40)
    assert pool_is_empty(g)


def test_nothing_is_compiled_again_after_the_first_run():
    g = engine()
    for _ in range(2):  # the second time prompts are found cached
        sampled = SamplingParams(max_new_tokens=5, temperature=1.0, num_samples=2)
        g.generate(prompts(3, 30, 9), [GREEDY, sampled, GREEDY])
    compiled = g.stats().compilations
    for seed in range(3):
        many = SamplingParams(max_new_tokens=4 + seed, temperature=0.5, top_k=3, num_samples=2, seed=seed)
        g.generate(prompts(1, 14, 22, 8, 31, seed=seed), many)
        number = g.add_request([1, 2, 3], GREEDY)
        g.step()
        g.abort(number)
    assert g.stats().compilations == compiled


@pytest.mark.parametrize("wish", [{"min_new_tokens": 3}, {"presence_penalty": 2.0}, {"forbidden_tokens": (3, 4)}])
def test_whatever_a_request_asks_of_the_draw_is_done_beside_others_that_ask_for_nothing(wish):
    (prompt,) = prompts(9)
    first = decoder.dense_greedy(prompt, 12)
    wishes = SamplingParams(max_new_tokens=12, stop_tokens=(first[0],), **wish)
    g = engine()
    (one,), (other,) = g.generate([prompt, prompt], [wishes, GREEDY])
    assert list(other.tokens) == first
    if "min_new_tokens" in wish:
        assert len(one.tokens) >= 3 and first[0] not in one.tokens[:2]
    elif "forbidden_tokens" in wish:
        assert not {3, 4} & set(one.tokens)
    else:
        assert one.tokens == (first[0],)


# ---- text ----------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_a_sample_and_is_no_part_of_its_text():
    (prompt,) = prompts(9)
    run = decoder.dense_greedy(prompt, 12)
    words = [f"{token} " for token in run]
    stop = words[5][-2:] + words[6]  # it begins within a token
    params = SamplingParams(max_new_tokens=12, stop_strings=("no such text", stop))
    g = engine()
    g.add_request(prompt, params)
    pieces = list(g.stream())
    expected = "".join(words)
    assert "".join(piece.text for piece in pieces) == expected[: expected.index(stop)]
    assert pieces[-1].finish_reason == "stop" and sum(len(piece.tokens) for piece in pieces) == 7
    assert pool_is_empty(g)
    ((alone,), (beside,), _) = g.generate([prompt, prompt, prompts(5)[0]], [params, params, GREEDY])
    assert alone == beside and list(alone.tokens) == run[:7]


def test_a_text_that_begins_with_its_prompt_and_the_best_of_several_samples():
    g, params = engine(), SamplingParams(max_new_tokens=8, temperature=1.0, seed=4, num_samples=5)
    (all_five,) = g.generate("3 14 15", params)
    best = sorted(all_five, key=lambda sample: sum(sample.logprobs) / 8, reverse=True)
    (two,) = g.generate("3 14 15", dataclasses.replace(params, num_samples=2), best_of=5, echo=True)
    assert [sample.tokens for sample in two] == [sample.tokens for sample in best[:2]]
    assert [sample.text for sample in two] == ["3 14 15" + sample.text for sample in best[:2]]


def test_the_messages_of_a_chat_are_a_prompt():
    g = engine()
    messages = [{"role": "user", "content": "3 14"}, {"role": "assistant", "content": "15"}]
    assert tokens(g.generate([messages], GREEDY)) == [[decoder.dense_greedy([3, 14, 15], 12)]]


# ---- who comes first -----------------------------------------------------------------------------------------


def test_a_higher_priority_takes_a_row_and_everybody_gets_the_same_tokens():
    texts, g = prompts(5, 6, 7, 8, 9), engine()
    for text in texts[:4]:
        g.add_request(text, SamplingParams(max_new_tokens=30))
    ended, received = [], collections.defaultdict(list)
    for _ in range(4):
        for piece in g.step():
            received[piece.request] += piece.tokens
    urgent = g.add_request(texts[4], SamplingParams(max_new_tokens=4), priority=-1)
    while g.has_work:
        for piece in g.step():
            received[piece.request] += piece.tokens
            ended += [piece.request] if piece.finish_reason else []
    assert ended[0] == urgent and g.stats().preemptions == 1
    kinds = [event.kind for event in g.events if event.request == 3]
    assert kinds.count("admitted") == 2 and kinds.count("preempted") == 1 and kinds.count("finished") == 1
    for number in range(4):
        assert received[number] == decoder.dense_greedy(texts[number], 30)


def test_long_prompts_beside_decoding_answer_before_the_last_of_them_is_computed():
    g = engine(ROOMY)
    short = g.add_request(prompts(2)[0], SamplingParams(max_new_tokens=40))
    for _ in range(6):
        g.step()
    long = [g.add_request(text, SamplingParams(max_new_tokens=2)) for text in prompts(48, 49, 50, seed=3)]
    first, steps_between = {}, []
    since = 0
    while g.has_work:
        before = sum(g.stats().steps.values())
        for piece in g.step():
            first.setdefault(piece.request, g.stats().computed_tokens)
            if piece.request == short and len(first) <= len(long):
                steps_between.append(since)
                since = 0
        since += sum(g.stats().steps.values()) - before
    total = g.stats().computed_tokens
    assert [request for request in first if request in long] == long, "first come, first served"
    assert first[long[0]] < total - 50, "the first answers before the last is computed"
    assert max(steps_between) <= 4, "the row that decodes draws in every step"


# ---- streams -------------------------------------------------------------------------------------------------


def test_streams_that_are_left_and_others_beside_them_lose_nothing():
    texts, g = prompts(5, 6, 7), engine()
    numbers = [g.add_request(text, GREEDY) for text in texts]
    received = collections.defaultdict(list)
    for piece in g.stream():
        received[piece.request] += piece.tokens
        break
    assert tokens(g.generate([texts[0]], GREEDY)) == [[decoder.dense_greedy(texts[0], 12)]]
    for number in (numbers[2], numbers[1]):
        for piece in g.stream(number):
            assert piece.request == number
            received[number] += piece.tokens
    for piece in g.stream():
        received[piece.request] += piece.tokens
    assert [received[n] for n in numbers] == [decoder.dense_greedy(text, 12) for text in texts]
    left = g.stream(g.add_request(texts[0], GREEDY))
    next(left)
    while g.has_work:
        g.step()
    g.abort(4)
    assert list(left) == [], "not even what had come before"
    with pytest.raises(ValueError, match="request 1 is not here: it was never added, or its last piece was taken"):
        g.stream(1)


def test_coroutines_and_threads_share_an_engine():
    texts, g = prompts(*range(5, 13)), engine()
    received = collections.defaultdict(list)

    async def one(text):
        number = g.add_request(text, GREEDY)
        async for piece in g.stream(number):
            received[tuple(text)] += piece.tokens
            if text is texts[3]:
                g.abort(number)
        return number

    async def all_of_them():
        return await asyncio.gather(*(one(text) for text in texts[:4]))

    def in_a_thread(text):
        received[tuple(text)] += g.generate([text], GREEDY)[0][0].tokens

    threads = [threading.Thread(target=in_a_thread, args=(text,)) for text in texts[4:]]
    for thread in threads:
        thread.start()
    assert len(set(asyncio.run(all_of_them()))) == 4
    for thread in threads:
        thread.join()
    for text in texts:
        expected = decoder.dense_greedy(text, 12)
        assert received[tuple(text)] == (expected[: len(received[tuple(text)])] if text is texts[3] else expected)
    assert len(received[tuple(texts[3])]) < 12 and pool_is_empty(g)


# ---- sessions and parameters ---------------------------------------------------------------------------------


def test_a_session_keeps_its_pages_and_a_fork_computes_nothing_again():
    (system,) = prompts(30)
    g = engine(TIGHT)
    params = SamplingParams(max_new_tokens=4, temperature=1.0, num_samples=2)
    with g.session(system) as node:
        assert repr(node) == f"Session: {len(system)} tokens, open"
        one, other = node.generate(params)
        children = [node.fork(one), node.fork(other, [5, 6])]
        for seed in range(4):  # others come and go, for whom pages of the cache are evicted
            g.generate(prompts(20, 21, seed=seed + 1), GREEDY)
        before = g.stats()
        ((answer,), (reply,)) = (child.generate(SamplingParams(max_new_tokens=3)) for child in children)
        assert list(answer.tokens) == decoder.dense_greedy([*system, *one.tokens], 3)
        assert list(reply.tokens) == decoder.dense_greedy([*system, *other.tokens, 5, 6], 3)
        after = g.stats()
        assert after.cached_tokens - before.cached_tokens >= 2 * 28
        assert before.evicted_pages > 0
    for child in children:
        child.close()
    with pytest.raises(ValueError, match="this session is closed: fork it before, or begin another one"):
        node.append([1])
    # What sessions keep is given up where nothing else could run.
    with g.session(system):
        g.generate([system], GREEDY)
        texts = prompts(52, seed=9)
        assert tokens(g.generate(texts, SamplingParams(max_new_tokens=13))) == [[decoder.dense_greedy(texts[0], 13)]]
    assert pool_is_empty(g)


def test_new_parameters_make_what_was_cached_unreachable_and_compile_nothing():
    (text,) = prompts(20)
    g = engine()
    g.generate([text], GREEDY)
    compiled = g.stats().compilations
    number = g.add_request(text, GREEDY)
    before = [token for _ in range(3) for piece in g.step() for token in piece.tokens]
    g.update_params(np.int32(5))
    after = [token for piece in g.stream(number) for token in piece.tokens]
    known = text + before
    while len(known) < len(text) + 12:
        known.append(int(np.argmax(decoder.dense_logits(known, params=5))))
    assert 0 < len(before) < 12 and before + after == known[len(text) :]
    assert g.stats().compilations == compiled
    with pytest.raises(ValueError, match="another structure, shape or dtype: make a new Engine"):
        g.update_params(np.zeros(2, np.int32))
    assert pool_is_empty(g)


def test_nothing_of_an_engine_outlives_it():
    params = jnp.zeros(3, jnp.int32)
    g = Engine(sum_of_params, params, ROOMY, token_counts=(8, 32), visit_steps=4)
    g.add_request([1, 2], GREEDY)
    seen = weakref.ref(params)
    del params, g
    gc.collect()
    assert seen() is None


def sum_of_params(params, *step):
    return decoder.forward(jnp.sum(params, dtype=jnp.int32), *step)
