"""Rollouts: a queue of prompts through a few rows in one program, whatever runs short."""

import functools

import hash_decoder as decoder
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from paged_jax import Finish, KVCache, Rollout, SamplingParams, SamplingState, Stepper, rollout
from paged_jax.cache.invariants import check
from paged_jax.decoding.rows import DecodeState
from paged_jax.decoding.step import step

PLAIN, HYBRID = (None, None), (None, 6)
GREEDY = SamplingParams(max_new_tokens=24)


def queue(num_prompts: int, longest: int, width: int, seed: int = 0):
    """Random prompts [Q, width] of 1 to `longest` tokens; what follows a prompt is noise."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(1, longest + 1, num_prompts).astype(np.int32)
    return rng.integers(0, decoder.VOCAB, (num_prompts, width)).astype(np.int32), lens


@functools.cache
def program(windows, num_samples: int, max_new_tokens: int, token_counts: tuple[int, ...]):
    stepper = Stepper(decoder.forward_with(windows), token_counts, num_logprobs=2)

    def run(cache, prompts, prompt_lens, sampling, limits):
        return rollout(
            stepper, jnp.int32(0), prompts, prompt_lens, cache,
            max_new_tokens=max_new_tokens, num_samples=num_samples, sampling=sampling, limits=limits,
        )  # fmt: skip

    return jax.jit(run, donate_argnums=0)


def sampling_of(num_prompts: int, params: SamplingParams = GREEDY) -> SamplingState:
    return SamplingState.of([(params, 0)] * num_prompts)


def run(
    cache, prompts, lens, *, windows=PLAIN, n=3, sampling=None, limits=None, counts=(4, 16)
) -> tuple[Rollout, KVCache]:
    sampling = sampling_of(len(lens)) if sampling is None else sampling
    limits = np.full(len(lens), 24, np.int32) if limits is None else limits
    result, cache = program(windows, n, 24, counts)(cache, prompts, lens, sampling, limits)
    return jax.device_get(result), cache


def is_empty(cache: KVCache) -> bool:
    for table in cache.tables.groups:
        check(table)
    return all(int(t.num_free) == t.num_pages - 1 for t in cache.tables.groups) and not np.any(cache.tables.lengths)


@pytest.mark.parametrize("windows", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_every_sample_is_the_one_drawn_alone_with_plenty_of_pages_and_with_a_quarter(windows):
    prompts, lens = queue(30, 40, 40)
    limits = np.random.default_rng(1).integers(1, 25, 30).astype(np.int32)
    sampling = SamplingState.of(
        [(SamplingParams(temperature=float(q % 2), seed=q, stop_tokens=(5, 9)), 0) for q in range(30)]
    )
    results = []
    for num_pages in (1 + 4 * 16, 1 + 16):
        config = decoder.config(num_pages, windows=windows)
        result, cache = run(KVCache.create(config), prompts, lens, windows=windows, sampling=sampling, limits=limits)
        assert is_empty(cache)
        results.append(result)
    plenty, short = results
    assert plenty.counters.preemptions == plenty.counters.recomputed_tokens == 0
    assert short.counters.preemptions > 10 and short.counters.recomputed_tokens > 0
    for name in ("tokens", "lengths", "finish"):
        assert np.array_equal(getattr(plenty, name), getattr(short, name)), name
    for name in ("logprobs", "top_tokens", "top_logprobs"):
        assert np.array_equal(getattr(plenty, name), getattr(short, name)), f"{name}: not a bit differs"
    assert len({tuple(x) for x in plenty.tokens[1::2].reshape(-1, 24).tolist()}) == 15 * 3, "sampled ones differ"
    for q in range(30):
        prompt = prompts[q, : lens[q]].tolist()
        for sample in range(3):
            drawn = plenty.tokens[q, sample, : plenty.lengths[q, sample]].tolist()
            assert not np.any(plenty.tokens[q, sample, plenty.lengths[q, sample] :])
            expected = decoder.dense_logprobs(prompt, drawn, windows)
            assert np.allclose(plenty.logprobs[q, sample, : len(drawn)], expected, atol=1e-5, rtol=0)
            top = [decoder.dense_logits(prompt + drawn[:i], windows).argsort()[:-3:-1] for i in range(len(drawn))]
            assert np.array_equal(plenty.top_tokens[q, sample, : len(drawn)], top)
            for rank in range(2):
                expected = decoder.dense_logprobs(prompt, drawn, windows, [best[rank] for best in top])
                assert np.allclose(plenty.top_logprobs[q, sample, : len(drawn), rank], expected, atol=1e-5, rtol=0)
            if q % 2 == 0:
                assert drawn == decoder.dense_greedy(prompt, int(limits[q]), windows, (5, 9))
            stopped = drawn[-1] in (5, 9)
            assert plenty.finish[q, sample] == (Finish.STOP_TOKEN if stopped else Finish.MAX_TOKENS)
            assert stopped or len(drawn) == limits[q]


def test_each_prompt_is_computed_once_for_all_its_samples_also_when_they_do_not_fit_in_the_rows_at_once():
    prompts, lens = queue(7, 40, 40, seed=2)
    result, _ = run(KVCache.create(decoder.config(1 + 64)), prompts, lens, n=5)
    # Each sample computes all tokens that it draws but its last one, and all but the first the prompt's last token.
    drawn = int(np.sum(result.lengths))
    assert result.counters.drawn_tokens == drawn
    assert result.counters.computed_tokens == int(np.sum(lens)) + 7 * 4 + drawn - 7 * 5


def test_samples_do_not_depend_on_the_order_of_the_queue_or_the_number_of_rows():
    prompts, lens = queue(10, 30, 30, seed=3)
    sampling = SamplingState.of([(SamplingParams(temperature=1.0, seed=q), 0) for q in range(10)])
    one, _ = run(KVCache.create(decoder.config(1 + 64)), prompts, lens, sampling=sampling)
    order = np.random.default_rng(0).permutation(10)
    shuffled = jax.tree.map(lambda x: x[order], sampling)
    config = decoder.config(1 + 64, max_sequences=7)
    other, _ = run(KVCache.create(config), prompts[order], lens[order], sampling=shuffled, counts=(8, 16))
    assert np.array_equal(other.tokens, one.tokens[order]) and np.array_equal(other.logprobs, one.logprobs[order])


def test_a_prompt_that_can_never_fit_ends_without_a_token_and_the_others_are_served():
    prompts, lens = queue(6, 20, 40, seed=4)
    lens[2], lens[5] = 37, 0
    result, cache = run(KVCache.create(decoder.config(1 + 9)), prompts, lens)
    assert np.all(result.finish[[2, 5]] == Finish.TOO_LONG) and not np.any(result.lengths[[2, 5]])
    for q in (0, 1, 3, 4):
        most = min(24, 36 + 1 - lens[q])  # the last token is never cached
        assert result.tokens[q, 0, :most].tolist() == decoder.dense_greedy(prompts[q, : lens[q]].tolist(), most)
        assert np.all(result.lengths[q] == most) and np.all(result.finish[q] == Finish.MAX_TOKENS)
    assert is_empty(cache)


@pytest.mark.parametrize("windows", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_prompts_continue_after_a_prefix_whose_pages_a_handle_keeps(windows):
    prompts, lens = queue(8, 10, 40, seed=5)
    prefix = np.random.default_rng(9).integers(0, decoder.VOCAB, 18)
    prompts = np.concatenate([np.broadcast_to(prefix, (8, 18)), prompts], axis=1)[:, :40].astype(np.int32)
    cold, _ = run(KVCache.create(decoder.config(1 + 64, windows=windows)), prompts, lens + 18, windows=windows)
    stepper = Stepper(decoder.forward_with(windows), (4, 16))

    @jax.jit
    def warm(cache, prompts, lens):
        cache, granted = cache.reserve(jnp.array([18, 0, 0, 0], jnp.int32))
        from paged_jax import AttentionMetadata

        metadata = AttentionMetadata.ragged(cache.tables, jnp.array([18, 0, 0, 0], jnp.int32), 18)
        _, pool = stepper.forward(jnp.int32(0), prompts[0, :18], cache.pool, metadata)
        tables, handles = cache.tables.publish(0, 18)
        cache = KVCache(tables.release(jnp.array([True, False, False, False])), pool)
        result, cache = rollout(
            stepper, jnp.int32(0), prompts, lens, cache, max_new_tokens=24, num_samples=3,
            sampling=GREEDY, prefix=handles,
        )  # fmt: skip
        return result, KVCache(cache.tables.drop(handles), cache.pool), granted

    result, cache, granted = warm(KVCache.create(decoder.config(1 + 20, windows=windows)), prompts, lens + 18)
    assert granted[0] and is_empty(cache)
    assert np.array_equal(result.tokens, cold.tokens) and np.array_equal(result.logprobs, cold.logprobs)
    if windows == PLAIN:
        assert (
            result.counters.computed_tokens - result.counters.recomputed_tokens < cold.counters.computed_tokens - 8 * 16
        )


def test_one_compilation_serves_three_queues_without_a_host_callback():
    traces = []

    def forward(*arguments):
        traces.append(1)
        return decoder.forward(*arguments)

    stepper = Stepper(forward, (4, 16))

    @jax.jit
    def sample(cache, prompts, lens, sampling):
        return rollout(stepper, jnp.int32(0), prompts, lens, cache, max_new_tokens=5, num_samples=2, sampling=sampling)[
            0
        ]

    cache = KVCache.create(decoder.config(1 + 16))
    lowered = sample.lower(cache, *queue(6, 9, 9), sampling_of(6))
    assert "callback" not in lowered.as_text() and "infeed" not in lowered.as_text()
    for seed in range(3):
        prompts, lens = queue(6, 9, 9, seed)
        result = sample(cache, prompts, lens, sampling_of(6, SamplingParams(temperature=float(seed > 0), seed=seed)))
        if seed == 0:
            compiled = len(traces)
            expected = [decoder.dense_greedy(p[:n].tolist(), 5) for p, n in zip(prompts, lens, strict=True)]
            assert result.tokens[:, 1].tolist() == expected
    assert len(traces) == compiled


def test_a_real_decoder_draws_what_a_dense_forward_does():
    params = toy.init_params()
    prompts, lens = queue(5, 20, 20, seed=6)
    prompts %= toy.VOCAB
    stepper = Stepper(toy.forward, (4, 16))
    sample = jax.jit(functools.partial(rollout, stepper, max_new_tokens=12, num_samples=2, sampling=GREEDY))
    result, _ = sample(params, prompts, lens, KVCache.create(toy.config(num_pages=1 + 10)))
    assert result.counters.preemptions > 0
    for q in range(5):
        prompt = prompts[q, : lens[q]].tolist()
        expected = toy.dense_greedy(params, prompt, 12)
        assert result.tokens[q].tolist() == [expected, expected]
        logits = toy.dense_logits(params, jnp.array(prompt + expected, jnp.int32))[len(prompt) - 1 : -1]
        logprobs = jax.nn.log_softmax(logits)[np.arange(12), expected]
        assert np.allclose(result.logprobs[q, 0], logprobs, atol=1e-5, rtol=0)


def test_sizes_that_do_not_fit_together_are_named():
    prompts, lens = map(jnp.asarray, queue(3, 9, 9))
    cache = KVCache.create(decoder.config(1 + 16, windows=HYBRID, window_pages=4))
    stepper = Stepper(decoder.forward_with(HYBRID), (4, 16))

    def start(stepper=stepper, cache=cache, sampling=GREEDY, **sizes):
        rollout(stepper, jnp.int32(0), prompts, lens, cache, **({"max_new_tokens": 4} | sizes), sampling=sampling)

    with pytest.raises(ValueError, match="window of 6 have 3 pages, but a row that computes 16 .* raise window_pages"):
        start()
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        start(num_samples=0)
    with pytest.raises(ValueError, match="sampling is that of 2 prompts, but there are 3"):
        start(Stepper(decoder.forward), KVCache.create(decoder.config(17)), sampling_of(2))
    with pytest.raises(ValueError, match=r"token_counts=\(2,\) for a batch of 4 rows: the largest must hold"):
        start(Stepper(decoder.forward, (2,)), KVCache.create(decoder.config(17)))
    with pytest.raises(
        ValueError, match=r"token_counts must be numbers of at least 1 in ascending order, got \(8, 4\)"
    ):
        Stepper(decoder.forward, (8, 4))
    with pytest.raises(ValueError, match="num_logprobs must be None or at least 0, got -1"):
        Stepper(decoder.forward, num_logprobs=-1)
    state = DecodeState.create(decoder.config(17), 8, (4,))
    with pytest.raises(ValueError, match="num_logprobs=3 of the stepper, but the rows keep 0 .* with num_logprobs=3"):
        step(Stepper(decoder.forward, (4,), num_logprobs=3), jnp.int32(0), state)
