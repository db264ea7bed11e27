"""Pages split over four devices by their KV heads: the same results, a quarter of the memory, no copy of the pool."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import toy
from paged_jax import AttentionMetadata, CacheConfig, KVCache, PagePool, PageTables, Stepper, paged_attention, rollout
from paged_jax.decoding.rows import DecodeState
from paged_jax.decoding.step import run

HEADS, WHOLE = PartitionSpec(None, "model"), PartitionSpec()


def make_mesh(*shape: int) -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(shape), ("data", "model")[-len(shape) :])


def sizes(**changes) -> CacheConfig:
    fields: dict[str, Any] = dict(num_kv_heads=4, head_dim=16, num_pages=8, page_size=4, dtype="float32")
    return CacheConfig(num_layers=1, max_sequences=2, max_pages_per_sequence=3, **(fields | changes))


def problem(num_kv_heads: int = 4):
    """Queries, keys and values of two prompts, sinks, and where the prompts belong."""
    rng = np.random.default_rng(0)
    heads = (2 * num_kv_heads, num_kv_heads, num_kv_heads)
    tokens = (jnp.asarray(rng.normal(size=(12, n, 16)), jnp.float32) for n in heads)
    lens = jnp.array([7, 4])
    tables, _ = PageTables.create(sizes()).reserve(lens)
    sinks = jnp.asarray(rng.normal(size=2 * num_kv_heads), jnp.float32)
    return *tokens, sinks, AttentionMetadata.ragged(tables, lens, 12)


def attend(pool, q, k, v, sinks, metadata):
    return paged_attention(q, k, v, pool, metadata, 0, sinks=sinks, soft_cap=3.0)


attend_jitted = jax.jit(attend, donate_argnums=0)


def parts(tree) -> set[tuple[int, ...]]:
    return {shard.data.shape for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


@pytest.mark.parametrize("shape, dtype", [pytest.param((4,), "float32", marks=pytest.mark.long), ((2, 2), "int8")])
def test_each_device_attends_with_its_own_heads(shape, dtype):
    config, mesh, arguments = sizes(dtype=dtype), make_mesh(*shape), problem()
    split = PagePool.create(config, mesh)
    own = 4 // mesh.shape["model"]
    assert parts(split.arrays[0].data) == {(8, own, 4, 32)}
    compiled = attend_jitted.lower(split, *arguments).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert "all-" not in text and "collective" not in text and text  # nobody asks the others
    assert memory is not None and memory.alias_size_in_bytes == split.num_bytes * own // 4
    out, split = compiled(split, *arguments)
    assert parts(split.arrays[0].data) == {(8, own, 4, 32)} and parts(out) == {(12, 2 * own, 16)}
    expected, whole = attend_jitted(PagePool.create(config), *arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)  # the sums of a tile are ordered otherwise
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def test_a_device_that_sees_its_own_heads_alone_is_left_alone():
    arguments, pool = problem(), PagePool.create(sizes(), mesh := make_mesh(4))
    specs = (HEADS, HEADS, HEADS, HEADS, PartitionSpec("model"), WHOLE)
    by_hand = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(HEADS, HEADS), check_vma=False)
    for function in by_hand, attend:
        assert str(jax.make_jaxpr(function)(pool, *arguments)).count("shard_map[") == 1


def test_pages_of_one_device_are_split_where_the_queries_are():
    q, *others = problem()
    q = jax.device_put(q, NamedSharding(make_mesh(4), WHOLE))
    trace = jax.make_jaxpr(attend)(PagePool.create(sizes()), q, *others)
    assert str(trace).count("shard_map[") == 1


def test_what_does_not_split_is_refused():
    message = r"num_kv_heads=6 does not split over the 4 devices of the mesh axis 'model': use a number of devices that"
    with pytest.raises(ValueError, match=message):
        PagePool.create(sizes(num_kv_heads=6), make_mesh(4))
    q, *others = problem(6)
    q = jax.device_put(q, NamedSharding(make_mesh(4), WHOLE))
    with pytest.raises(ValueError, match=message):
        attend(PagePool.create(sizes(num_kv_heads=6)), q, *others)
    with pytest.raises(ValueError, match=r"the mesh has axes x: name the one over which layers are split 'model'\."):
        DecodeState.create(sizes(), 4, (2,), mesh=jax.make_mesh((4,), ("x",)))


# ---- whole steps -----------------------------------------------------------------------------------------------------


def test_a_rollout_over_a_mesh_draws_the_same_tokens_with_few_pages():
    """Each of four devices holds the pages of one KV head, which are so few that samples give theirs up."""
    params, stepper = toy.init_params(kv_heads=4), Stepper(toy.forward, (8,))
    rng = np.random.default_rng(0)
    prompts, lens = jnp.asarray(rng.integers(0, toy.VOCAB, (5, 12)), jnp.int32), jnp.array([3, 12, 7, 1, 9], jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0)
    def sample(cache):
        return rollout(stepper, params, prompts, lens, cache, max_new_tokens=12, num_samples=2)

    config = dataclasses.replace(toy.config(), num_kv_heads=4)
    expected, _ = sample(KVCache.create(config))
    drawn, cache = sample(KVCache.create(dataclasses.replace(config, num_pages=1 + 8), make_mesh(4)))
    assert drawn.counters.preemptions > 0 == expected.counters.preemptions
    for name in ("tokens", "lengths", "finish"):
        np.testing.assert_array_equal(getattr(drawn, name), getattr(expected, name))
    np.testing.assert_allclose(drawn.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    assert {shard.data.shape[1] for shard in cache.pool.arrays[0].data.addressable_shards} == {1}
    assert parts(cache.tables.lengths) == {(4,)} and int(cache.tables.num_free[0]) == 8


# 512 MB on each of four devices, 1 GB where two and two hold the same. Copies of one page for each row and layer are
# read before any is written, so larger pages would take more memory beside the pool.
CONFIG = CacheConfig(2, 8, 128, num_pages=4 * 2048, max_sequences=32, max_pages_per_sequence=64, page_size=32)
PASSES = [32, pytest.param(512, marks=pytest.mark.long)]  # T of steps that decode, and of steps that prefill
SPECS = dict(q=HEADS, k=HEADS, v=HEADS, o=PartitionSpec("model"), up=HEADS, down=PartitionSpec("model"))


def lower_steps(mesh: Mesh, num_tokens: int):
    """Steps of a toy decoder with 32 query heads, its weights split over "model", its tokens over "data"."""

    def on_mesh(tree, spec_of):
        def abstract(path, x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(path)))

        return jax.tree.map_with_path(abstract, tree)

    def forward(params, tokens, pool, metadata):
        rows = NamedSharding(mesh, PartitionSpec("data" if "data" in mesh.shape else None))
        logits, pool = toy.forward(params, jax.lax.with_sharding_constraint(tokens, rows), pool, metadata)
        return jax.lax.with_sharding_constraint(logits, rows), pool

    stepper = Stepper(forward, (num_tokens,))
    params = jax.eval_shape(functools.partial(toy.init_params, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"))
    params = on_mesh(params, lambda path: SPECS.get(path[-1].key, WHOLE))
    state = jax.eval_shape(lambda: DecodeState.create(CONFIG, 64, stepper.token_counts, mesh=mesh))
    state = on_mesh(state, lambda path: HEADS if any(getattr(key, "name", "") == "pool" for key in path) else WHOLE)
    steps = jax.jit(functools.partial(run, stepper), donate_argnums=1)
    return steps.lower(params, state, jax.ShapeDtypeStruct((), jnp.int32))


def check(compiled, mesh: Mesh):
    """No device copies its part of the pool, and all but the pages is on every device again."""
    memory, pool_bytes = compiled.memory_analysis(), CONFIG.pool_bytes // mesh.shape["model"]
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < 0.03 * pool_bytes, f"{memory.temp_size_in_bytes} bytes of temporaries"
    state = compiled.output_shardings
    assert {sharding.spec for sharding in jax.tree.leaves(state.cache.pool)} == {HEADS}
    others = state.cache.tables, state.rows, state.counters
    assert {sharding.spec for sharding in jax.tree.leaves(others)} == {WHOLE}


@pytest.mark.parametrize("num_tokens", PASSES)
def test_on_a_cpu_no_device_copies_its_part_of_the_pool(num_tokens):
    mesh = make_mesh(2, 2)
    check(lower_steps(mesh, num_tokens).compile(), mesh)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("num_tokens", PASSES)
def test_on_four_tpus_no_device_copies_its_part_of_the_pool(num_tokens):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
    mesh = Mesh(np.array(devices), ("model",))
    lowered = lower_steps(mesh, num_tokens)
    assert "tpu_custom_call" in lowered.as_text(), "no Pallas kernel was chosen"
    check(lowered.compile(), mesh)
