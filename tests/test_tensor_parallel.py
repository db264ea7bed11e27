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
from paged_jax import (
    AttentionMetadata,
    CacheConfig,
    DecodeState,
    PagePool,
    PageTable,
    decoding,
    paged_attention,
)

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
    table, _ = PageTable.create(sizes()).reserve(lens)
    sinks = jnp.asarray(rng.normal(size=2 * num_kv_heads), jnp.float32)
    return *tokens, sinks, AttentionMetadata.ragged(table, lens, 12)


def attend(pages, q, k, v, sinks, metadata):
    return paged_attention(q, k, v, pages, metadata, sinks=sinks, soft_cap=3.0)


attend_jitted = jax.jit(attend, donate_argnums=0)


def parts(tree) -> set[tuple[int, ...]]:
    return {shard.data.shape for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


@pytest.mark.parametrize("shape, dtype", [((4,), "float32"), ((2, 2), "int8")])
def test_each_device_attends_with_its_own_heads(shape, dtype):
    config, mesh, arguments = sizes(dtype=dtype), make_mesh(*shape), problem()
    split = PagePool.create(config, mesh).layers[0]
    own = 4 // mesh.shape["model"]
    assert parts(split.data) == {(8, own, 4, 32)}
    compiled = attend_jitted.lower(split, *arguments).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert "all-" not in text and "collective" not in text and text  # nobody asks the others
    assert memory is not None and memory.alias_size_in_bytes == split.num_bytes * own // 4
    out, split = compiled(split, *arguments)
    assert parts(split.data) == {(8, own, 4, 32)} and parts(out) == {(12, 2 * own, 16)}
    expected, whole = attend_jitted(PagePool.create(config).layers[0], *arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)  # the sums of a tile are ordered otherwise
    jax.tree.map(np.testing.assert_array_equal, split, whole)


def test_a_device_that_sees_its_own_heads_alone_is_left_alone():
    arguments, pages = problem(), PagePool.create(sizes(), mesh := make_mesh(4)).layers[0]
    specs = (HEADS, HEADS, HEADS, HEADS, PartitionSpec("model"), WHOLE)
    by_hand = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(HEADS, HEADS), check_vma=False)
    for function in by_hand, attend:
        assert str(jax.make_jaxpr(function)(pages, *arguments)).count("shard_map[") == 1


def test_pages_of_one_device_are_split_where_the_queries_are():
    q, *others = problem()
    q = jax.device_put(q, NamedSharding(make_mesh(4), WHOLE))
    trace = jax.make_jaxpr(attend)(PagePool.create(sizes()).layers[0], q, *others)
    assert str(trace).count("shard_map[") == 1


def test_what_does_not_split_is_refused():
    message = r"num_kv_heads=6 does not split over the 4 devices of the mesh axis 'model': use a number of devices that"
    with pytest.raises(ValueError, match=message):
        PagePool.create(sizes(num_kv_heads=6), make_mesh(4))
    q, *others = problem(6)
    q = jax.device_put(q, NamedSharding(make_mesh(4), WHOLE))
    with pytest.raises(ValueError, match=message):
        attend(PagePool.create(sizes(num_kv_heads=6)).layers[0], q, *others)
    with pytest.raises(ValueError, match=r"the mesh has axes x: name the one over which layers are split 'model'\."):
        DecodeState.create(sizes(), 4, mesh=jax.make_mesh((4,), ("x",)))


# ---- whole steps -----------------------------------------------------------------------------------------------------

# 512 MB on each of four devices, 1 GB where two and two hold the same; kernels for large pages are traced fastest
CONFIG = CacheConfig(2, 8, 128, num_pages=4 * 512, max_sequences=32, max_pages_per_sequence=16, page_size=128)
TOKENS = 512
STEPS = ["decode_loop", pytest.param("prefill", marks=pytest.mark.long)]
SPECS = dict(q=HEADS, k=HEADS, v=HEADS, o=PartitionSpec("model"), up=HEADS, down=PartitionSpec("model"))


def compile_step(name: str, mesh: Mesh):
    """A step of a toy decoder with 32 query heads, its weights split over "model", its rows over "data"."""

    def on_mesh(tree, spec_of):
        def abstract(path, x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec_of(path)))

        return jax.tree.map_with_path(abstract, tree)

    def forward(params, tokens, pool, metadata):
        rows = NamedSharding(mesh, PartitionSpec("data" if "data" in mesh.shape else None))
        logits, pool = toy.forward(params, jax.lax.with_sharding_constraint(tokens, rows), pool, metadata)
        return jax.lax.with_sharding_constraint(logits, rows), pool

    params = jax.eval_shape(functools.partial(toy.init_params, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"))
    params = on_mesh(params, lambda path: SPECS.get(path[-1].key, WHOLE))
    state = jax.eval_shape(lambda: DecodeState.create(CONFIG, capacity=64, mesh=mesh))
    state = on_mesh(state, lambda path: HEADS if path[0].name == "pool" else WHOLE)
    step = jax.jit(getattr(decoding, name), static_argnums=0, donate_argnums=2)
    arguments = {"decode_loop": (), "prefill": tuple(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (TOKENS, 32))}
    return step.lower(forward, params, state, *arguments[name])


def check(compiled, mesh: Mesh):
    """No device copies its part of the pool, and all but the pages is on every device again."""
    memory, pool_bytes = compiled.memory_analysis(), CONFIG.pool_bytes // mesh.shape["model"]
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < 0.02 * pool_bytes, f"{memory.temp_size_in_bytes} bytes of temporaries"
    state, _ = compiled.output_shardings
    assert {sharding.spec for sharding in jax.tree.leaves(state.pool)} == {HEADS}
    assert {sharding.spec for sharding in jax.tree.leaves(dataclasses.replace(state, pool=None))} == {WHOLE}


@pytest.mark.parametrize("name", STEPS)
def test_on_a_cpu_no_device_copies_its_part_of_the_pool(name):
    mesh = make_mesh(2, 2)
    check(compile_step(name, mesh).compile(), mesh)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", STEPS)
def test_on_four_tpus_no_device_copies_its_part_of_the_pool(name):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices
    mesh = Mesh(np.array(devices), ("model",))
    lowered = compile_step(name, mesh)
    assert "tpu_custom_call" in lowered.as_text(), "no Pallas kernel was chosen"
    check(lowered.compile(), mesh)
