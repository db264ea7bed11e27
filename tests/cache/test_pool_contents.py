"""Pages of all layers that leave the pool and come back, and free pages that nobody's row holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import CacheConfig, PagePool, PageTables
from paged_jax.cache.contents import PageFormat, export_from_pool, import_to_pool

SIZES: Any = dict(num_layers=3, num_kv_heads=4, head_dim=16, num_pages=9, max_sequences=2, max_pages_per_sequence=6)
export = jax.jit(export_from_pool, static_argnums=1)
fill = jax.jit(import_to_pool, static_argnums=1, donate_argnums=0)


def noise(pool: PagePool) -> PagePool:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray((rng.standard_normal(x.shape) * 50).astype(x.dtype)), pool)


@pytest.mark.parametrize("dtype, per_layer", [("bfloat16", False), ("int8", False), ("float8_e4m3fn", True)])
def test_a_page_moves_with_all_layers_of_its_group_and_through_bytes(dtype, per_layer):
    windows = (None, 8, None)
    config = CacheConfig(**SIZES, page_size=4, dtype=dtype, windows=windows, array_per_layer=per_layer)
    pool, empty = noise(PagePool.create(config)), PagePool.create(config)
    for group, form in enumerate(PageFormat.of(config)):
        contents = jax.device_get(export(pool, group, jnp.array([7, 0, 2, 0], jnp.int32)))
        assert contents.keys.shape == (4, len(config.groups[group].layers), 4, 4, 16)
        assert not np.any(contents.keys[1].view(np.uint8)), "the null page is zeros"
        pages = [form.page(contents, i) for i in (0, 2)]
        assert [len(page) for page in pages] == [form.num_bytes] * 2
        again = form.contents(pages, 4)
        empty = fill(empty, group, jnp.array([1, 4, 0, 0], jnp.int32), again)
        there = jax.device_get(export(empty, group, jnp.array([1, 0, 4, 0], jnp.int32)))
        assert [form.page(there, i) for i in (0, 2)] == pages
    held = [bool(np.any(np.asarray(pages.data[1]).view(np.uint8))) for pages in empty.arrays]
    assert all(held), "both groups were filled, and no layer of one stands in the other"


def test_heads_on_several_devices_leave_as_those_of_one():
    config = CacheConfig(**SIZES, page_size=4, dtype="int8")
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    whole, split = noise(PagePool.create(config)), PagePool.create(config, mesh)
    split = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), whole, split)
    ids, (form,) = jnp.array([3, 8], jnp.int32), PageFormat.of(config)
    one, many = (jax.device_get(export(pool, 0, ids)) for pool in (whole, split))
    pages = [form.page(one, i) for i in range(2)]
    assert [form.page(many, i) for i in range(2)] == pages
    sharding = split.arrays[0].data.sharding
    filled = fill(split, 0, jnp.array([1, 2], jnp.int32), form.contents(pages, 2))
    assert filled.arrays[0].data.sharding == sharding
    there = jax.device_get(export(filled, 0, jnp.array([1, 2], jnp.int32)))
    assert [form.page(there, i) for i in range(2)] == pages


def test_pages_are_claimed_in_all_groups_or_in_none():
    config = CacheConfig(**SIZES, page_size=4, windows=(None, 8, 8), window_pages=4)
    claim = jax.jit(PageTables.claim)
    tables, pages = claim(PageTables.create(config), jnp.array([5, 2], jnp.int32))
    assert [sorted(ids[ids > 0]) for ids in np.asarray(pages)] == [[1, 2, 3, 4, 5], [1, 2]]
    for table, ids in zip(tables.groups, np.asarray(pages), strict=True):
        expected = np.bincount(ids, minlength=table.num_pages)
        expected[0] = 1  # the null page
        np.testing.assert_array_equal(table.refcounts, expected)
    refused, none = claim(tables, jnp.array([2, 2], jnp.int32))
    assert not np.any(none) and list(refused.num_free) == [3, 1]
    assert not np.any(claim(PageTables.create(config), jnp.array([7, 1], jnp.int32))[1]), "more than a row of pages"
    back = refused.drop_pages(pages)
    assert list(back.num_free) == [8, 3]
