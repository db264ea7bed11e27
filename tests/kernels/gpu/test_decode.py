"""The decode kernel in the interpreter against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import check, expect_no_neighbours
from problems import make_problem

from pallas_kernels.gpu.quantised import STEP, split_queries

# Head size, page size, (query, KV) heads, window, soft cap, sinks: every pair of neighbouring choices occurs. Short are
# those that no other test has.
CASES = [
    pytest.param(128, 16, (12, 2), None, None, False, marks=pytest.mark.long),
    pytest.param(128, 8, (16, 2), 70, 5.0, True, marks=pytest.mark.long),
    pytest.param(128, 64, (3, 3), 5, None, True, marks=pytest.mark.long),
    pytest.param(128, 128, (12, 1), None, 5.0, False, marks=pytest.mark.long),
    pytest.param(128, 32, (5, 5), 64, None, False, marks=pytest.mark.long),
    pytest.param(64, 16, (5, 1), 130, None, True, marks=pytest.mark.long),
    pytest.param(64, 64, (32, 2), None, 2.0, True, marks=pytest.mark.long),
    pytest.param(64, 128, (3, 1), 16, None, False, marks=pytest.mark.long),
    pytest.param(64, 192, (2, 2), None, None, True, marks=pytest.mark.long),
    (256, 16, (8, 2), None, None, True),
    pytest.param(256, 64, (10, 1), 100, 5.0, False, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("head_dim", "page_size", "heads", "window", "soft_cap", "has_sinks"), CASES)
def test_equals_the_reference(interpreter, head_dim, page_size, heads, window, soft_cap, has_sinks):
    lengths = [0, 1, page_size + 1, max(64, page_size), 197]
    problem = make_problem(lengths, heads=heads, head_dim=head_dim, page_size=page_size)
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32) if has_sinks else None
    check(problem, max_query_len=1, window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "heads", "write"),
    [
        pytest.param("int8", 128, 16, (8, 2), True, marks=pytest.mark.long),
        ("float8_e4m3fn", 64, 8, (4, 2), True),
        pytest.param("float8_e4m3fn", 128, 128, (3, 1), True, marks=pytest.mark.long),
        pytest.param("float8_e4m3fn", 256, 64, (12, 1), False, marks=pytest.mark.long),
        pytest.param("int8", 64, 192, (9, 1), True, marks=pytest.mark.long),
        pytest.param("int8", 256, 32, (9, 1), False, marks=pytest.mark.long),
    ],
)
def test_quantised_pages(interpreter, dtype, head_dim, page_size, heads, write):
    lengths = [0, 1, page_size + 1, 133]
    shape = dict(heads=heads, head_dim=head_dim, page_size=page_size)
    problem = make_problem(lengths, query_lens=[0, 1, 1, 1], dtype=dtype, write=write, **shape)
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32)
    check(problem, max_query_len=1, window=100, sinks=sinks)


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 2.0**-14), ("float8_e4m3fn", 2.0**-17)])
def test_a_query_is_the_sum_of_two_parts(dtype, bound):
    split = jax.jit(split_queries, static_argnums=1)
    q = np.random.default_rng(0).standard_normal((64, 3, 128)) * np.array([[[1e-3], [1.0], [1e4]]])
    q = q.astype(jnp.bfloat16)
    q[0] = 0
    high, low, scale = split(jnp.asarray(q), jnp.dtype(dtype))
    assert high.dtype == low.dtype == dtype
    parts = np.asarray(high, np.float32) * STEP[dtype] + np.asarray(low, np.float32)
    wide = q.astype(np.float32)
    error = np.abs(parts * np.asarray(scale)[..., None] - wide)
    assert np.all(error <= bound * np.abs(wide).max(axis=-1, keepdims=True))
    q[1, 1, 5] = np.nan
    assert np.isnan(split(jnp.asarray(q), jnp.dtype(dtype))[2][1, 1])


def test_positions_beyond_int16(interpreter):
    # A sequence of which only what the window shows is mapped: the pages before it were freed.
    problem = make_problem([170], heads=(2, 1), page_size=128)
    table = jnp.asarray(np.pad(problem.page_table, ((0, 0), (300, 0))))
    problem = problem._replace(page_table=table, lengths=problem.lengths + 300 * 128)
    check(problem, max_query_len=1, window=150)


def test_neighbours_change_nothing(interpreter):
    problem = make_problem([70, 133], heads=(2, 1), page_size=64)
    expect_no_neighbours(problem, max_query_len=1)
