"""A whole decode step of the nnx decoder, compiled for each kind of TPU on a machine without one; and that the depth
of a decoder costs nothing to compile where its layers run in a loop."""

import dataclasses
import time
from typing import Any

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
    [*(pytest.param(chip, marks=pytest.mark.long) for chip in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")), "tpu7x:2x2x1"],
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


LLAMA_8B = models.DecoderConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128,
)  # fmt: skip
GEMMA_3 = models.DecoderConfig(
    vocab_size=262144, hidden_size=2560, intermediate_size=10240, num_layers=34, num_heads=8, num_kv_heads=4,
    head_dim=256, qk_norm=True, post_norms=True, unit_offset_norm=True, activation="gelu_tanh", tie_embeddings=True,
    windows=(*((1024,) * 5 + (None,)) * 5, *(1024,) * 4),
)  # fmt: skip


def compile_forward(config: models.DecoderConfig):
    """A decode step of 32 rows without the page table's part, and the bytes of its pool."""
    decoder = nnx.eval_shape(lambda: models.Decoder(config, period=config.period, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    graph, params = nnx.split(decoder)
    sizes: dict[str, Any] = dict(num_pages=1024, max_sequences=32, max_pages_per_sequence=128)
    cache = CacheConfig(config.num_layers, config.num_kv_heads, config.head_dim, windows=config.windows, **sizes)

    def step(pool, params, tokens, metadata):
        return nnx.merge(graph, params)(tokens, pool, metadata)

    pool = jax.eval_shape(lambda: PagePool.create(cache))
    metadata = jax.eval_shape(lambda: AttentionMetadata.decode(PageTables.create(cache), jnp.ones(32, bool)))
    tokens = jax.ShapeDtypeStruct((32,), jnp.int32)
    start = time.process_time()
    compiled = compile_for("v6e:2x2", jax.jit(step, donate_argnums=0), pool, params, tokens, metadata)
    seconds = time.process_time() - start
    layer_bytes = sum(leaf.size * 2 for leaf in jax.tree.leaves(params["layers"])) / config.num_layers
    return compiled, pool.num_bytes, layer_bytes, seconds


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "config", [pytest.param(LLAMA_8B, id="8B"), pytest.param(GEMMA_3, id="hybrid", marks=pytest.mark.long)]
)
def test_a_deep_decoder_compiles_to_the_program_of_one_period(config):
    """The pool is written in place; no weights are copied but the smaller ones of the layer that comes next."""
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    # The layers that are left of the last period are no part of the loop, so both have them.
    num_layers = config.period + config.num_layers % config.period
    one = dataclasses.replace(config, num_layers=num_layers, windows=config.windows[:num_layers])
    programs = compile_forward(one), compile_forward(config)
    (short, _, _, short_seconds), (deep, pool_bytes, layer_bytes, deep_seconds) = programs
    sizes = [compiled.as_text().count("\n") for compiled in (short, deep)]
    memory, memory_of_one = deep.memory_analysis(), short.memory_analysis()
    assert memory is not None and memory_of_one is not None
    code = memory.generated_code_size_in_bytes / memory_of_one.generated_code_size_in_bytes
    print(
        f"{config.num_layers} layers to {num_layers}: CPU time {deep_seconds / short_seconds:.2f}, lines of HLO "
        f"{sizes[1] / sizes[0]:.2f}, code {code:.2f}; temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB to "
        f"{memory_of_one.temp_size_in_bytes / 1e6:.1f}, a layer {layer_bytes / 1e6:.1f} MB, pool {pool_bytes / 1e6:.0f}"
    )
    assert sizes[1] <= 1.5 * sizes[0] and code <= 1.5
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < 0.25 * layer_bytes
