"""A rollout as large as people run them: 200 requests through 32 rows, with enough pages and with a quarter of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import Finish, KVCache, Rollout, SamplingParams, SamplingState, Stepper, rollout
from paged_jax.cache.invariants import check

STOP = (5,)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("windows", [(None, None), (None, 24)], ids=["plain", "hybrid"])
def test_200_requests_through_32_rows_draw_what_each_draws_alone(windows):
    """Greedy and sampled by turns; prompts and answers of 1 to 300 tokens together; three samples of each prompt."""
    num_prompts, num_samples, longest = 200, 3, 300
    traces = []

    def forward(*arguments):
        traces.append(len(arguments[1]))
        return decoder.forward(*arguments, windows=windows)

    def sample(prompts, lens, sampling, limits, cache):
        return rollout(
            Stepper(forward, (8, 32, 128)), jnp.int32(0), prompts, lens, cache,
            max_new_tokens=longest, num_samples=num_samples, sampling=sampling, limits=limits,
        )  # fmt: skip

    jitted = jax.jit(sample)
    pages_of_a_row = -(-2 * longest // decoder.PAGE_SIZE)
    # Half of all answers end early, so a quarter of what they need is an eighth of what they may.
    config = decoder.config(1 + 32 * pages_of_a_row // 8, 32, pages_of_a_row, windows)
    plenty = decoder.config(1 + 32 * pages_of_a_row, 32, pages_of_a_row, windows)

    def run(sizes, seed: int) -> tuple[Rollout, np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        lens, limits = rng.integers(1, longest + 1, (2, num_prompts)).astype(np.int32)
        prompts = rng.integers(0, decoder.VOCAB, (num_prompts, longest)).astype(np.int32)
        params = [SamplingParams(temperature=float(q % 2), seed=q, stop_tokens=STOP) for q in range(num_prompts)]
        sampling = SamplingState.of([(each, 0) for each in params])
        result, cache = jitted(prompts, lens, sampling, limits, KVCache.create(sizes))
        for table in cache.tables.groups:
            check(table)
            assert int(table.num_free) == table.num_pages - 1
        return jax.device_get(result), prompts, lens, limits

    short, prompts, lens, limits = run(config, 0)
    num_traces = len(traces)
    for seed in (1, 2):
        run(config, seed)
    assert len(traces) == num_traces, "one compilation served three queues"
    assert short.counters.preemptions > 50

    enough = run(plenty, 0)[0]
    assert enough.counters.preemptions == 0
    for name in ("tokens", "lengths", "finish"):
        assert np.array_equal(getattr(short, name), getattr(enough, name)), name
    assert np.allclose(short.logprobs, enough.logprobs, atol=1e-6, rtol=0)
    greedy = functools.partial(decoder.dense_greedy, windows=windows, stop=STOP)
    for q in range(num_prompts):
        prompt = prompts[q, : lens[q]].tolist()
        for i in range(num_samples):
            drawn = short.tokens[q, i, : short.lengths[q, i]].tolist()
            if q % 2 == 0:
                assert drawn == greedy(prompt, int(limits[q]))
            expected = decoder.dense_logprobs(prompt, drawn, windows)
            assert np.allclose(short.logprobs[q, i, : len(drawn)], expected, atol=1e-5, rtol=0)
            assert short.finish[q, i] == (Finish.STOP_TOKEN if drawn[-1] in STOP else Finish.MAX_TOKENS)
