"""The work list: every tile once, no multiprocessor idle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu.schedule import Queries, cut_queries, cut_rows

cut = jax.jit(cut_rows, static_argnums=2)


def shares_of(num_tiles, num_shares):
    """The (row, tile) pairs of each share, and the rows' segments checked on the way."""
    num_tiles = np.asarray(num_tiles, np.int32)
    first = np.arange(num_tiles.size, dtype=np.int32)  # any first tiles
    segments, share_starts, row_starts = map(np.asarray, cut(first, num_tiles, num_shares))
    shares = []
    for share in range(num_shares):
        pairs = []
        for row, tile, count, *_ in segments[share_starts[share] : share_starts[share + 1]]:
            assert count > 0
            pairs += [(row, tile + i - first[row]) for i in range(count)]
        shares.append(pairs)
    for row in range(num_tiles.size):
        assert set(segments[row_starts[row] : row_starts[row + 1], 0]) <= {row}
    return shares


@pytest.mark.parametrize("seed", range(5))
def test_every_tile_once_in_nearly_equal_shares(seed):
    rng = np.random.default_rng(seed)
    num_tiles = rng.integers(0, [1, 3, 50, 400, 2][seed] + 1, [1, 7, 7, 64, 64][seed])
    shares = shares_of(num_tiles, 33)
    expected = [(row, tile) for row, count in enumerate(num_tiles) for tile in range(count)]
    assert sum(shares, []) == expected
    assert max(map(len, shares)) <= -(-len(expected) // 33)


def test_one_long_row_keeps_every_block_busy():
    # Batch 1, 128k tokens, 8 KV heads on 132 multiprocessors of two blocks each.
    shares = shares_of([131072 // 64], 2 * 132 // 8)
    sizes = [len(share) for share in shares]
    assert 8 * sum(size > 0 for size in sizes) == 2 * 132  # no block without work
    assert sorted(sizes)[1] == max(sizes) and all(shares)  # all alike, but for the last one


def test_a_large_batch_costs_nothing_more():
    # 256 sequences of 4096 tokens: the longest share is the mean, and the cuts add one partial result a share at most.
    num_tiles = np.full(256, 64, np.int32)
    shares = shares_of(num_tiles, 33)
    assert max(map(len, shares)) == -(-256 * 64 // 33)
    *_, row_starts = cut(np.zeros_like(num_tiles), num_tiles, 33)
    assert 256 <= row_starts[-1] < 256 + 33


def test_one_query_of_many_heads_keeps_every_multiprocessor_busy():
    # 32 query heads on one KV head, 128k tokens: the keys are cut in 132 parts.
    one = jnp.ones(1, jnp.int32)
    queries = Queries(sequence=0 * one, start=0 * one, num=one, position=131071 * one, end=131072 * one)
    sizes = dict(rows_per_query=32, rows_per_block=128, tokens_per_tile=128, num_parts=132)
    items = cut_queries(queries, 1, **sizes, window=None)
    assert np.sum(items.num_tiles) == 1024
    assert np.max(items.num_tiles) == 8 and np.sum(items.num_tiles > 0) == 128


def test_a_long_row_among_short_ones_delays_nobody():
    shares = shares_of([2048] + [16] * 255, 33)
    total = 2048 + 16 * 255
    assert max(map(len, shares)) <= total // 33 + 1


def test_no_work():
    assert not any(shares_of([0, 0, 0], 4))
