"""The pool: where each layer's pages lie, and the copies of copy-on-write, in place and in every layer."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from paged_jax import AttentionMetadata, CacheConfig, LayerPlace, PagePool, PageTables, paged_attention
from paged_jax.cache.invariants import check
from paged_jax.cache.page_table import Reservation
from paged_jax.cache.page_tables import Reservations
from paged_jax.cache.pool import layer_pages
from pallas_kernels import read_pages, write_pages

CONFIG = CacheConfig(3, 2, 16, 20, max_sequences=4, max_pages_per_sequence=5, page_size=8)
HYBRID = dataclasses.replace(CONFIG, windows=(9, None, 9), window_pages=12)  # layer 1 sees everything
copy = partial(jax.jit, donate_argnums=0)(PagePool.copy)


def numbered(config: CacheConfig) -> PagePool:
    """Page p of layer l holds 50 l + p."""
    pool = PagePool.create(config)
    for layer in range(config.num_layers):
        array, first_page = pool.locate(pool.place(layer))
        pages, num_pages = pool.arrays[array], pool.groups[pool.place(layer).group].num_pages
        values = 50 * layer + jnp.arange(num_pages).reshape(-1, *[1] * (pages.data.ndim - 1))
        values = jnp.broadcast_to(values.astype(pages.dtype), (num_pages, *pages.data.shape[1:]))
        pool = pool.replace(
            array, dataclasses.replace(pages, data=pages.data.at[first_page : first_page + num_pages].set(values))
        )
    return pool


def numbers(pool: PagePool, layer: int) -> list[int]:
    """The number in each page of a layer."""
    place = pool.place(layer)
    array, first_page = pool.locate(place)
    data = np.asarray(pool.arrays[array].data)[first_page : first_page + pool.groups[place.group].num_pages]
    return data[:, 0, 0, 0].astype(int).tolist()


def pairs(*groups: list[tuple[int, int]]) -> Reservations:
    """The copies of each group."""
    reservations = []
    for copies in groups:
        padded = np.array([*copies, *[(0, 0)] * (4 - len(copies))], np.int32)
        reservations.append(Reservation(jnp.ones(4, bool), jnp.array(padded[:, 0]), jnp.array(padded[:, 1])))
    return Reservations(jnp.ones(4, bool), tuple(reservations))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("array_per_layer", [False, True])
def test_copies_reach_every_layer_of_their_group_and_sources_are_read_first(dtype, array_per_layer):
    config = dataclasses.replace(HYBRID, dtype=dtype, array_per_layer=array_per_layer)
    pool = copy(numbered(config), pairs([(3, 5), (5, 7), (3, 8)], [(1, 11)]))
    everything, local = np.arange(20), np.arange(12)
    everything[[5, 7, 8]], local[11] = [3, 5, 3], 1
    for layer, expected in enumerate((local, everything, local)):
        assert numbers(pool, layer) == (50 * layer + expected).tolist()


def test_without_copies_nothing_changes():
    pool = numbered(CONFIG)
    expected = [np.asarray(pages.data) for pages in pool.arrays]
    pool = copy(pool, pairs([]))
    assert all(np.array_equal(pages.data, data) for pages, data in zip(pool.arrays, expected, strict=True))


def test_copies_are_made_in_place():
    config = dataclasses.replace(CONFIG, num_pages=4096, dtype="float32")
    pool = jax.eval_shape(lambda: PagePool.create(config))
    compiled: Any = copy.lower(pool, jax.eval_shape(lambda: pairs([(1, 2)]))).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == config.pool_bytes
    assert memory.temp_size_in_bytes < 0.02 * config.pool_bytes


def test_the_layers_of_a_group_lie_in_one_array():
    pool = PagePool.create(HYBRID)
    assert [group.layers for group in pool.groups] == [(1,), (0, 2)]
    assert [pages.num_pages for pages in pool.arrays] == [20, 2 * 12]
    assert pool.num_layers == 3 and pool.num_bytes == HYBRID.pool_bytes
    places = [pool.place(layer) for layer in range(3)]
    assert places == [LayerPlace(1, 0), LayerPlace(0, 0), LayerPlace(1, 1)]
    assert [pool.locate(place) for place in places] == [(1, 0), (0, 0), (1, 12)]


def test_with_an_array_for_each_layer_page_ids_stay_as_they_are():
    pool = PagePool.create(dataclasses.replace(HYBRID, array_per_layer=True))
    assert [pages.num_pages for pages in pool.arrays] == [12, 20, 12]
    assert [pool.locate(pool.place(layer)) for layer in range(3)] == [(0, 0), (1, 0), (2, 0)]
    assert pool.num_bytes == HYBRID.pool_bytes


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="there is no layer 3: this pool has pages for the layers 0 to 2"):
        PagePool.create(CONFIG).place(3)


def test_page_ids_are_offset_but_the_null_page_stays_itself():
    page_ids = jnp.array([[3, 0, 7], [1, 0, 0]], jnp.int32)
    assert layer_pages(page_ids, 0) is page_ids
    for first_page in (20, jnp.int32(20)):
        assert layer_pages(page_ids, first_page).tolist() == [[23, 0, 27], [21, 0, 0]]


def test_layers_run_in_a_loop_with_a_traced_place():
    """Writing a layer at a traced index writes what writing it by its number does."""
    pool = PagePool.create(dataclasses.replace(HYBRID, dtype="float32"))
    q = jax.random.normal(jax.random.key(0), (3, 2, 16))
    tables, _ = PageTables.create(HYBRID).reserve(jnp.array([2, 0, 1, 0], jnp.int32))
    metadata = AttentionMetadata.ragged(tables, jnp.array([2, 0, 1, 0], jnp.int32), 3)

    def attend(pool, layer, index):
        scale = 1.0 + index.astype(jnp.float32)
        return paged_attention(scale * q, q, scale * q, pool, metadata, layer, window=9)

    @jax.jit
    def by_number(pool):
        first, pool = attend(pool, 0, jnp.int32(0))
        second, pool = attend(pool, 2, jnp.int32(1))
        return pool, jnp.stack([first, second])

    @jax.jit
    def in_a_loop(pool):
        def body(pool, index):
            out, pool = attend(pool, LayerPlace(1, index), index)
            return pool, out

        return jax.lax.scan(body, pool, jnp.arange(2, dtype=jnp.int32))

    expected, outs = by_number(pool)
    looped, out = in_a_loop(pool)
    np.testing.assert_allclose(out, outs, rtol=1e-6, atol=1e-6)  # the sums may be ordered otherwise
    for ours, theirs in zip(looped.arrays, expected.arrays, strict=True):
        np.testing.assert_array_equal(ours.data, theirs.data)
    assert numbers(looped, 1) == [0] * 20 and np.any(np.asarray(looped.arrays[1].data[:12]))
    assert np.any(np.asarray(looped.arrays[1].data[12:]) != np.asarray(looped.arrays[1].data[:12]))


def test_a_tpu_pads_heads_and_the_config_counts_it():
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    config = dataclasses.replace(CONFIG, head_dim=80, page_size=64)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        pool = jax.eval_shape(lambda: PagePool.create(config))
        assert pool.arrays[0].head_dim == 80 and pool.arrays[0].data.shape[-1] == 128
        assert pool.num_bytes == config.pool_bytes
    assert pool.num_bytes > config.pool_bytes == PagePool.create(config).num_bytes


def test_a_tpu_warns_of_small_pages():
    """float8 heads of 64 in pages of 16 are half tiles, which the kernels refuse in the first step."""
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    config = dataclasses.replace(CONFIG, num_kv_heads=8, head_dim=64, page_size=16, dtype="float8_e4m3fn")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        with pytest.warns(UserWarning, match="slow on a TPU v6 lite: .* XLA attends.* Take page_size=32."):
            jax.eval_shape(lambda: PagePool.create(config))
        jax.eval_shape(lambda: PagePool.create(dataclasses.replace(config, page_size=32)))


def test_pages_start_empty():
    keys, values = read_pages(PagePool.create(CONFIG).arrays[0], jnp.arange(1, 4, dtype=jnp.int32))
    assert keys.shape == (3, 8, 2, 16) and not np.any(np.asarray(keys)) and not np.any(np.asarray(values))


def test_a_history_of_forks_and_rollbacks_reads_back():
    """Real pages, written by write_pages: every row holds its own tokens, each a number that no other token has."""
    config = CacheConfig(2, 1, 8, num_pages=14, max_sequences=4, max_pages_per_sequence=5, page_size=4, dtype="float32")
    num_tokens = 12

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(tables, pool, query_lens, stamps):
        tables, made = tables.reserve(query_lens)
        pool = pool.copy(made)
        seen = AttentionMetadata.ragged(tables, query_lens, num_tokens, active=made.granted)
        k = jnp.broadcast_to(stamps[:, None, None], (num_tokens, 1, 8))
        for layer in range(2):
            array, first_page = pool.locate(pool.place(layer))
            page_table = layer_pages(seen.page_tables[0], first_page)
            pages = write_pages(pool.arrays[array], k + layer, -k, page_table, seen.lengths, seen.query_starts)
            pool = pool.replace(array, pages)
        return tables, pool, made

    fork, permute, truncate = jax.jit(PageTables.fork), jax.jit(PageTables.permute), jax.jit(PageTables.truncate)
    random = np.random.default_rng(0)
    tables, pool = PageTables.create(config), PagePool.create(config)
    rows: list[list[float]] = [[], [], [], []]
    next_stamp, num_copies, num_refused = 1.0, 0, 0
    for i in range(120):
        query_lens = random.integers(0, 4, 4).astype(np.int32)
        stamps = next_stamp + np.arange(num_tokens, dtype=np.float32)
        next_stamp += num_tokens
        tables, pool, made = step(tables, pool, query_lens, stamps)
        start = np.cumsum([0, *query_lens])
        for b, granted in enumerate(np.asarray(made.granted)):
            rows[b] += stamps[start[b] : start[b + 1]].tolist() if granted else []
        num_copies += np.count_nonzero(made.groups[0].copy_target)
        num_refused += np.count_nonzero(~np.asarray(made.granted))
        if i % 3 == 1:
            parents = random.integers(0, 4, 4).astype(np.int32)
            tables, rows = permute(tables, parents), [list(rows[p]) for p in parents]
        if i % 3 == 2:
            lengths = np.array([max(len(row) - random.integers(0, 12), 0) for row in rows], np.int32)
            tables, rows = truncate(tables, lengths), [row[:n] for row, n in zip(rows, lengths, strict=True)]
            empty = [b for b in range(4) if not rows[b]][:1] or [-1]
            tables, ok = fork(tables, np.array([3], np.int32), np.array(empty, np.int32))
            if ok[0]:
                rows[empty[0]] = list(rows[3])
        (table,) = tables.groups
        check(table)
        for layer in range(2):
            array, first_page = pool.locate(pool.place(layer))
            page_ids = layer_pages(table.pages.reshape(-1), first_page)
            keys, values = (np.asarray(x) for x in read_pages(pool.arrays[array], page_ids))
            for b, row in enumerate(rows):
                expected = np.array(row)
                assert np.array_equal(keys.reshape(4, 20, 8)[b, : len(row), 0], expected + layer)
                assert np.array_equal(values.reshape(4, 20, 8)[b, : len(row), 7], -expected)
    assert num_copies > 50 and num_refused > 5  # the history has both
