"""No step copies the pool: XLA's own account of every public step function, compiled for a CPU and for a TPU v6e."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

import toy
from paged_jax import CacheConfig, DecodeState, decode_loop, decode_step, prefill
from paged_jax.decoding import start, stop

T = 512  # tokens of a prefill: its queries alone are 4 MB
CONFIG = CacheConfig(
    num_layers=2, num_kv_heads=8, head_dim=128, num_pages=4096, max_sequences=32, max_pages_per_sequence=128
)  # 2 layers of 256 MB in bfloat16


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def step_functions():
    """name -> (function, arguments with the state first)."""
    params = jax.eval_shape(functools.partial(toy.init_params, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"))
    state = jax.eval_shape(lambda: DecodeState.create(CONFIG, capacity=64))
    rows = jax.ShapeDtypeStruct((CONFIG.max_sequences,), jnp.int32)
    mask = jax.ShapeDtypeStruct((CONFIG.max_sequences,), jnp.bool_)
    tokens = jax.ShapeDtypeStruct((T,), jnp.int32)
    sampler = jax.eval_shape(lambda: DecodeState.create(CONFIG, capacity=1).sampler)
    forward = toy.forward
    return {
        "prefill": (lambda s, p, t, n: prefill(forward, p, s, t, n), (state, params, tokens, rows)),
        "decode_step": (lambda s, p: decode_step(forward, p, s), (state, params)),
        "decode_loop": (lambda s, p: decode_loop(forward, p, s), (state, params)),
        "start": (start, (state, mask, rows, rows, sampler)),
        "stop": (stop, (state, mask)),
    }


def check(compiled, state):
    pool_bytes = state.pool.num_bytes
    assert pool_bytes == 512 * 2**20
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < 0.02 * pool_bytes, f"{memory.temp_size_in_bytes} bytes of temporaries"


@pytest.mark.parametrize("name", step_functions())
def test_on_a_cpu_no_step_copies_the_pool(name):
    function, arguments = step_functions()[name]
    check(jax.jit(function, donate_argnums=0).lower(*arguments).compile(), arguments[0])


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", step_functions())
def test_on_a_tpu_v6e_no_step_copies_the_pool(name):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    function, arguments = step_functions()[name]
    device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu"),
    )  # fmt: skip
    arguments = abstract(arguments, SingleDeviceSharding(device))
    with use_abstract_mesh(mesh):
        lowered = jax.jit(function, donate_argnums=0).lower(*arguments)
    check(lowered.compile(), arguments[0])
