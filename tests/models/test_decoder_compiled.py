"""A whole decode step of the nnx decoder, compiled for each kind of TPU on a machine without one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.tpu_static.target import compile_for
from paged_jax import CacheConfig, DecodeState, decode_step, models

CONFIG = models.DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    qk_norm=True,
    sinks=True,
    windows=(512, None),
)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "chip",
    ["v5e:2x2", *(pytest.param(chip, marks=pytest.mark.long) for chip in ("v5p:2x2x1", "v6e:2x2")), "tpu7x:2x2x1"],
)
def test_a_step_runs_the_kernels_and_copies_no_pages(chip):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    decoder = nnx.eval_shape(lambda: models.Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    graph, params = nnx.split(decoder)
    cache = CacheConfig(2, 8, 128, 8192, max_sequences=32, max_pages_per_sequence=256, windows=CONFIG.windows)
    state = jax.eval_shape(lambda: DecodeState.create(cache, capacity=8))

    def step(state, params):
        return decode_step(lambda params, *rest: nnx.merge(graph, params)(*rest), params, state)

    compiled = compile_for(chip, jax.jit(step, donate_argnums=0), state, params)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= CONFIG.num_layers
    memory, pool_bytes = compiled.memory_analysis(), state.pool.num_bytes
    assert memory.alias_size_in_bytes >= pool_bytes > 2**29
    assert memory.temp_size_in_bytes < 0.02 * pool_bytes
