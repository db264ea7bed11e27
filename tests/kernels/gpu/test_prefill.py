"""The rows kernel (prefill, chunks, mixed batches, large groups) in the interpreter against the reference."""

import jax.numpy as jnp
import pytest
from oracle import check, expect_no_neighbours
from problems import make_problem

# A whole prompt, a chunk of a longer one that ends with a page, a decode, a row without new tokens, an inert one (a
# token, length 0), a row of one token that is one more than a page of 16.
LENGTHS, QUERY_LENS = [133, 192, 77, 31, 0, 17], [133, 37, 1, 0, 1, 17]


@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads", "window", "soft_cap", "has_sinks", "write"),
    [
        (128, 16, (2, 1), 50, None, True, False),
        pytest.param(128, 64, (1, 1), None, None, False, True, marks=pytest.mark.long),
        pytest.param(64, 32, (5, 1), None, 3.0, True, False, marks=pytest.mark.long),
        pytest.param(256, 64, (3, 3), 130, None, False, False, marks=pytest.mark.long),
    ],
)
def test_mixed_batch(interpreter, head_dim, page_size, heads, window, soft_cap, has_sinks, write):
    shape = dict(heads=heads, head_dim=head_dim, page_size=page_size)
    problem = make_problem(LENGTHS, query_lens=QUERY_LENS, padding=3, write=write, **shape)
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32) if has_sinks else None
    check(problem, window=window, soft_cap=soft_cap, sinks=sinks)


@pytest.mark.parametrize(
    ("heads", "query_lens", "window"),
    [
        pytest.param((8, 1), [4, 1, 3, 0], None, marks=pytest.mark.long),
        ((40, 2), [1, 1, 1, 1], None),  # more heads than the decode kernel takes
        pytest.param((3, 1), [5, 1, 30, 2], 20, marks=pytest.mark.long),
    ],
)
def test_few_queries_pack_their_heads(interpreter, heads, query_lens, window):
    problem = make_problem([300, 1, 150, 20], query_lens=query_lens, padding=1, heads=heads, page_size=16)
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32)
    check(problem, max_query_len=max(query_lens), window=window, sinks=sinks)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "heads", "window"),
    [
        ("float8_e4m3fn", 128, 16, (1, 1), None),
        pytest.param("float8_e4m3fn", 64, 8, (4, 2), None, marks=pytest.mark.long),
        pytest.param("float8_e4m3fn", 256, 64, (1, 1), 50, marks=pytest.mark.long),
        pytest.param("int8", 128, 128, (1, 1), 50, marks=pytest.mark.long),
        pytest.param("int8", 64, 192, (3, 1), None, marks=pytest.mark.long),
        pytest.param("int8", 256, 32, (1, 1), None, marks=pytest.mark.long),
    ],
)
def test_quantised_pages(interpreter, dtype, head_dim, page_size, heads, window):
    shape = dict(heads=heads, head_dim=head_dim, page_size=page_size)
    problem = make_problem([133, 20], query_lens=[5, 20], dtype=dtype, write=head_dim < 256, **shape)
    check(problem, window=window)


@pytest.mark.long  # short in test_decode.py
def test_positions_beyond_int16(interpreter):
    # A sequence of which only what the window shows is mapped: the pages before it were freed.
    problem = make_problem([170], query_lens=[4], heads=(2, 1), page_size=128)
    table = jnp.pad(problem.page_table, ((0, 0), (300, 0)))
    problem = problem._replace(page_table=table, lengths=problem.lengths + 300 * 128)
    check(problem, max_query_len=4, window=150)


@pytest.mark.long  # short in test_decode.py
def test_neighbours_change_nothing(interpreter):
    problem = make_problem([20, 70], query_lens=[20, 40], heads=(1, 1), page_size=64)
    expect_no_neighbours(problem)
