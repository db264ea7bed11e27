"""No step copies the pool: XLA's own account of every public step function, compiled for a CPU and for a TPU v6e."""

import functools

import jax
import jax.numpy as jnp
import pytest

import toy
from benchmarks.tpu_static.target import compile_for, hbm_temporaries
from paged_jax import CacheConfig, KVCache, Stepper, rollout, score
from paged_jax.decoding.rows import DecodeState
from paged_jax.decoding.step import run, start

ROWS, T = 32, 512  # tokens of a pass that decodes, and of one that prefills: its queries alone are 4 MB
CONFIG = CacheConfig(
    num_layers=2, num_kv_heads=8, head_dim=128, num_pages=4096, max_sequences=ROWS, max_pages_per_sequence=128
)  # 2 layers of 256 MB in bfloat16
QUEUE, WIDTH, NEW = 64, 64, 32  # a rollout's prompts, the longest prompt, and the most new tokens


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def step_functions():
    """name -> (function, arguments with the donated cache or state first)."""
    params = jax.eval_shape(functools.partial(toy.init_params, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"))
    cache = jax.eval_shape(lambda: KVCache.create(CONFIG))
    prefills, decodes = Stepper(toy.forward, (T,)), Stepper(toy.forward, (ROWS,))  # a pass takes long to compile
    state = jax.eval_shape(lambda: DecodeState.create(CONFIG, WIDTH + NEW, prefills.token_counts))

    def draw(cache, params, prompts, prompt_lens):
        return rollout(decodes, params, prompts, prompt_lens, cache, max_new_tokens=NEW, num_samples=2)

    def measure(cache, params, prompt, prompt_len, continuations, lengths):
        return score(toy.forward, params, prompt, prompt_len, continuations, lengths, cache, chunk=ROWS)

    return {
        "run": (lambda s, p: run(prefills, p, s, 16), (state, params)),
        "rollout": (draw, (cache, params, int32(QUEUE, WIDTH), int32(QUEUE))),
        "score": (measure, (cache, params, int32(WIDTH), int32(), int32(8, NEW), int32(8))),
        "start": (start, (state, jax.ShapeDtypeStruct((ROWS,), jnp.bool_), state.rows)),
    }


def check(compiled, arguments, temporaries: int):
    """The pool is updated in place; what a step computes, with the queue and the logits, is a small share of it."""
    pool = getattr(arguments[0], "cache", arguments[0]).pool
    assert pool.num_bytes == 512 * 2**20
    assert compiled.memory_analysis().alias_size_in_bytes >= pool.num_bytes, "the pool is not updated in place"
    assert temporaries < 0.03 * pool.num_bytes, f"{temporaries} bytes of temporaries"


NAMES = ["start", "rollout", *(pytest.param(name, marks=pytest.mark.long) for name in ("run", "score"))]


@pytest.mark.parametrize("name", NAMES)
def test_on_a_cpu_no_step_copies_the_pool(name):
    function, arguments = step_functions()[name]
    compiled = jax.jit(function, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    check(compiled, arguments, memory.temp_size_in_bytes)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", NAMES)
def test_on_a_tpu_v6e_no_step_copies_the_pool(name):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    function, arguments = step_functions()[name]
    compiled = compile_for("v6e:2x2", jax.jit(function, donate_argnums=0), *arguments)
    temporaries = hbm_temporaries(compiled)
    print(f"{name}: {temporaries / 1e6:.2f} MB of temporaries in HBM")
    assert temporaries > 0, "the compiler says nothing"
    check(compiled, arguments, temporaries)
