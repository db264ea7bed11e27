"""Decoding behind a shared prefix equals decoding without the promise."""

import jax.numpy as jnp
import pytest
from oracle import check
from problems import make_problem

from pallas_kernels import Sharing
from pallas_kernels.gpu import attention


@pytest.mark.parametrize(
    ("batch", "prefix", "shared"),
    [
        (64, 4096, 4096),
        (64, 4100, 4096),  # whole pages
        (64, 9000, 4160),  # what the shortest row sees
        (1, 4096, 0),  # nobody to share with
        (2, 4096, 0),  # 16 MiB: less than the kernels cost
        (64, 64, 0),
        (64, 0, 0),
    ],
)
def test_a_prefix_is_shared_where_that_pays(batch, prefix, shared):
    position = jnp.full(batch + 1, 4223, jnp.int32).at[0].set(-1).at[1].set(4170)
    token_bytes = 2 * 8 * 128 * 2
    assert attention.worth_sharing(jnp.int32(prefix), position, 64, 8192, token_bytes) == shared


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
    # An empty row stands first: it holds no page of the prefix. The last two end soon after it.
    lengths = [0, 203, 100, 97]
    # The table is long enough for the prefix to be cut in two parts.
    problem = make_problem(lengths, query_lens=[1, 1, 1, 1], heads=heads, padding=1, max_pages=64)
    shared = problem.page_table[1, : prefix // 16]
    table = problem.page_table
    for row in (2, 3):
        mapped = min(prefix, lengths[row]) // 16
        table = table.at[row, :mapped].set(shared[:mapped])
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32)
    problem = problem._replace(page_table=table)
    check(problem, max_query_len=1, sharing=Sharing.of_all(problem.lengths, prefix), sinks=sinks, soft_cap=20.0)
