"""Decoding behind a shared prefix equals decoding without the promise."""

import jax.numpy as jnp
import pytest
from oracle import check
from problems import make_problem

from pallas_kernels.gpu import attention


@pytest.mark.parametrize(
    ("heads", "prefix", "pays"),
    [
        ((8, 1), 96, True),
        pytest.param((3, 1), 32, True, marks=pytest.mark.long),
        pytest.param((2, 2), 96, False, marks=pytest.mark.long),
    ],
)
def test_shared_prefix(interpreter, monkeypatch, heads, prefix, pays):
    if pays:
        monkeypatch.setattr(attention, "PREFIX_PAYS", 0.0)
    # An empty row stands first: it holds no page of the prefix. The second ends inside it, if that is long.
    lengths = [0, 81, 203, 97]
    problem = make_problem(lengths, query_lens=[1, 1, 1, 1], heads=heads, padding=1)
    shared = problem.page_table[2, : prefix // 16]
    table = problem.page_table
    for row in (1, 3):
        mapped = min(prefix, lengths[row]) // 16
        table = table.at[row, :mapped].set(shared[:mapped])
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32)
    problem = problem._replace(page_table=table)
    check(problem, max_query_len=1, shared_prefix=jnp.int32(prefix), sinks=sinks, soft_cap=20.0)
