"""Scores: log-probabilities of given continuations of a prompt, which is computed once."""

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
def hold(cache, tokens, num_tokens):
    return prefill(decoder.forward_with(HYBRID), jnp.int32(0), tokens, num_tokens, cache, chunk=WIDTH)


drop = jax.jit(lambda tables, handles: tables.drop(handles))


def problem(vocab: int = decoder.VOCAB, seed: int = 0):
    """A prompt of up to 40 tokens, and 7 continuations of 0 to 9, with noise past their ends."""
    rng = np.random.default_rng(seed)
    prompt, continuations = (rng.integers(0, vocab, shape).astype(np.int32) for shape in (WIDTH, (NUM, LONGEST)))
    return prompt, continuations, rng.permutation([0, 1, 9, 9, 4, 6, 7]).astype(np.int32)


def is_empty(cache: KVCache) -> bool:
    for table in cache.tables.groups:
        check(table)
    return all(int(t.num_free) == t.num_pages - 1 for t in cache.tables.groups) and not np.any(cache.tables.lengths)


def assert_dense(result, prompt, prompt_len, continuations, lengths, first=1):
    """Compare with a decoder that sees the whole text at once."""
    prompt = prompt[:prompt_len].tolist()
    expected = decoder.dense_logprobs(prompt[:first], prompt[first:], HYBRID)
    assert np.allclose(result.prompt_logprobs[first:prompt_len], expected, atol=1e-5, rtol=0)
    assert not np.any(result.prompt_logprobs[:first]) and not np.any(result.prompt_logprobs[prompt_len:])
    for i in range(NUM):
        expected = decoder.dense_logprobs(prompt, continuations[i, : lengths[i]].tolist(), HYBRID)
        assert np.allclose(result.logprobs[i, : lengths[i]], expected, atol=1e-5, rtol=0)
        assert not np.any(result.logprobs[i, lengths[i] :])


def test_scores_are_those_of_the_whole_text_after_any_prefix_however_few_rows_and_pages_there_are():
    # Pages for the prompt, a copy of the prefix's last one, and two continuations at a time.
    cache = KVCache.create(decoder.config(1 + 10 + 1 + 2 * 3, max_sequences=3, windows=HYBRID))
    # A prompt that is all prefix is computed again.
    cases = ((37, 0, 1), (1, 0, 1), (40, 0, 1), (8, 0, 1), (37, 18, 19), (19, 18, 19), (18, 18, 1))
    for seed, (prompt_len, num_held, first) in enumerate(cases):
        prompt, continuations, lengths = problem(seed=seed)
        prefix, cache = hold(cache, prompt, np.int32(num_held))
        computed.clear()
        result, cache = run(cache, prefix, prompt, np.int32(prompt_len), continuations, lengths)
        assert is_empty(cache) and not int(cache.tables.fault)
        assert_dense(result, prompt, prompt_len, continuations, lengths, first)
        jax.effects_barrier()
        assert sum(computed) == prompt_len - first + sum(lengths), "the prompt is computed once, but for its last token"
        assert max(computed) <= CHUNK and min(computed) > 0
    assert run._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  JAX's way to count compilations


def test_a_real_decoder_scores_as_a_dense_forward_does():
    params = toy.init_params()
    prompt, continuations, lengths = problem(toy.VOCAB)
    run_toy = jax.jit(functools.partial(score, toy.forward, chunk=CHUNK, prompt_logprobs=True))
    cache = KVCache.create(toy.config(max_sequences=3))
    result, _ = run_toy(params, prompt, np.int32(37), continuations, lengths, cache)
    for i in range(NUM):
        text = np.concatenate([prompt[:37], continuations[i]])
        expected = jax.nn.log_softmax(toy.dense_logits(params, text))[np.arange(len(text) - 1), text[1:]]
        assert np.allclose(result.logprobs[i, : lengths[i]], expected[36:][: lengths[i]], atol=1e-5, rtol=0)
        assert np.allclose(result.prompt_logprobs[1:37], expected[:36], atol=1e-5, rtol=0)


def test_what_cannot_be_computed_is_nan_and_leaves_the_cache_empty():
    prompt, continuations, lengths = problem()
    cache = KVCache.create(decoder.config(1 + 10 + 1 + 2 * 3, max_sequences=3, windows=HYBRID))
    # Of 17 pages a prompt of 37 tokens takes 9, and a continuation of 9 up to 3.
    cases = ((0, 0, False), (41, 0, False), (-3, 0, False), (37, 20, True), (37, 24, False), (37, 40, False))
    for prompt_len, num_held, is_scored in cases:
        handles, cache = hold(cache, prompt, np.int32(num_held))
        nothing, cache = hold(cache, prompt, np.int32(0))
        result, cache = run(cache, nothing, prompt, np.int32(prompt_len), continuations, lengths)
        for values in (result.logprobs, result.prompt_logprobs):
            assert np.all(np.isfinite(values)) if is_scored else np.all(np.isnan(values))
        cache = KVCache(drop(cache.tables, handles), cache.pool)
        assert is_empty(cache)


def test_sizes_that_do_not_fit_are_named():
    prompt, continuations, lengths = map(jnp.asarray, problem())

    def start(num_pages=1 + 16, chunk=CHUNK, continuations=continuations, prompt=prompt, **sizes):
        cache = KVCache.create(decoder.config(num_pages, **sizes))
        score(
            decoder.forward, jnp.int32(0), prompt, 9, continuations, lengths[: len(continuations)], cache, chunk=chunk
        )

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
