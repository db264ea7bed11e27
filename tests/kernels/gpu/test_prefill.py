"""The rows kernel (prefill, chunks, mixed batches, large groups) in the interpreter against the reference."""

import jax.numpy as jnp
import pytest
from oracle import ROUNDED_KEYS, check
from problems import make_problem

# A whole prompt, a chunk of a longer one, a decode, a row without new tokens, an inert one (a token, length 0).
LENGTHS, QUERY_LENS = [133, 180, 77, 31, 0], [133, 37, 1, 0, 1]


@pytest.mark.parametrize(
    ("head_dim", "page_size", "heads", "window", "soft_cap", "has_sinks", "write"),
    [
        (128, 16, (2, 1), None, None, False, True),
        (128, 64, (1, 1), 50, None, True, False),
        pytest.param(64, 32, (1, 1), None, 3.0, True, False, marks=pytest.mark.long),
        pytest.param(256, 64, (1, 1), 130, None, False, False, marks=pytest.mark.long),
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
        ((8, 1), [4, 1, 3, 0], None),
        pytest.param((40, 2), [1, 1, 1, 1], None, marks=pytest.mark.long),
        pytest.param((3, 1), [5, 1, 30, 2], 20, marks=pytest.mark.long),
    ],
)
def test_few_queries_pack_their_heads(interpreter, heads, query_lens, window):
    problem = make_problem([300, 1, 150, 20], query_lens=query_lens, padding=1, heads=heads, page_size=16)
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32)
    check(problem, max_query_len=max(query_lens), window=window, sinks=sinks)


@pytest.mark.parametrize(("page_size", "window"), [(16, None), pytest.param(128, 50, marks=pytest.mark.long)])
def test_int8_pages(interpreter, page_size, window):
    problem = make_problem([133, 40], query_lens=[5, 40], heads=(1, 1), page_size=page_size, dtype="int8")
    check(problem, ROUNDED_KEYS, window=window)
