"""The pool: copies of copy-on-write, in place and in every layer."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.config import CacheConfig
from paged_jax.page_table import Reservation
from paged_jax.pool import PagePool
from pallas_kernels import read_pages

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


def test_pages_start_empty():
    keys, values = read_pages(PagePool.create(CONFIG).layers[0], jnp.arange(1, 4, dtype=jnp.int32))
    assert keys.shape == (3, 8, 2, 16) and not np.any(np.asarray(keys)) and not np.any(np.asarray(values))
