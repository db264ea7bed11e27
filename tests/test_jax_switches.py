"""The switches of JAX that people set: everything runs, to the same tokens and the same pages."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import KVCache, PageTables, SamplingParams, SamplingState, Stepper, rollout

WINDOWS = (6, 6)  # one group of layers, whose pages are given up: what a single table does, at half the compilation
PAGES, LENGTHS = [[0, 3, 2], [0, 3, 2], [0, 3, 4], [0, 3, 2]], [11, 11, 10, 11]  # what stands in the first columns
DRAWN = [[[74, 90, 11], [74, 90, 11]], [[81, 80, 47], [81, 5, 41]]]  # two samples of a greedy and of a sampled prompt


def sample() -> list:
    """What two prompts draw through two rows, traced anew."""
    prompts, lens = jnp.array([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]], jnp.int32), jnp.array([5, 3], jnp.int32)
    sampled = SamplingParams(temperature=1.0, top_k=50, seed=7)
    sampling = SamplingState.of([(SamplingParams(), 0), (sampled, 0)], max_stop_tokens=0)
    stepper = Stepper(functools.partial(decoder.forward, windows=WINDOWS), (8,), num_logprobs=2)
    run = functools.partial(rollout, stepper, max_new_tokens=3, num_samples=2, sampling=sampling)
    cache = KVCache.create(decoder.config(1 + 5, max_sequences=2, max_pages_per_sequence=4, windows=WINDOWS))
    result, cache = jax.jit(run)(jnp.int32(0), prompts, lens, cache)
    assert np.array_equal(result.top_tokens[0, ..., 0], result.tokens[0]) and not np.any(cache.tables.lengths)
    return result.tokens.tolist()


def move_pages() -> PageTables:
    """Every transition of the page tables once, traced anew."""

    def move(tables: PageTables) -> PageTables:
        tables, _ = tables.reserve(jnp.array([9, 3, 0, 0], jnp.int32), jnp.array([1, 0, 2, 3], jnp.int32))
        tables, _ = tables.fork(jnp.array([0, 1], jnp.int32), jnp.array([2, 3], jnp.int32))
        tables, _ = tables.slide().reserve(jnp.array([2, 1, 1, 5], jnp.int32))
        tables = tables.permute(jnp.array([0, 0, 2, 1], jnp.int32))
        tables, handles = tables.publish(0, 11)
        tables = tables.release(jnp.array([False, True, False, True])).truncate(jnp.array([11, 0, 8, 0], jnp.int32))
        tables = tables.attach_each(jnp.array([False, True, False, True]), handles)
        return tables.drop(handles).clear_fault()

    return jax.jit(move)(PageTables.create(decoder.config(1 + 20, windows=WINDOWS)))


@contextlib.contextmanager
def switches(**values):
    """Some settings of `jax.config`, as a user sets them."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


TOGETHER = {"jax_enable_x64": True, "jax_default_prng_impl": "unsafe_rbg", "jax_debug_nans": True}
SEPARATE = [
    {},
    {"jax_enable_x64": True},
    {"jax_default_prng_impl": "rbg"},
    {"jax_default_prng_impl": "unsafe_rbg"},
    {"jax_debug_nans": True},
    {"jax_debug_infs": False, "jax_threefry_partitionable": False},
    {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"},
    {"jax_check_tracer_leaks": True},
    {"jax_default_matmul_precision": "bfloat16"},
    {"jax_disable_jit": True},
]


def name_of(values: dict) -> str:
    return ",".join(f"{name.removeprefix('jax_')}={value}" for name, value in values.items()) or "none"


@pytest.mark.parametrize(
    "values", [TOGETHER, *(pytest.param(each, marks=pytest.mark.long) for each in SEPARATE)], ids=name_of
)
def test_switches_change_neither_tokens_nor_pages(values):
    with switches(**values):
        (table,) = move_pages().groups
        assert {x.dtype for x in jax.tree.leaves(table)} == {jnp.dtype(jnp.int32)}
        assert (table.pages[:, :3].tolist(), table.lengths.tolist()) == (PAGES, LENGTHS)
        assert not np.any(table.pages[:, 3:]) and table.num_free == 20 - 3
        assert sample() == DRAWN
    assert [decoder.dense_greedy([5, 6, 7, 8, 9], 3, WINDOWS)] * 2 == DRAWN[0]
