"""The pool: copies of copy-on-write, in place and in every layer."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.invariants import check
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_table import PageTable, Reservation
from paged_jax.cache.pool import PagePool
from pallas_kernels import read_pages, write_pages

CONFIG = CacheConfig(2, 2, 16, 64, max_sequences=4, max_pages_per_sequence=5, page_size=8)
copy = partial(jax.jit, donate_argnums=0)(PagePool.copy)


def numbered(config: CacheConfig) -> PagePool:
    """Page p of layer l holds 100 l + p."""
    pool = PagePool.create(config)
    for i, pages in enumerate(pool.layers):
        values = 100 * i + jnp.arange(pages.num_pages).reshape(-1, *[1] * (pages.data.ndim - 1))
        data = jnp.broadcast_to(values.astype(pages.dtype), pages.data.shape)
        pool = pool.replace_layer(i, dataclasses.replace(pages, data=data))
    return pool


def pairs(*copies: tuple[int, int]) -> Reservation:
    padded = np.array([*copies, *[(0, 0)] * (4 - len(copies))], np.int32)
    return Reservation(jnp.ones(4, bool), jnp.array(padded[:, 0]), jnp.array(padded[:, 1]))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copies_reach_every_layer_and_sources_are_read_first(dtype):
    config = dataclasses.replace(CONFIG, num_layers=2, num_pages=20, dtype=dtype)
    pool = copy(numbered(config), pairs((3, 5), (5, 7), (3, 8)))
    expected = np.arange(20)
    expected[[5, 7, 8]] = [3, 5, 3]
    for i, pages in enumerate(pool.layers):
        data = np.asarray(pages.data)[:, 0, 0, 0]
        assert data.astype(int).tolist() == (100 * i + expected).tolist()


def test_without_copies_nothing_changes():
    pool = numbered(CONFIG)
    expected = [np.asarray(pages.data) for pages in pool.layers]
    pool = copy(pool, pairs())
    assert all(np.array_equal(pages.data, data) for pages, data in zip(pool.layers, expected, strict=True))


def test_copies_are_made_in_place():
    config = dataclasses.replace(CONFIG, num_pages=4096, dtype="float32")
    pool = jax.eval_shape(lambda: PagePool.create(config))
    compiled: Any = copy.lower(pool, jax.eval_shape(lambda: pairs((1, 2)))).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == config.pool_bytes
    assert memory.temp_size_in_bytes < 0.02 * config.pool_bytes


def test_a_layer_is_replaced_alone():
    pool = PagePool.create(CONFIG)
    layer = numbered(CONFIG).layers[1]
    replaced = pool.replace_layer(1, layer)
    assert replaced.layers[1] is layer and replaced.layers[0] is pool.layers[0]
    assert pool.num_pages == 64 and pool.num_bytes == CONFIG.pool_bytes


def test_a_tpu_pads_heads_and_the_config_counts_it():
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    config = dataclasses.replace(CONFIG, head_dim=80)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        pool = jax.eval_shape(lambda: PagePool.create(config))
        assert pool.layers[0].head_dim == 80 and pool.layers[0].data.shape[-1] == 128
        assert pool.num_bytes == config.pool_bytes
    assert pool.num_bytes > config.pool_bytes == PagePool.create(config).num_bytes


def test_pages_start_empty():
    keys, values = read_pages(PagePool.create(CONFIG).layers[0], jnp.arange(1, 4, dtype=jnp.int32))
    assert keys.shape == (3, 8, 2, 16) and not np.any(np.asarray(keys)) and not np.any(np.asarray(values))


def test_a_history_of_forks_and_rollbacks_reads_back():
    """Real pages, written by write_pages: every row holds its own tokens, each a number that no other token has."""
    config = CacheConfig(2, 1, 8, num_pages=14, max_sequences=4, max_pages_per_sequence=5, page_size=4, dtype="float32")
    num_tokens = 12

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(table, pool, query_lens, stamps):
        table, reservation = table.reserve(query_lens)
        pool = pool.copy(reservation)
        seen = AttentionMetadata.ragged(table, query_lens, num_tokens, active=reservation.granted)
        assert isinstance(seen.page_table, jax.Array)  # there is one group of layers
        k = jnp.broadcast_to(stamps[:, None, None], (num_tokens, 1, 8))
        for i, pages in enumerate(pool.layers):
            pages = write_pages(pages, k + i, -k, seen.page_table, seen.lengths, seen.query_starts)
            pool = pool.replace_layer(i, pages)
        return table, pool, reservation

    fork, permute, truncate = jax.jit(PageTable.fork), jax.jit(PageTable.permute), jax.jit(PageTable.truncate)
    random = np.random.default_rng(0)
    table, pool = PageTable.create(config), PagePool.create(config)
    rows: list[list[float]] = [[], [], [], []]
    next_stamp, num_copies, num_refused = 1.0, 0, 0
    for i in range(120):
        query_lens = random.integers(0, 4, 4).astype(np.int32)
        stamps = next_stamp + np.arange(num_tokens, dtype=np.float32)
        next_stamp += num_tokens
        table, pool, reservation = step(table, pool, query_lens, stamps)
        start = np.cumsum([0, *query_lens])
        for b, granted in enumerate(np.asarray(reservation.granted)):
            rows[b] += stamps[start[b] : start[b + 1]].tolist() if granted else []
        num_copies += np.count_nonzero(reservation.copy_target)
        num_refused += np.count_nonzero(~np.asarray(reservation.granted))
        if i % 3 == 1:
            parents = random.integers(0, 4, 4).astype(np.int32)
            table, rows = permute(table, parents), [list(rows[p]) for p in parents]
        if i % 3 == 2:
            lengths = np.array([max(len(row) - random.integers(0, 12), 0) for row in rows], np.int32)
            table, rows = truncate(table, lengths), [row[:n] for row, n in zip(rows, lengths, strict=True)]
            empty = [b for b in range(4) if not rows[b]][:1] or [-1]
            table, ok = fork(table, np.array([3], np.int32), np.array(empty, np.int32))
            if ok[0]:
                rows[empty[0]] = list(rows[3])
        check(table)
        for layer, pages in enumerate(pool.layers):
            keys, values = (np.asarray(x) for x in read_pages(pages, table.pages.reshape(-1)))
            for b, row in enumerate(rows):
                expected = np.array(row)
                assert np.array_equal(keys.reshape(4, 20, 8)[b, : len(row), 0], expected + layer)
                assert np.array_equal(values.reshape(4, 20, 8)[b, : len(row), 7], -expected)
    assert num_copies > 50 and num_refused > 5  # the history has both
