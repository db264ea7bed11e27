"""A whole decode step of the nnx decoder, compiled for each kind of TPU on a machine without one."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.tpu_static.target import compile_for
from paged_jax import AttentionMetadata, CacheConfig, PagePool, PageTables, models

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
    pool, tables = jax.eval_shape(lambda: (PagePool.create(cache), PageTables.create(cache)))
    tokens = jax.ShapeDtypeStruct((32,), jnp.int32)

    def step(pool, tables, params, tokens):
        tables, reservation = tables.slide().reserve(jnp.ones(32, jnp.int32))
        metadata = AttentionMetadata.decode(tables, reservation.granted)
        logits, pool = nnx.merge(graph, params)(tokens, pool.copy(reservation), metadata)
        return pool, tables, jnp.argmax(logits, axis=-1)

    compiled = compile_for(chip, jax.jit(step, donate_argnums=0), pool, tables, params, tokens)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= CONFIG.num_layers
    memory, pool_bytes = compiled.memory_analysis(), pool.num_bytes
    assert memory.alias_size_in_bytes >= pool_bytes > 2**29
    assert memory.temp_size_in_bytes < 0.02 * pool_bytes
