"""What rows share is found in their page tables and reaches every layer: it changes the speed, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import toy
from paged_jax import AttentionMetadata, CacheConfig, KVCache, SamplingParams, Stepper, paged_attention, rollout
from paged_jax.attention import find_sharing
from pallas_kernels import sharing

S, ROWS, WINDOW = 4, 10, 24
CONFIG = CacheConfig(2, 2, 8, 200, ROWS, 16, S, dtype="float32", windows=(None, WINDOW))
PREFIX, FORK, LONGEST = 20, 32, 60


@pytest.fixture(autouse=True)
def groups_of_few_tokens_pay(monkeypatch):
    monkeypatch.setattr(sharing, "FEWEST_TOKENS", 8)


@jax.jit
def plant(first, last, released):
    """Tables of rows that were forked from each other again and again, some of them released in between."""
    every = jnp.arange(ROWS)

    def grow(tables, lengths):
        return tables.slide().reserve(jnp.maximum(lengths - tables.lengths, 0))[0]

    def fork(tables, source):
        source = jnp.array(source)
        return tables.fork(source, jnp.where(source >= 0, every, -1))[0]

    tables = grow(KVCache.create(CONFIG).tables, jnp.where(every == 0, first, 0))
    tables = fork(tables, [-1, *[0] * 8, -1])  # row 9 stands alone
    tables = grow(tables, jnp.where(every < 2, FORK + every, 0))
    tables = tables.release((every >= 2) & (every < 8))
    tables = fork(tables, [-1, -1, 0, 0, 0, 1, 1, 1, -1, -1])
    return grow(tables, last).release(every == released)


def forest(seed: int):
    """The tables, and what else is random."""
    rng = np.random.default_rng(seed)
    last = rng.integers(FORK + 1, LONGEST, ROWS) * (rng.random(ROWS) < 0.9)
    tables = plant(PREFIX + rng.integers(S), jnp.asarray(last, jnp.int32), rng.integers(ROWS))
    assert (np.maximum(last, 1)[:9] <= np.asarray(tables.lengths)[:9]).sum() >= 8, "all rows were granted their tokens"
    return tables, rng


@functools.partial(jax.jit, static_argnames=("layer", "shares", "implementation"))
def attend(q, k, v, pool, step, layer, shares, implementation):
    if shares:
        step = find_sharing(step, pool)
    window = CONFIG.windows[layer]
    out, _ = paged_attention(q, k, v, pool, step, layer, window=window, implementation=implementation)
    return out, step.sharing


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layer", [0, 1])
def test_rows_that_share_pages_attend_as_if_each_read_its_own(layer, seed):
    tables, rng = forest(seed)
    query_lens = jnp.asarray(rng.integers(0, 3, ROWS), jnp.int32)
    step = AttentionMetadata.ragged(tables, query_lens, 2 * ROWS, max_query_len=2)
    pool = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), KVCache.create(CONFIG).pool)
    q, k, v = (jnp.asarray(rng.standard_normal((2 * ROWS, n, 8)), jnp.float32) for n in (4, 2, 2))
    out, groups = attend(q, k, v, pool, step, layer, True, "xla")
    expected, _ = attend(q, k, v, pool, step, layer, False, "reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    in_group = [(of.leader >= 0).any(axis=0) for of in groups]
    long = in_group[0] & (step.lengths >= WINDOW + 3 * S)
    assert long.any(), "nothing is shared: the test shows nothing"
    assert not in_group[1][long].any(), "what lies before the window has been given up"


SAMPLING = SamplingParams(temperature=1.0, seed=3)


def sampled(shares: bool):
    """Of 8 rows that begin with a prompt in common, in passes that decode and prefill."""
    stepper = Stepper(toy.forward, (24,), sharing=shares)
    prompts = jax.random.randint(jax.random.key(0), (2, 24), 0, toy.VOCAB)
    cache = KVCache.create(toy.config(100, max_sequences=8))
    sample = functools.partial(rollout, stepper, max_new_tokens=6, num_samples=8, sampling=SAMPLING)
    return jax.jit(sample)(toy.init_params(), prompts, jnp.array([24, 17]), cache)[0]


@pytest.mark.long
def test_a_rollout_draws_the_same_tokens(monkeypatch):
    searches = []

    def find(*arguments):
        searches.append(arguments)
        return sharing.find_groups(*arguments)

    monkeypatch.setattr(pallas_kernels, "find_groups", find)
    alone = sampled(False)
    assert not searches
    shared = sampled(True)
    assert searches
    np.testing.assert_array_equal(shared.tokens, alone.tokens)
    np.testing.assert_allclose(shared.logprobs, alone.logprobs, atol=1e-5)


@pytest.mark.parametrize(("rows", "searches"), [(sharing.FEWEST_STEP_ROWS - 1, 0), (sharing.FEWEST_STEP_ROWS, 1)])
def test_a_step_looks_for_what_many_rows_share_where_it_cannot_prefill(rows, searches, monkeypatch):
    found = []
    monkeypatch.setattr(
        pallas_kernels, "find_groups", lambda *arguments: found.append(1) or sharing.find_groups(*arguments)
    )
    cache = KVCache.create(toy.config(100, max_sequences=rows))
    prompts = jnp.zeros((1, 4), jnp.int32)
    run = functools.partial(rollout, Stepper(toy.forward, (rows, 2 * rows)), max_new_tokens=2)
    jax.eval_shape(run, toy.init_params(), prompts, jnp.array([4]), cache)
    assert bool(found) == bool(searches)
