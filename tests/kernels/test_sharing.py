"""Groups of rows that share pages: found in the page table, checked on the host, and changing nothing but the speed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.cases import Case, attend, expected, make_inputs, random_forest, share

from pallas_kernels import Sharing, check_sharing, find_groups, sharing
from pallas_kernels.sharing import FEWEST_ROWS, RUN, runs_of

S = 16
PREFIX = 64  # tokens that everybody shares in the forests below
FORK = 128  # tokens that a group shares, the prefix included
# Rows 0 to 9 share the prefix, 0 to 3 and 4 to 8 also what follows, 10 and 11 share nothing, 12 is empty.
MEMBERS = ((0, 1, 2, 3), (4, 5, 6, 7, 8))
LENGTHS = (129, 300, 150, 131, 140, 200, 129, 260, 129, 65, 1, 40, 0)
find = jax.jit(find_groups, static_argnums=2)


@jax.jit
def find_small(table, lengths):
    """Groups of as few tokens as the tests that call it set: traced with that constant."""
    return find_groups(table, lengths, S)


def forest(case: Case):
    """The inputs of a case on pages that its rows share, and the groups."""
    return share(make_inputs(case), [[(tuple(range(10)), PREFIX)], [(rows, FORK) for rows in MEMBERS]])


QUERY_LENS = (1, 1, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0)
FOREST = Case("forest", LENGTHS, QUERY_LENS, head_dim=128, sinks=True)
WINDOW = Case("forest: window", LENGTHS, QUERY_LENS, window=70, soft_cap=4.0)
MIXED = Case("forest: int8, mixed", LENGTHS, (1, 20, *QUERY_LENS[2:]), (4, 2), 128, S, "int8", "bfloat16", soft_cap=4.0)
CASES = [FOREST, pytest.param(WINDOW, marks=pytest.mark.long), MIXED]  # windows of random forests below


def run(case, inputs, sharing):
    options = dict(sinks=inputs.sinks, sharing=sharing, return_lse=True, implementation="xla", **case.options)
    return attend(*inputs.arguments, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_rows_share_changes_nothing(case):
    inputs, groups = forest(case)
    check_sharing(groups, inputs.page_table, inputs.lengths, S)
    result = run(case, inputs, groups)
    out, lse = expected(case, inputs)
    np.testing.assert_allclose(np.asarray(result.out, np.float64), out, atol=case.tolerance, rtol=0)
    np.testing.assert_allclose(result.lse, lse, atol=case.tolerance, rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("options", [dict(head_dim=128, sinks=True), dict(window=40, dtype="int8")], ids=["", "window"])
def test_whatever_rows_share_changes_nothing(seed, options, monkeypatch):
    monkeypatch.setattr(sharing, "FEWEST_TOKENS", 16)
    case, levels = random_forest(seed, **options)
    inputs, groups = share(make_inputs(case), levels)
    found = find_small(inputs.page_table, inputs.lengths)
    assert seed or np.any(np.asarray(found.leader) >= 0)
    out, lse = expected(case, inputs)
    for promise in (groups, found):
        check_sharing(promise, inputs.page_table, inputs.lengths, S)
        result = run(case, inputs, promise)
        np.testing.assert_allclose(np.asarray(result.out, np.float64), out, atol=case.tolerance, rtol=0)
        np.testing.assert_allclose(result.lse, lse, atol=case.tolerance, rtol=1e-6)


def test_the_shared_pages_are_read_through_the_leader_alone():
    """So the promise is used: a member whose own table names other pages still gets what the leader's hold."""
    inputs, groups = forest(FOREST)
    table = np.array(inputs.page_table)
    table[[1, 2, 3], 0] = 0  # row 0 leads
    lost = dataclasses.replace(inputs, page_table=jnp.asarray(table))
    wanted = run(FOREST, inputs, groups).out
    np.testing.assert_array_equal(run(FOREST, lost, groups).out, wanted)
    assert not np.array_equal(run(FOREST, lost, None).out, wanted)


