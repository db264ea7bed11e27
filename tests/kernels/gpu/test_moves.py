"""Writing and copying pages in the interpreter against the reference, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import make_problem

from pallas_kernels import Pages, copy_pages, write_pages
from pallas_kernels.pages import LARGEST, init_pages


def assert_same(result: Pages, expected: Pages):
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))  # NaN == NaN


@pytest.mark.parametrize(
    ("head_dim", "heads", "dtype"),
    [
        (128, 2, "bfloat16"),
        pytest.param(64, 2, "bfloat16", marks=pytest.mark.long),
        (128, 2, "int8"),
        (64, 1, "float8_e4m3fn"),
    ],
)
def test_write(interpreter, head_dim, heads, dtype):
    # A row's 17 new tokens end on a page's last slot; the next fills a page; one has none; the last is inert.
    lengths, query_lens = [32, 16, 5, -1], [17, 16, 0, 2]
    problem = make_problem(
        lengths, query_lens=query_lens, padding=2, heads=(heads, heads), head_dim=head_dim, write=True
    )
    table = problem.page_table.at[0, 0].set(-3)  # the first of the new tokens has no page
    pages = problem.pages
    if dtype in LARGEST:
        pages = init_pages(pages.num_pages, pages.num_kv_heads, pages.page_size, head_dim, dtype)
    arguments = (problem.k, problem.v, table, problem.lengths, problem.query_starts)

    def run(implementation):
        return jax.jit(lambda pages, *rest: write_pages(pages, *rest, implementation=implementation))(pages, *arguments)

    assert_same(run("pallas_gpu"), run("reference"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", pytest.param("uint8", marks=pytest.mark.long)])
def test_copy_reads_before_it_writes(interpreter, dtype):
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.integers(0, 99, (8, 2, 32, 128)), dtype)
    scales = jnp.asarray(rng.normal(size=(8, 2, 32)), jnp.float32) if dtype != "bfloat16" else None
    pages = Pages(data, scales, 16)
    source = jnp.array([1, 2, 3, 0, 99, 4, 5], jnp.int32)
    target = jnp.array([2, 1, 4, 5, 6, -2, 8], jnp.int32)  # 1 and 2 swap; the last four name no pair of pages

    def run(implementation):
        return jax.jit(lambda *a: copy_pages(*a, implementation=implementation))(pages, source, target)

    assert_same(run("pallas_gpu"), run("reference"))
