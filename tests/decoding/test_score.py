"""Scores: log-probabilities of given continuations of a prompt, which is computed once; and prefixes kept for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
import toy
from paged_jax import KVCache, prefill, score
from paged_jax.cache.invariants import check

HYBRID = (None, 6)  # a layer that sees everything, and one with a window, whose pages are given up
WIDTH, NUM, LONGEST, CHUNK = 40, 7, 9, 8
computed: list[int] = []  # tokens of each step of the programs below


def counting_forward(params, tokens, pool, metadata):
    jax.debug.callback(lambda n: computed.append(int(n)), metadata.query_starts[-1])
    return decoder.forward(params, tokens, pool, metadata, windows=HYBRID)


@functools.partial(jax.jit, donate_argnums=0)
def run(cache, prefix, prompt, prompt_len, continuations, lengths):
    arguments = jnp.int32(0), prompt, prompt_len, continuations, lengths, cache
    result, cache = score(counting_forward, *arguments, chunk=CHUNK, prompt_logprobs=True, prefix=prefix)
    return result, KVCache(cache.tables.drop(prefix), cache.pool)


@functools.partial(jax.jit, donate_argnums=0)
def hold(cache, tokens, num_tokens, prefix):
    return prefill(counting_forward, jnp.int32(0), tokens, num_tokens, cache, chunk=CHUNK, prefix=prefix)


drop = jax.jit(lambda tables, handles: tables.drop(handles))
nothing = jax.jit(lambda tables: tables.publish(0, 0)[1])  # handles to no tokens


def few_pages() -> KVCache:
    """Pages for the prompt, a copy of the prefix's last one, and two continuations at a time."""
    return KVCache.create(decoder.config(1 + 10 + 1 + 2 * 3, max_sequences=3, windows=HYBRID))


def steps() -> list[int]:
    """Tokens of each step since this was asked last."""
    jax.effects_barrier()
    counts = list(computed)
    computed.clear()
    return counts


def problem(vocab: int = decoder.VOCAB, seed: int = 0):
    """A prompt of up to 40 tokens, and 7 continuations of 0 to 9, with noise past their ends."""
    rng = np.random.default_rng(seed)
    prompt, continuations = (rng.integers(0, vocab, shape).astype(np.int32) for shape in (WIDTH, (NUM, LONGEST)))
    return prompt, continuations, rng.permutation([0, 1, 9, 9, 4, 6, 7]).astype(np.int32)


def num_held(cache: KVCache, *kept) -> int:
    """Pages in use, which must be those that handles keep."""
    for group, table in enumerate(cache.tables.groups):
        check(table, [handles[group] for handles in kept])
    return sum(table.num_pages - 1 - int(table.num_free) for table in cache.tables.groups)


def assert_dense(result, prompt, prompt_len, continuations, lengths, first=1):
    """Compare with a decoder that sees the whole text at once."""
    result, prompt = jax.device_get(result), prompt[:prompt_len].tolist()
    expected = decoder.dense_logprobs(prompt[:first], prompt[first:], HYBRID)
    assert np.allclose(result.prompt_logprobs[first:prompt_len], expected, atol=1e-5, rtol=0)
    assert not np.any(result.prompt_logprobs[:first]) and not np.any(result.prompt_logprobs[prompt_len:])
    for i in range(NUM):
        expected = decoder.dense_logprobs(prompt, continuations[i, : lengths[i]].tolist(), HYBRID)
        assert np.allclose(result.logprobs[i, : lengths[i]], expected, atol=1e-5, rtol=0)
        assert not np.any(result.logprobs[i, lengths[i] :])


def test_scores_are_those_of_the_whole_text_after_any_prefix_however_few_rows_and_pages_there_are():
    cache = few_pages()
    # A prompt that is all prefix is computed again.
    cases = ((37, 0, 1), (1, 0, 1), (40, 0, 1), (8, 0, 1), (37, 18, 19), (19, 18, 19), (18, 18, 1))
    for seed, (prompt_len, num_kept, first) in enumerate(cases):
        prompt, continuations, lengths = problem(seed=seed)
        prefix, cache = hold(cache, prompt, np.int32(num_kept), nothing(cache.tables))
        steps()
        result, cache = run(cache, prefix, prompt, np.int32(prompt_len), continuations, lengths)
        assert num_held(cache) == 0 and not int(cache.tables.fault)
        assert_dense(result, prompt, prompt_len, continuations, lengths, first)
        made = steps()
        assert sum(made) == prompt_len - first + sum(lengths), "the prompt is computed once, but for its last token"
        assert max(made) <= CHUNK and min(made) > 0
    assert run._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  JAX's way to count compilations


