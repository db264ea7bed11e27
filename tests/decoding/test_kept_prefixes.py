"""Prefixes that are computed once, for rollouts that begin with them; for scores in test_score.py."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import KVCache, SamplingParams, Stepper, prefill, rollout
from paged_jax.cache.invariants import check

PLAIN, HYBRID = (None, None), (None, 6)
CHUNK, WIDTH, NEW = 8, 30, 6
computed: list[int] = []  # tokens of each step of `keep`


@functools.cache
def keep(windows, has_prefix: bool):
    def forward(params, tokens, pool, metadata):
        jax.debug.callback(lambda n: computed.append(int(n)), metadata.query_starts[-1])
        return decoder.forward_with(windows)(params, tokens, pool, metadata)

    def run(cache, tokens, num_tokens, prefix):
        prefix = prefix if has_prefix else None
        return prefill(forward, jnp.int32(0), tokens, num_tokens, cache, chunk=CHUNK, prefix=prefix)

    return jax.jit(run, donate_argnums=0)


def compute(cache, tokens, num_tokens, windows, prefix=None):
    """`prefill`, and the tokens of its steps."""
    computed.clear()
    handles, cache = keep(windows, prefix is not None)(cache, tokens, num_tokens, prefix)
    jax.block_until_ready(cache)
    jax.effects_barrier()
    return handles, cache, list(computed)


@functools.cache
def sample(windows):
    def run(cache, prompts, lens, prefix):
        return rollout(
            Stepper(decoder.forward_with(windows), (16,)), jnp.int32(0), prompts, lens, cache,
            max_new_tokens=NEW, sampling=SamplingParams(temperature=0.0), prefix=prefix,
        )  # fmt: skip

    return jax.jit(run, donate_argnums=0)


def num_held(cache: KVCache, *kept) -> int:
    """Pages in use, which must be those that handles keep."""
    for group, table in enumerate(cache.tables.groups):
        check(table, [handles[group] for handles in kept])
    return sum(table.num_pages - 1 - int(table.num_free) for table in cache.tables.groups)


def problem():
    rng = np.random.default_rng(2)
    prompts = rng.integers(0, decoder.VOCAB, (4, WIDTH)).astype(np.int32)
    prompts[:, :21] = prompts[0, :21]
    return prompts, np.array([22, 30, 25, 24], np.int32)


@pytest.mark.long
def test_rollouts_go_on_from_a_prefix_and_from_one_that_was_made_longer():
    (prompts, lens), windows = problem(), HYBRID
    cache = KVCache.create(decoder.config(40, windows=windows))
    cold, cache = sample(windows)(cache, prompts, lens, cache.tables.publish(0, 0)[1])
    assert num_held(cache) == 0
    short, cache, steps = compute(cache, prompts[0, :21], 10, windows)
    assert steps == [8, 2] and all(handle.num_tokens == 10 for handle in short)
    long, cache, steps = compute(cache, prompts[0, :21], 21, windows, short)
    assert steps == [8, 3] and all(handle.num_tokens == 21 for handle in long)
    held = num_held(cache, short, long)
    for prefix in (short, long):
        warm, cache = sample(windows)(cache, prompts, lens, prefix)
        np.testing.assert_array_equal(warm.tokens, cold.tokens)
        np.testing.assert_array_equal(warm.logprobs, cold.logprobs)
        saved = len(lens) * int(prefix[0].num_tokens)
        assert warm.counters.computed_tokens == cold.counters.computed_tokens - saved
        assert num_held(cache, short, long) == held
    cache = KVCache(cache.tables.drop(short).drop(long), cache.pool)
    assert num_held(cache) == 0


@pytest.mark.long
@pytest.mark.parametrize("num_tokens", [0, -1, 22])
def test_a_prefix_of_no_tokens_or_out_of_range_holds_nothing_and_changes_nothing(num_tokens):
    prompts, lens = problem()
    cache = KVCache.create(decoder.config(40, windows=HYBRID))
    nothing, cache, steps = compute(cache, prompts[0, :21], num_tokens, HYBRID)
    assert not steps and not any(handle.num_tokens for handle in nothing) and num_held(cache) == 0
    result, cache = sample(HYBRID)(cache, prompts, lens, nothing)
    for row, drawn in enumerate(result.tokens[:, 0].tolist()):
        assert drawn == decoder.dense_greedy(prompts[row, : lens[row]].tolist(), NEW, HYBRID)


@pytest.mark.long
def test_without_enough_free_pages_nothing_is_kept():
    cache = KVCache.create(decoder.config(8, windows=PLAIN))  # 7 pages of 4 tokens
    tokens = problem()[0][0, :21]
    first, cache, _ = compute(cache, tokens, 21, PLAIN)
    assert num_held(cache, first) == 6
    second, cache, _ = compute(cache, tokens, 21, PLAIN)
    assert not any(handle.num_tokens for handle in second) and num_held(cache, first) == 6
    assert num_held(KVCache(cache.tables.drop(first).drop(second), cache.pool)) == 0


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(tokens=0), "tokens must be at least 1, got 0"),
        (dict(chunk=0), "chunk must be at least 1, got 0"),
        (dict(tokens=81), "81 tokens, but rows hold 64: give fewer, or raise max_pages_per_sequence to 21"),
        (
            dict(tokens=48),
            "48 tokens in steps of 8 tokens need 12 pages, but the pool has 11: raise num_pages to 13, give",
        ),
        (dict(tokens=44, prefix=True), "44 tokens in steps of 8 tokens need 12 pages, but the pool has 11: raise"),
        (dict(window_pages=3), "4 pages, but layers with a window of 6 have 2: raise window_pages to 5"),
    ],
)
def test_sizes_that_never_fit_are_refused_when_it_is_traced(sizes, message):
    pages = dict(window_pages=sizes["window_pages"]) if "window_pages" in sizes else {}
    windows = HYBRID if pages else PLAIN
    cache = KVCache.create(decoder.config(12, 4, 16, windows, **pages))
    prefix = cache.tables.publish(0, 0)[1] if "prefix" in sizes else None
    tokens = np.zeros(sizes.get("tokens", 20), np.int32)
    with pytest.raises(ValueError, match=message):
        prefill(
            decoder.forward_with(windows), jnp.int32(0), tokens, 1, cache, chunk=sizes.get("chunk", 8), prefix=prefix
        )


@pytest.mark.parametrize("shape, num_tokens", [((2, 3), 3), ((), 3), (3, [3]), (3, 2.5)])
def test_arrays_of_other_shapes_are_refused(shape, num_tokens):
    unchecked: Any = inspect.unwrap(prefill)  # past the annotations of the test run
    cache = KVCache.create(decoder.config(12))
    with pytest.raises(ValueError, match=r"give one text \[C\], and one whole number"):
        unchecked(decoder.forward, jnp.int32(0), np.zeros(shape, np.int32), num_tokens, cache)
