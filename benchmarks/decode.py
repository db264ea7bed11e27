"""One decode step's attention over ragged lengths: pages against contiguous caches padded to the longest.

    python -m benchmarks.decode [--json] [--page-size 16] [--quick]

Lengths are uniform in 1 .. 2048. The contiguous contestants read a cache of the full 2048 tokens a sequence, as a
static shape makes them: `jax.nn.dot_product_attention` over `[B, T, K, H]`, and an einsum over a head-major cache
`[B, K, T, H]`, the faster way to write it on a CPU. All give the same outputs on the same data, which is checked.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.timing import compare
from pallas_kernels import Pages, init_pages, paged_attention, write_pages

MAX_LENGTH = 2048
HEADS = {"32/8/128": (32, 8, 128), "8/2/64": (8, 2, 64)}  # N/K/H


@jax.jit
def dot_product_attention(q, k, v, lengths):  # k, v [B, T, K, H]
    return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lengths)[:, 0]


@jax.jit
def head_major_einsum(q, k, v, lengths):  # k, v [B, K, T, H]
    batch, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim)
    scores = jnp.einsum("bkgh,bkth->bkgt", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    visible = jnp.arange(k.shape[2])[None, :] < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgt,bkth->bkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


@jax.jit
def paged(q, pages, table, lengths, starts):
    return paged_attention(q, None, None, pages, table, lengths, starts, max_query_len=1, implementation="xla").out


@functools.partial(jax.jit, donate_argnums=3)
def paged_step(q, k, v, pages, table, lengths, starts):
    return paged_attention(q, k, v, pages, table, lengths, starts, max_query_len=1, implementation="xla")[:2]


@functools.partial(jax.jit, donate_argnums=0)
def fill(pages, k, v, row, length):
    return write_pages(pages, k, v, row[None], length[None], jnp.array([0, 1]) * length)


def measure(report: Report, name: str, batch: int, dtype: str, page_size: int, repeats: int) -> None:
    num_heads, num_kv_heads, head_dim = HEADS[name]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, MAX_LENGTH + 1, batch).astype(np.int32)
    max_pages = MAX_LENGTH // page_size
    used = -(-lengths // page_size)
    num_pages = int(used.sum()) + 1
    ids = iter(rng.permutation(np.arange(1, num_pages, dtype=np.int32)))
    table = np.zeros((batch, max_pages), np.int32)
    for row, count in enumerate(used):
        table[row, :count] = [next(ids) for _ in range(count)]

    def random(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    q = random(batch, num_heads, head_dim)
    k, v = (random(batch, MAX_LENGTH, num_kv_heads, head_dim) for _ in range(2))
    k_heads, v_heads = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    pages = {kind: init_pages(num_pages, num_kv_heads, page_size, head_dim, kind) for kind in (dtype, "int8")}
    for kind in pages:
        for row in range(batch):
            pages[kind] = fill(pages[kind], k[row], v[row], jnp.asarray(table[row]), jnp.asarray(lengths[row]))
    where = jnp.asarray(table), jnp.asarray(lengths), jnp.arange(batch + 1, dtype=jnp.int32)
    last = tuple(x[np.arange(batch), lengths - 1] for x in (k, v))
    step_pages = jax.tree.map(jnp.copy, pages[dtype])

    def step():
        nonlocal step_pages
        out, step_pages = paged_step(q, *last, step_pages, *where)
        return out

    functions = {
        "pages": lambda: paged(q, pages[dtype], *where),
        "pages, with the write": step,
        "pages, int8": lambda: paged(q, pages["int8"], *where),
        "head-major einsum": lambda: head_major_einsum(q, k_heads, v_heads, where[1]),
        "dot_product_attention": lambda: dot_product_attention(q, k, v, where[1]),
    }
    outs = {key: np.asarray(function(), np.float32) for key, function in functions.items()}
    for key, out in outs.items():
        bound = 0.05 if "int8" in key else {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
        error = np.abs(out - outs["head-major einsum"]).max()
        assert error < bound, f"{key} is off by {error}"

    def megabytes(x: Pages | tuple) -> float:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(x)) / 1e6

    sizes = {"pages, int8": megabytes(pages["int8"]), "head-major einsum": megabytes((k, v))}
    sizes["dot_product_attention"] = sizes["head-major einsum"]
    timings = compare(functions, repeats)
    for key, timing in timings.items():
        report.add(
            heads=name, dtype=dtype, batch=batch, tokens=int(lengths.sum()), attention=key,
            MB=sizes.get(key, megabytes(pages[dtype])), ms=timing.wall, fastest_ms=timing.fastest, cpu_ms=timing.cpu,
            einsum_is=f"{timings['head-major einsum'].wall / timing.wall:.2f}x",
            dot_product_is=f"{timings['dot_product_attention'].wall / timing.wall:.2f}x",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="batch 8 and 3 rounds only")
    add_json_option(parser)
    options = parser.parse_args()
    report = Report("decode", f"Decode attention, ragged lengths to {MAX_LENGTH}, pages of {options.page_size} tokens")
    for name in HEADS:
        for dtype in ("float32", "bfloat16"):
            for batch in (8,) if options.quick else (8, 32):
                measure(report, name, batch, dtype, options.page_size, 3 if options.quick else 15)
    report.finish(options)


if __name__ == "__main__":
    main()