def test_a_real_decoder_scores_as_a_dense_forward_does():
    params = toy.init_params(num_layers=1)
    prompt, continuations, lengths = problem(toy.VOCAB)
    run_toy = jax.jit(functools.partial(score, toy.forward, chunk=CHUNK, prompt_logprobs=True))
    cache = KVCache.create(dataclasses.replace(toy.config(max_sequences=3), num_layers=1))
    result = jax.device_get(run_toy(params, prompt, np.int32(37), continuations, lengths, cache)[0])
    for i in range(NUM):
        text = np.concatenate([prompt[:37], continuations[i]])
        logprobs = jax.nn.log_softmax(toy.dense_logits(params, text, (None,)))
        expected = np.asarray(logprobs)[np.arange(len(text) - 1), text[1:]]
        assert np.allclose(result.logprobs[i, : lengths[i]], expected[36:][: lengths[i]], atol=1e-5, rtol=0)
        assert np.allclose(result.prompt_logprobs[1:37], expected[:36], atol=1e-5, rtol=0)


def test_what_cannot_be_computed_is_nan_and_leaves_the_cache_empty():
    prompt, continuations, lengths = problem()
    cache = few_pages()
    # Of 17 pages a prompt of 37 tokens takes 9, and a continuation of 9 up to 3.
    cases = ((0, 0, False), (41, 0, False), (-3, 0, False), (37, 20, True), (37, 24, False), (37, 40, False))
    for prompt_len, num_kept, is_scored in cases:
        handles, cache = hold(cache, prompt, np.int32(num_kept), nothing(cache.tables))
        result, cache = run(cache, nothing(cache.tables), prompt, np.int32(prompt_len), continuations, lengths)
        for values in (result.logprobs, result.prompt_logprobs):
            assert np.all(np.isfinite(values)) if is_scored else np.all(np.isnan(values))
        cache = KVCache(drop(cache.tables, handles), cache.pool)
        assert num_held(cache) == 0


def test_scores_go_on_from_a_prefix_and_from_one_that_was_made_longer():
    prompt, continuations, lengths = problem()
    cache = few_pages()
    steps()
    short, cache = hold(cache, prompt, np.int32(10), nothing(cache.tables))
    assert steps() == [8, 2] and all(handle.num_tokens == 10 for handle in short)
    long, cache = hold(cache, prompt, np.int32(21), short)
    assert steps() == [8, 3] and all(handle.num_tokens == 21 for handle in long)
    held = num_held(cache, short, long)
    for prefix, others, num_kept in ((long, [short], 21), (short, [], 10)):
        result, cache = run(cache, prefix, prompt, np.int32(24), continuations, lengths)
        assert_dense(result, prompt, 24, continuations, lengths, num_kept + 1)
        assert sum(steps()) == 24 - num_kept - 1 + sum(lengths)
        held, before = num_held(cache, *others), held
        assert held < before
    assert held == 0


@pytest.mark.parametrize("num_tokens", [0, -1, 41])
def test_a_prefix_of_no_tokens_or_out_of_range_holds_nothing_and_changes_nothing(num_tokens):
    prompt, continuations, lengths = problem()
    cache = few_pages()
    steps()
    none, cache = hold(cache, prompt, np.int32(num_tokens), nothing(cache.tables))
    assert not steps() and not any(handle.num_tokens for handle in none) and num_held(cache) == 0
    result, cache = run(cache, none, prompt, np.int32(20), continuations, lengths)
    assert_dense(result, prompt, 20, continuations, lengths)


def test_without_enough_free_pages_no_prefix_is_kept():
    prompt, cache = problem()[0], few_pages()
    first, cache = hold(cache, prompt, np.int32(36), nothing(cache.tables))  # 9 of 17 pages
    held = num_held(cache, first)
    second, cache = hold(cache, prompt, np.int32(36), nothing(cache.tables))
    assert not any(handle.num_tokens for handle in second) and num_held(cache, first) == held
    assert num_held(KVCache(drop(drop(cache.tables, first), second), cache.pool)) == 0


def test_sizes_that_do_not_fit_are_named():
    prompt, continuations, lengths = problem()

    def start(num_pages=1 + 16, chunk=CHUNK, continuations=continuations, prompt=prompt, **sizes):
        def trace(*arrays):
            cache = KVCache.create(decoder.config(num_pages, **sizes))
            return score(decoder.forward, jnp.int32(0), *arrays, cache=cache, chunk=chunk)

        jax.eval_shape(trace, prompt, np.int32(9), continuations, lengths[: len(continuations)])

    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        start(chunk=0)
    with pytest.raises(ValueError, match="continuations must be at least 1, got 0"):
        start(continuations=continuations[:0])
    with pytest.raises(ValueError, match="tokens of the prompt must be at least 1, got 0"):
        start(prompt=prompt[:0])
    with pytest.raises(
        ValueError,
        match="a prompt of 40 tokens and a continuation of 9 need a row of 48 tokens, but rows hold 44: shorten the "
        "arrays or raise max_pages_per_sequence to 12",
    ):
        start(max_pages_per_sequence=11)
    with pytest.raises(
        ValueError, match="in steps of 8 tokens need 13 pages, but the pool has 12: raise num_pages to 14, shorten the"
    ):
        start(num_pages=1 + 12)
    with pytest.raises(
        ValueError,
        match="need 6 pages, but layers with a window of 6 have 5: raise window_pages to 7, .* or lower chunk",
    ):
        start(windows=HYBRID, window_pages=1 + 5)
