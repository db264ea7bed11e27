"""Prefill of 2048 tokens in chunks of 512 over pages, against `jax.nn.dot_product_attention` on a contiguous cache.

    python -m benchmarks.prefill [--json] [--page-size 16] [--quick]

Both write each chunk's keys and values, then attend over the 2048 slots with a causal mask. The mixed step has one
chunk of 512 tokens after 1536 others, and 31 sequences of 1 .. 2048 tokens that decode, in one call; its contestant
runs the chunk and the batch of decodes one after the other.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.timing import compare
from pallas_kernels import init_pages, paged_attention

LENGTH, CHUNK = 2048, 512
HEADS = (32, 8, 128)  # N, K, H
DECODES = 31


@functools.partial(jax.jit, donate_argnums=(3, 4))
def dense_chunk(q, k, v, k_cache, v_cache, start):  # caches [1, T, K, H]
    k_cache = jax.lax.dynamic_update_slice_in_dim(k_cache, k[None], start, 1)
    v_cache = jax.lax.dynamic_update_slice_in_dim(v_cache, v[None], start, 1)
    visible = jnp.arange(LENGTH)[None, :] <= start + jnp.arange(len(q))[:, None]
    out = jax.nn.dot_product_attention(q[None], k_cache, v_cache, mask=visible[None, None])
    return out[0], k_cache, v_cache


@functools.partial(jax.jit, donate_argnums=(3, 4))
def dense_decode(q, k, v, k_cache, v_cache, lengths):  # caches [B, T, K, H]
    row = jnp.arange(len(q))
    k_cache, v_cache = k_cache.at[row, lengths - 1].set(k), v_cache.at[row, lengths - 1].set(v)
    out = jax.nn.dot_product_attention(q[:, None], k_cache, v_cache, key_value_seq_lengths=lengths)
    return out[:, 0], k_cache, v_cache


@functools.partial(jax.jit, donate_argnums=3)
def paged(q, k, v, pages, table, lengths, starts):
    return paged_attention(q, k, v, pages, table, lengths, starts, implementation="xla")[:2]


def setting(dtype: str, page_size: int, batch: int):
    """Random tokens of `batch` sequences with all their pages, empty, and shuffled."""
    num_heads, num_kv_heads, head_dim = HEADS
    rng = np.random.default_rng(0)
    max_pages = LENGTH // page_size
    table = jnp.asarray(rng.permutation(batch * max_pages).reshape(batch, max_pages) + 1, jnp.int32)
    pages = init_pages(batch * max_pages + 1, num_kv_heads, page_size, head_dim, dtype)

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    q = random(LENGTH, num_heads, head_dim)
    return q, random(LENGTH, num_kv_heads, head_dim), random(LENGTH, num_kv_heads, head_dim), pages, table, rng


def check(a, b, dtype: str) -> None:
    error = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
    assert error < {"float32": 1e-5, "bfloat16": 2e-2}[dtype], f"the outputs differ by {error}"


def chunks(dtype: str, page_size: int):
    q, k, v, pages, table, _ = setting(dtype, page_size, 1)
    cache = [jnp.zeros((1, *x.shape), x.dtype) for x in (k, v)]
    parts = [slice(start, start + CHUNK) for start in range(0, LENGTH, CHUNK)]

    def run_paged():
        nonlocal pages
        outs = []
        for part in parts:
            where = jnp.array([part.stop], jnp.int32), jnp.array([0, CHUNK], jnp.int32)
            out, pages = paged(q[part], k[part], v[part], pages, table, *where)
            outs.append(out)
        return outs

    def run_dense():
        outs = []
        for part in parts:
            out, *cache[:] = dense_chunk(q[part], k[part], v[part], *cache, part.start)
            outs.append(out)
        return outs

    check(run_paged(), run_dense(), dtype)
    return {"pages": run_paged, "dot_product_attention": run_dense}


def mixed(dtype: str, page_size: int):
    q, k, v, pages, table, rng = setting(dtype, page_size, DECODES + 1)
    lengths = rng.integers(1, LENGTH + 1, DECODES + 1).astype(np.int32)
    lengths[DECODES] = LENGTH
    starts = jnp.asarray(np.append(np.arange(DECODES + 1), DECODES + CHUNK), jnp.int32)
    tokens = slice(0, DECODES + CHUNK)
    caches = [[jnp.zeros((rows, *x.shape), x.dtype) for x in (k, v)] for rows in (DECODES, 1)]

    def run_paged():
        nonlocal pages
        out, pages = paged(q[tokens], k[tokens], v[tokens], pages, table, jnp.asarray(lengths), starts)
        return out

    def run_dense():
        first, last = slice(0, DECODES), slice(DECODES, DECODES + CHUNK)
        decoded, *caches[0][:] = dense_decode(q[first], k[first], v[first], *caches[0], jnp.asarray(lengths[:-1]))
        out, *caches[1][:] = dense_chunk(q[last], k[last], v[last], *caches[1], LENGTH - CHUNK)
        return jnp.concatenate([decoded, out])

    check(run_paged(), run_dense(), dtype)
    return {"pages": run_paged, "dot_product_attention": run_dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="2 rounds only")
    add_json_option(parser)
    options = parser.parse_args()
    shape = "/".join(str(x) for x in HEADS)
    report = Report("prefill", f"Prefill attention, {shape} (N/K/H), pages of {options.page_size} tokens")
    for step, make in ((f"{LENGTH} tokens by {CHUNK}", chunks), (f"{CHUNK} tokens + {DECODES} decodes", mixed)):
        for dtype in ("float32", "bfloat16"):
            timings = compare(make(dtype, options.page_size), 2 if options.quick else 7)
            for key, timing in timings.items():
                report.add(
                    step=step, dtype=dtype, attention=key, ms=timing.wall, fastest_ms=timing.fastest, cpu_ms=timing.cpu,
                    dot_product_is=f"{timings['dot_product_attention'].wall / timing.wall:.2f}x",
                )  # fmt: skip
    report.finish(options)


if __name__ == "__main__":
    main()
