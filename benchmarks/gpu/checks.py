"""Every kernel against the reference: on a GPU as it is, elsewhere in Mosaic GPU's interpreter."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Pages, Sharing, copy_pages, init_pages, paged_attention, sharing, write_pages
from pallas_kernels.gpu import hardware

BOUND = 2e-2  # on data of unit scale: the weights are rounded to bfloat16


class Case(NamedTuple):
    """Sequences of which the last `queries` tokens are new, on pages of one kind."""

    kernel: str
    lengths: tuple[int, ...]
    queries: tuple[int, ...]
    heads: tuple[int, int, int] = (8, 2, 128)  # N, K, H
    page_size: int = 16
    dtype: str = "bfloat16"
    options: tuple[tuple[str, object], ...] = ()


CASES = (
    Case("decode", (0, 1, 70, 129), (1, 1, 1, 1)),
    Case("decode", (65, 150), (1, 1), (2, 2, 64), 64, options=(("window", 40), ("soft_cap", 20.0))),
    Case("decode", (65, 150), (1, 1), (16, 1, 256), 32),
    Case("decode", (65, 150), (1, 1), dtype="int8"),
    Case("decode", (65, 150), (1, 1), (4, 2, 64), 64, dtype="float8_e4m3fn"),
    Case("rows", (40, 150, 65), (40, 37, 1), (2, 1, 128)),
    Case("rows", (70, 20), (40, 20), (2, 1, 128), dtype="float8_e4m3fn"),
    Case("rows", (70,), (40,), (2, 1, 128), 64, dtype="int8"),
    Case("rows, large group", (70, 20), (1, 1), (20, 1, 128), 64),
    Case("shared prefix", (97, 130, 113, 99), (1, 1, 1, 1), options=(("shared_prefix", 96),)),
)


def run_checks() -> list[dict[str, object]]:
    """The largest error of every case; raises where one is out of bounds."""
    on_gpu = jax.default_backend() == "gpu"
    place = contextlib.nullcontext() if on_gpu else hardware.interpreter()
    fewest, sharing.FEWEST_GPU_BYTES = sharing.FEWEST_GPU_BYTES, 0.0
    try:
        with place:
            rows = [check_attention(case) for case in CASES]
            return rows + [check_copy()]
    finally:
        sharing.FEWEST_GPU_BYTES = fewest


def check_attention(case: Case) -> dict[str, object]:
    rng = np.random.default_rng(0)
    num_heads, num_kv_heads, head_dim = case.heads
    lengths, queries = np.array(case.lengths, np.int32), np.array(case.queries, np.int32)
    options: dict[str, Any] = dict(case.options)
    shared = options.get("shared_prefix", 0) // case.page_size
    columns = -(-int(lengths.max()) // case.page_size)
    own = rng.permutation(lengths.size * (columns - shared)).reshape(lengths.size, -1) + 1 + shared
    table = np.concatenate([np.tile(np.arange(shared) + 1, (lengths.size, 1)), own], axis=1).astype(np.int32)
    if "shared_prefix" in options:
        options["sharing"] = Sharing.of_all(jnp.asarray(lengths), options.pop("shared_prefix"))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    pages = init_pages(int(table.max()) + 1, num_kv_heads, case.page_size, head_dim, case.dtype)
    every = np.maximum(lengths, 0)
    starts = np.concatenate([[0], np.cumsum(every)]).astype(np.int32)
    old = normal(starts[-1], num_kv_heads, head_dim), normal(starts[-1], num_kv_heads, head_dim)
    table = jnp.asarray(table)
    pages = write_pages(pages, *old, table, jnp.asarray(lengths), jnp.asarray(starts), implementation="reference")
    num_new = int(queries.sum())
    new = normal(num_new, num_heads, head_dim), *(normal(num_new, num_kv_heads, head_dim) for _ in range(2))
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)

    def run(implementation):
        function = jax.jit(
            lambda *arguments: paged_attention(
                *arguments, max_query_len=max(case.queries), implementation=implementation, **options
            )
        )
        return jax.block_until_ready(function(*new, pages, table, jnp.asarray(lengths), jnp.asarray(starts)))

    result, expected = run("pallas_gpu"), run("reference")
    assert_same(result.pages, expected.pages)
    error = float(jnp.max(jnp.abs(result.out.astype(jnp.float32) - expected.out.astype(jnp.float32))))
    assert error < BOUND, f"{case}: off by {error}"
    described = ", ".join(f"{name} {value}" for name, value in case.options)
    return dict(kernel=case.kernel, heads="{}/{}/{}".format(*case.heads), page=case.page_size, dtype=case.dtype,
                options=described, lengths=str(case.lengths), error=error)  # fmt: skip


def check_copy() -> dict[str, object]:
    pages = init_pages(8, 2, 16, 128)
    data = jnp.asarray(np.random.default_rng(0).normal(size=pages.data.shape), pages.dtype)
    pages = type(pages)(data, None, 16)
    source, target = jnp.array([1, 2, 3, 0], jnp.int32), jnp.array([2, 1, 4, 5], jnp.int32)

    def run(implementation):
        function = jax.jit(lambda *a: copy_pages(*a, implementation=implementation))
        return jax.block_until_ready(function(pages, source, target))

    assert_same(run("pallas_gpu"), run("reference"))
    return dict(kernel="copy", heads="2/2/128", page=16, dtype="bfloat16", options="", lengths="", error=0.0)


def assert_same(pages: Pages, expected: Pages) -> None:
    for got, want in zip(jax.tree.leaves(pages), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
