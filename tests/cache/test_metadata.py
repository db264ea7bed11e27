"""What a layer sees of a step, against loops in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import AttentionMetadata, CacheConfig, PageTables

B, T = 6, 16
CONFIG = CacheConfig(2, 1, 8, 24, B, 5, page_size=4, windows=(None, 6), window_pages=20)
decode = jax.jit(AttentionMetadata.decode)
ragged = jax.jit(AttentionMetadata.ragged, static_argnums=2, static_argnames="max_query_len")


@pytest.fixture(scope="module")
def tables():
    """Rows of 5, 0, 3, 8, 0 and 9 tokens."""
    tables, _ = jax.jit(PageTables.reserve)(PageTables.create(CONFIG), np.array([5, 0, 3, 8, 0, 9], np.int32))
    return tables


def test_decode(tables):
    active = np.array([True, False, True, False, False, True])
    metadata = decode(tables, active)
    assert metadata.lengths.tolist() == [5, 0, 3, 0, 0, 9]
    assert metadata.query_starts.tolist() == list(range(B + 1))
    assert metadata.positions.tolist() == [4, 0, 2, 0, 0, 8]
    assert metadata.logits_at.tolist() == list(range(B))
    assert metadata.max_query_len == 1
    assert all(np.array_equal(x, y.pages) for x, y in zip(metadata.page_tables, tables.groups, strict=True))


@pytest.mark.parametrize("query_lens", [[2, 0, 3, 1, 0, 9], [0] * 6, [5, 0, 3, 8, 0, 0], [0, 0, 0, 0, 0, 9]])
@pytest.mark.parametrize("active", [None, [True, True, False, True, False, True]])
def test_ragged(tables, query_lens, active):
    """Row by row: its new tokens are its last ones; refused rows keep their place in T, but are inert."""
    chosen = {} if active is None else {"active": np.array(active)}
    metadata = ragged(tables, np.array(query_lens, np.int32), T, **chosen)
    lengths, positions, starts = [], [], [0]
    for b, (length, n) in enumerate(zip(np.asarray(tables.lengths).tolist(), query_lens, strict=True)):
        takes_part = n > 0 and (active is None or active[b])
        lengths.append(length if takes_part else 0)
        positions += range(length - n, length) if takes_part else [0] * n
        starts.append(starts[-1] + n)
    assert metadata.lengths.tolist() == lengths
    assert metadata.query_starts.tolist() == starts
    assert metadata.positions.tolist() == positions + [0] * (T - len(positions))
    last = [stop - 1 for start, stop in zip(starts, starts[1:], strict=False) if stop > start]
    assert [int(metadata.logits_at[b]) for b in range(B) if query_lens[b]] == last
    assert all(0 <= int(i) < T for i in metadata.logits_at)


def test_rows_that_are_chosen_are_packed_without_the_others(tables):
    """Sequence r is row `rows[r]`; one out of range computes nothing, in no page."""
    rows, query_lens = np.array([5, 2, B, 3], np.int32), np.array([3, 2, 0, 4], np.int32)
    metadata = ragged(tables, query_lens, T, rows=rows)
    assert metadata.lengths.tolist() == [9, 3, 0, 8]
    assert metadata.query_starts.tolist() == [0, 3, 5, 5, 9]
    assert metadata.positions.tolist() == [6, 7, 8, 1, 2, 4, 5, 6, 7] + [0] * (T - 9)
    assert metadata.logits_at.tolist() == [2, 4, 4, 8], "one place for each chosen row"
    for seen, table in zip(metadata.page_tables, tables.groups, strict=True):
        assert np.array_equal(seen, [*np.asarray(table.pages)[[5, 2]], [0] * 5, np.asarray(table.pages)[3]])
    every = ragged(tables, np.array([0, 0, 2, 4, 0, 3], np.int32), T)
    chosen = ragged(tables, np.array([0, 0, 2, 4, 0, 3], np.int32), T, rows=np.arange(B, dtype=np.int32))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(every), jax.tree.leaves(chosen), strict=True))


def test_max_query_len_is_static_and_at_most_the_tokens(tables):
    lens = np.array([1, 0, 1, 1, 0, 1], np.int32)
    assert [ragged(tables, lens, T, max_query_len=bound).max_query_len for bound in (None, 1, 99)] == [T, 1, T]
    structure = jax.tree.structure(ragged(tables, lens, T, max_query_len=1))
    assert structure != jax.tree.structure(ragged(tables, lens, T, max_query_len=2))


def test_values_do_not_retrace(tables):
    traces = []

    @jax.jit
    def step(tables, query_lens):
        traces.append(query_lens)
        return AttentionMetadata.ragged(tables, query_lens, T)

    for lens in ([1, 0, 1, 1, 0, 1], [0, 0, 3, 0, 0, 0]):
        step(tables, np.array(lens, np.int32))
    assert len(traces) == 1


def test_decode_is_ragged_with_one_token_a_row(tables):
    active = np.asarray(tables.lengths) > 0
    one = decode(tables, active)
    many = AttentionMetadata.ragged(tables, jnp.ones(B, jnp.int32), B, max_query_len=1, active=jnp.asarray(active))
    assert jax.tree.structure(one) == jax.tree.structure(many)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True))