def test_groups_are_read_off_the_page_table(monkeypatch):
    monkeypatch.setattr(sharing, "FEWEST_TOKENS", 16)
    inputs, wanted = forest(FOREST)
    found = find_small(inputs.page_table, inputs.lengths)
    # Row 9 has one page behind the prefix, which holds its last token, so it has a group on the first level only.
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    for level in range(2):
        pairs = [np.asarray(x.leader)[level] for x in (found, wanted)]
        same = [(x[:, None] == x[None, :]) & (x >= 0)[:, None] for x in pairs]
        np.testing.assert_array_equal(*same)
    check_sharing(found, inputs.page_table, inputs.lengths, S)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_found_in_random_tables_holds(seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 4, (24, 6)).astype(np.int32)
    table[:, :3] = table[rng.integers(0, 3, 24), :3]
    table[:, :1] = rng.integers(1, 3)
    lengths = rng.integers(0, 6 * 256 + 1, 24).astype(np.int32)
    found = find(jnp.asarray(table), jnp.asarray(lengths), 256)
    check_sharing(found, table, lengths, 256)


def test_rows_without_common_pages_have_no_group():
    table = np.arange(1, 33, dtype=np.int32).reshape(8, 4)
    found = find(jnp.asarray(table), jnp.asarray(np.full(8, 64, np.int32)), S)
    np.testing.assert_array_equal(found.leader, -1)
    np.testing.assert_array_equal(found.tokens, 0)


def test_no_levels_are_no_groups():
    inputs = make_inputs(FOREST)
    nothing = jnp.zeros((0, len(LENGTHS)), jnp.int32)
    results = [run(FOREST, inputs, groups).out for groups in (None, Sharing(nothing, nothing))]
    np.testing.assert_array_equal(*results)


def test_a_group_of_too_few_rows_is_left_alone():
    lengths = jnp.asarray(np.full(8, 1024, np.int32))
    for count, shared in ((FEWEST_ROWS, 640), (FEWEST_ROWS - 1, 0)):
        table = np.arange(1, 513, dtype=np.int32).reshape(8, 64)
        table[:count, :40] = table[0, :40]
        tokens = np.asarray(find(jnp.asarray(table), lengths, S).tokens)
        assert (tokens[0, :count] == shared).all() and (tokens[:, count:] == 0).all()


def test_runs_are_the_groups_of_a_step_side_by_side(monkeypatch):
    _, groups = forest(FOREST)
    monkeypatch.setattr(sharing, "FEWEST_ROWS", 3)
    takes_part = np.array(LENGTHS) > 0
    takes_part[[0, 6, 7, 8]] = False  # on the second level, 4 and 5 are too few then
    runs = jax.jit(runs_of, static_argnums=3)(groups, jnp.array(LENGTHS, jnp.int32), jnp.asarray(takes_part), S)
    runs = jax.device_get(runs)
    found = []
    for level, row in np.argwhere(runs.leads).tolist():
        start, size = int(runs.place[level, row]), int(runs.size[level, row])
        assert start % RUN == 0 and runs.size[level].tolist().count(size) == size
        found.append((runs.row[level, start : start + size].tolist(), int(runs.begin[level, row])))
        assert (runs.row[level, start + size : start + -(-size // RUN) * RUN] == -1).all()
    assert found == [([1, 2, 3, 4, 5, 9], 0), ([1, 2, 3], PREFIX)]
    assert runs.rest.tolist() == [0, FORK, FORK, FORK, PREFIX, PREFIX, 0, 0, 0, PREFIX, 0, 0, 0]
    assert (runs.row >= 0).sum() == 9 == (runs.place < runs.row.shape[1]).sum()


@pytest.mark.parametrize(
    ("leader", "tokens", "message"),
    [
        ([0, 0, -1], [32, 32, 0], None),
        ([0, 0, 0], [32, 32, 32], "level 0, row 2: its first 2 pages are not those of its leader 0"),
        ([0, 0, -1], [24, 24, 0], "level 0, row 0: 24 shared tokens are not a multiple of the page size 16"),
        ([0, 0, -1], [48, 48, 0], "level 0, row 0: it shares 48 tokens and has 40"),
        ([0, 0, -1], [32, 16, 0], "level 0, row 1: its leader 0 is not the leader of a group that shares 16 tokens"),
    ],
)
def test_a_broken_promise_is_named(leader, tokens, message):
    table, lengths = np.array([[1, 2, 3], [1, 2, 4], [1, 5, 6]], np.int32), np.array([40, 48, 48], np.int32)
    groups = Sharing(jnp.array([leader], jnp.int32), jnp.array([tokens], jnp.int32))
    if message is None:
        check_sharing(groups, table, lengths, S)
    else:
        with pytest.raises(ValueError, match=message):
            check_sharing(groups, table, lengths, S)
