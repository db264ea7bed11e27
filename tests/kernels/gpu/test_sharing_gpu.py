"""Decoding where groups of sequences share pages equals decoding without the promise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.cases import Case, make_inputs, random_forest, share
from oracle import check

from pallas_kernels import Sharing, sharing
from pallas_kernels.gpu import attention
from pallas_kernels.sharing import runs_of

TOKEN_BYTES = 2 * 8 * 128 * 2


@jax.jit
def rest_of_rows(lengths, shared):
    """Where each row begins to read by itself."""
    runs = runs_of(Sharing.of_all(lengths, shared), lengths, lengths > 0, 64)
    return attention.where_it_pays(runs, TOKEN_BYTES).rest


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
    np.testing.assert_array_equal(rest_of_rows(lengths, jnp.int32(shared)), shared if pays else 0)


# Two groups on the first level, one of which has a group on the second; a pair, which is too few; an empty row.
FOREST = [[((1, 2, 3, 4, 5, 8), 96), ((6, 9, 11, 12), 48), ((7, 10), 16)], [((1, 3, 5, 8), 144)]]
LENGTHS = (0, 160, 100, 157, 97, 150, 60, 20, 159, 49, 18, 64, 49, 5)
OPTIONS: dict[str, Any] = dict(head_dim=128, dtype="bfloat16", q_dtype="bfloat16", sinks=True, soft_cap=20.0)


def check_forest(case, levels):
    """The table has enough columns for what is shared to be cut in two parts."""
    inputs, groups = share(make_inputs(case), levels)
    table = np.pad(inputs.page_table, ((0, 0), (0, 52)), constant_values=-1)
    arguments = dataclasses.replace(inputs, page_table=jnp.asarray(table)).arguments
    check(arguments, sharing=groups, sinks=inputs.sinks, **case.options)


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
        monkeypatch.setattr(sharing, "FEWEST_GPU_BYTES", 0.0)
    query_lens = (0, 1, several, *[1] * 11)
    check_forest(Case("forest", LENGTHS, query_lens, heads, padding=1, **OPTIONS), levels)


@pytest.mark.long  # the interpreter takes seconds for each
@pytest.mark.parametrize("seed", range(4))
def test_whatever_rows_share_changes_nothing(interpreter, monkeypatch, seed):
    monkeypatch.setattr(sharing, "FEWEST_GPU_BYTES", 0.0)
    check_forest(*random_forest(seed, heads=(8, 1), **OPTIONS))
