"""Decoding where groups of sequences share pages equals decoding without the promise."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import check
from problems import make_problem

from pallas_kernels import Sharing
from pallas_kernels.gpu import attention
from pallas_kernels.sharing import runs_of

TOKEN_BYTES = 2 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("batch", "shared", "pays"),
    [
        (64, 4096, True),
        (64, 256, False),  # 63 MiB: less than the kernels cost
        (4, 4096, False),
        (3, 65536, False),  # nobody to share with
        (64, 0, False),
    ],
)
def test_groups_are_read_once_where_that_pays(batch, shared, pays):
    lengths = jnp.full(batch, shared + 100, jnp.int32)
    runs = runs_of(Sharing.of_all(lengths, shared), lengths, lengths > 0, 64)
    assert (attention.where_it_pays(runs, TOKEN_BYTES).rest == (shared if pays else 0)).all()


# Two groups on the first level, one of which has a group on the second; a pair, which is too few; an empty row.
FOREST = [[((1, 2, 3, 4, 5, 8), 96), ((6, 9, 11, 12), 48), ((7, 10), 16)], [((1, 3, 5, 8), 160)]]
LENGTHS = (0, 203, 100, 170, 97, 161, 60, 20, 200, 49, 18, 64, 49)


@pytest.mark.parametrize(
    ("heads", "levels", "pays", "several"),
    [
        ((8, 1), FOREST, True, 1),
        pytest.param((3, 1), FOREST[:1], True, 1, marks=pytest.mark.long),
        pytest.param((2, 2), FOREST, False, 1, marks=pytest.mark.long),
        pytest.param((8, 1), FOREST, True, 7, marks=pytest.mark.long),  # queries of row 2
    ],
)
def test_groups_that_share_change_nothing(interpreter, monkeypatch, heads, levels, pays, several):
    if pays:
        monkeypatch.setattr(attention, "SHARING_PAYS", 0.0)
    # The table is long enough for what is shared to be cut in two parts.
    query_lens = [several if row == 2 else 1 for row in range(len(LENGTHS))]
    problem = make_problem(LENGTHS, query_lens=query_lens, heads=heads, padding=1, max_pages=64)
    table = np.array(problem.page_table)
    leader = np.full((len(levels), len(LENGTHS)), -1, np.int32)
    tokens = np.zeros_like(leader)
    for level, groups in enumerate(levels):
        for rows, count in groups:
            leader[level, list(rows)], tokens[level, list(rows)] = rows[0], count
            table[list(rows), : count // 16] = table[rows[0], : count // 16]
    problem = problem._replace(page_table=jnp.asarray(table))
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32)
    sharing = Sharing(jnp.asarray(leader), jnp.asarray(tokens))
    check(problem, max_query_len=several, sharing=sharing, sinks=sinks, soft_cap=20.0)
