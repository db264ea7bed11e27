"""A whole decode step of the nnx decoder, compiled for each kind of TPU on a machine without one; and that the depth
of a decoder costs nothing to compile where its layers run in a loop."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.tpu_static.target import compile_for, hbm_temporaries
from paged_jax import AttentionMetadata, CacheConfig, KVCache, PagePool, PageTables, Stepper, models, rollout

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

ROWS = 32
STEP, ROLLOUT = (), (8, 16, 32, 64, 256)  # token counts


def compile_for_v6e(config: models.DecoderConfig, token_counts: tuple[int, ...]):
    """A decode step of 32 rows without the page table's part, or a whole rollout of these token counts.

    Returns:
        The program, the bytes of its pool and of a layer's weights, and the CPU seconds that it took to compile.
    """
    decoder = nnx.eval_shape(lambda: models.Decoder(config, period=config.period, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    graph, params = nnx.split(decoder)
    sizes: dict[str, Any] = dict(num_pages=1024, max_sequences=ROWS, max_pages_per_sequence=128)
    cache_config = CacheConfig(config.num_layers, config.num_kv_heads, config.head_dim, windows=config.windows, **sizes)
    cache = jax.eval_shape(lambda: KVCache.create(cache_config))

    def forward(params, tokens, pool, metadata):
        return nnx.merge(graph, params)(tokens, pool, metadata)

    def step(pool, params, tokens, metadata):
        return forward(params, tokens, pool, metadata)

    def sample(cache, params, prompts, prompt_lens):
        return rollout(Stepper(forward, token_counts), params, prompts, prompt_lens, cache, max_new_tokens=256)

    def int32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    metadata = jax.eval_shape(lambda: AttentionMetadata.decode(PageTables.create(cache_config), jnp.ones(ROWS, bool)))
    program, arguments = step, (cache.pool, params, int32(ROWS), metadata)
    if token_counts:
        program, arguments = sample, (cache, params, int32(64, 512), int32(64))
    start = time.process_time()
    compiled = compile_for("v6e:2x2", jax.jit(program, donate_argnums=0), *arguments)
    seconds = time.process_time() - start
    layer_bytes = sum(leaf.size * 2 for leaf in jax.tree.leaves(params["layers"])) / config.num_layers
    return compiled, cache.pool.num_bytes, layer_bytes, seconds


@pytest.mark.tpu_compile
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("config", "token_counts"),
    [
        pytest.param(LLAMA_8B, STEP, id="8B"),
        pytest.param(GEMMA_3, STEP, id="hybrid", marks=pytest.mark.long),
        pytest.param(LLAMA_8B, ROLLOUT, id="8B, rollout", marks=pytest.mark.long),
        pytest.param(GEMMA_3, ROLLOUT, id="hybrid, rollout", marks=pytest.mark.long),
    ],
)
def test_a_deep_decoder_compiles_to_the_program_of_one_period(config, token_counts):
    """The pool is written in place; no weights are copied but the smaller ones of the layer that comes next."""
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    # The layers that are left of the last period are no part of the loop, so both have them.
    num_layers = config.period + config.num_layers % config.period
    one = dataclasses.replace(config, num_layers=num_layers, windows=config.windows[:num_layers])
    programs = compile_for_v6e(one, token_counts), compile_for_v6e(config, token_counts)
    (short, _, _, short_seconds), (deep, pool_bytes, layer_bytes, deep_seconds) = programs
    sizes = [compiled.as_text().count("\n") for compiled in (short, deep)]
    memory, memory_of_one = deep.memory_analysis(), short.memory_analysis()
    assert memory is not None and memory_of_one is not None
    temporaries, temporaries_of_one = hbm_temporaries(deep), hbm_temporaries(short)
    # Drawing holds up to four float32 arrays of the logits of its rows.
    logits = 4 * 4 * ROWS * config.vocab_size if token_counts else 0
    code = memory.generated_code_size_in_bytes / memory_of_one.generated_code_size_in_bytes
    print(
        f"{config.num_layers} layers to {num_layers}: CPU time {deep_seconds / short_seconds:.2f}, lines of HLO "
        f"{sizes[1] / sizes[0]:.2f}, code {code:.2f}; temporaries in HBM {temporaries / 1e6:.1f} MB to "
        f"{temporaries_of_one / 1e6:.1f}, logits {logits / 1e6:.1f}, a layer {layer_bytes / 1e6:.1f}, "
        f"pool {pool_bytes / 1e6:.0f}"
    )
    assert sizes[1] <= 1.5 * sizes[0] and code <= 1.5
    assert memory.alias_size_in_bytes >= pool_bytes
    assert temporaries < 0.25 * layer_bytes + logits
    assert temporaries - temporaries_of_one < 0.25 * layer_bytes
