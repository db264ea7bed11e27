"""What a layer sees of a step, against loops in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_table import PageTable
from table_model import CONFIG, TRANSITIONS, B

decode = jax.jit(AttentionMetadata.decode)
ragged = jax.jit(AttentionMetadata.ragged, static_argnums=(2, 3))
T = 16


@pytest.fixture(scope="module")
def table():
    """Rows of 5, 0, 3, 8, 0 and 9 tokens."""
    table, _ = TRANSITIONS.reserve(PageTable.create(CONFIG), np.array([5, 0, 3, 8, 0, 9], np.int32))
    return table


def test_decode(table):
    active = np.array([True, False, True, False, False, True])
    metadata = decode(table, active)
    assert metadata.lengths.tolist() == [5, 0, 3, 0, 0, 9]
    assert metadata.query_starts.tolist() == list(range(B + 1))
    assert metadata.positions.tolist() == [4, 0, 2, 0, 0, 8]
    assert metadata.last_tokens.tolist() == list(range(B))
    assert metadata.max_query_len == 1
    assert np.array_equal(metadata.page_table, table.pages)


@pytest.mark.parametrize("query_lens", [[2, 0, 3, 1, 0, 9], [0] * 6, [5, 0, 3, 8, 0, 0], [0, 0, 0, 0, 0, 9]])
@pytest.mark.parametrize("active", [None, [True, True, False, True, False, True]])
def test_ragged(table, query_lens, active):
    """Row by row: its new tokens are its last ones; refused rows keep their place in T, but are inert."""
    metadata = ragged(table, np.array(query_lens, np.int32), T, None, None if active is None else np.array(active))
    lengths, positions, starts = [], [], [0]
    for b, (length, n) in enumerate(zip(np.asarray(table.lengths).tolist(), query_lens, strict=True)):
        takes_part = n > 0 and (active is None or active[b])
        lengths.append(length if takes_part else 0)
        positions += range(length - n, length) if takes_part else [0] * n
        starts.append(starts[-1] + n)
    assert metadata.lengths.tolist() == lengths
    assert metadata.query_starts.tolist() == starts
    assert metadata.positions.tolist() == positions + [0] * (T - len(positions))
    last = [stop - 1 for start, stop in zip(starts, starts[1:], strict=False) if stop > start]
    assert [int(metadata.last_tokens[b]) for b in range(B) if query_lens[b]] == last
    assert all(0 <= int(i) < T for i in metadata.last_tokens)


def test_max_query_len_is_static_and_at_most_the_tokens(table):
    lens = np.array([1, 0, 1, 1, 0, 1], np.int32)
    assert [ragged(table, lens, T, bound).max_query_len for bound in (None, 1, 99)] == [T, 1, T]
    structure = jax.tree.structure(ragged(table, lens, T, 1))
    assert structure != jax.tree.structure(ragged(table, lens, T, 2))


def test_values_do_not_retrace(table):
    traces = []

    @jax.jit
    def step(table, query_lens):
        traces.append(query_lens)
        return AttentionMetadata.ragged(table, query_lens, T)

    for lens in ([1, 0, 1, 1, 0, 1], [0, 0, 3, 0, 0, 0]):
        step(table, np.array(lens, np.int32))
    assert len(traces) == 1


def test_decode_is_ragged_with_one_token_a_row(table):
    active = np.asarray(table.lengths) > 0
    one = decode(table, active)
    many = AttentionMetadata.ragged(table, jnp.ones(B, jnp.int32), B, max_query_len=1, active=jnp.asarray(active))
    assert jax.tree.structure(one) == jax.tree.structure(many)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True))
