"""How far attention is from exact numbers.

    python -m benchmarks.accuracy [--json] [--contexts 256 2048 8192 32768] [--tpu-contexts 256]

The root mean square of the error of the outputs, as a share of that of the outputs, against float64: a decode step, and
a chunk of 64 tokens, on contexts of several lengths, 8/1/128 heads, queries, keys and values of unit scale in bfloat16.
Pages of 8 bits add what quantisation costs. The TPU kernels run in their interpreter, which takes a minute for each
number of the shortest context, and longer for others.
"""

import argparse
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from benchmarks.report import Report, add_json_option
from pallas_kernels import init_pages, paged_attention

NUM_HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 64
CHUNKS = {"decode": 1, "prefill": 64}  # new tokens
DTYPES = ("bfloat16", "int8", "float8_e4m3fn")


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of the last queries, [T, N, H] over [C, H] of the only KV head, in float64."""
    scores = np.einsum("tnh,ch->tnc", q, k) / np.sqrt(HEAD_DIM)
    position = np.arange(len(k) - len(q), len(k))
    scores = np.where(np.arange(len(k)) <= position[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("tnc,ch->tnh", weights / weights.sum(axis=-1, keepdims=True), v)


def error(implementation: str, context: int, chunk: int, dtype: str) -> float:
    """Of one step that follows another, which has cached all tokens but those of the chunk."""
    rng = np.random.default_rng(context)
    q, k, v = (
        jnp.asarray(rng.standard_normal((n, heads, HEAD_DIM)), jnp.bfloat16)
        for n, heads in ((chunk, NUM_HEADS), (context, 1), (context, 1))
    )
    num_pages = -(-context // PAGE_SIZE)
    table = jnp.asarray(rng.permutation(num_pages)[None] + 1, jnp.int32)
    pages = init_pages(num_pages + 1, 1, PAGE_SIZE, HEAD_DIM, dtype, is_padded=True)
    before = context - chunk
    filler = jnp.zeros((before, NUM_HEADS, HEAD_DIM), jnp.bfloat16)
    attend = functools.partial(jax.jit, static_argnames="implementation")(paged_attention)

    def step(pages, q, k, v, length, implementation):
        starts = jnp.array([0, len(q)], jnp.int32)
        return attend(q, k, v, pages, table, jnp.array([length], jnp.int32), starts, implementation=implementation)

    pages = step(pages, filler, k[:before], v[:before], before, "xla").pages
    out = step(pages, q, k[before:], v[before:], context, implementation).out
    want = exact(*(np.asarray(x, np.float64) for x in (q, k[:, 0], v[:, 0])))
    return float(np.sqrt(np.mean((np.asarray(out, np.float64) - want) ** 2) / np.mean(want**2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192, 32768])
    parser.add_argument("--tpu-contexts", type=int, nargs="*", default=[256])
    options = parser.parse_args()
    implementations = [
        ("XLA", "xla", options.contexts, contextlib.nullcontext),
        ("TPU kernel", "pallas_tpu", options.tpu_contexts, pltpu.force_tpu_interpret_mode),
    ]
    report = Report("accuracy", "rms error of attention against float64, % of the outputs' rms")
    for name, implementation, contexts, place in implementations:
        with place():
            for dtype in DTYPES:
                for what, chunk in CHUNKS.items():
                    for context in contexts:
                        percent = 100 * error(implementation, context, chunk, dtype)
                        report.add(attention=name, pages=dtype, step=what, context=context, percent=percent)
                        print(report.rows[-1], flush=True)
    report.finish(options)


if __name__ == "__main__":
    main()
