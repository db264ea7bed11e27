"""Sizes of a cache: bytes, budgets, refusals."""

import dataclasses
from typing import Any

import pytest

from paged_jax.cache.config import CacheConfig, LayerGroup
from paged_jax.cache.pool import PagePool

SIZES: dict[str, Any] = dict(num_layers=2, num_kv_heads=3, head_dim=16, max_sequences=4, max_pages_per_sequence=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_bytes_are_those_of_the_pool(dtype, head_dim):
    config = CacheConfig(num_pages=5, **{**SIZES, "head_dim": head_dim}, page_size=4, dtype=dtype)
    assert config.pool_bytes == PagePool.create(config).num_bytes == 5 * config.page_bytes


def test_max_length():
    assert CacheConfig(num_pages=5, **SIZES, page_size=4).max_length == 32


def test_a_budget_is_filled():
    config = CacheConfig.for_budget(pool_bytes=10_000_000, **SIZES)
    assert config.pool_bytes <= 10_000_000 < config.pool_bytes + config.page_bytes


def test_a_budget_of_less_than_two_pages():
    page_bytes = CacheConfig(num_pages=2, **SIZES).page_bytes
    assert CacheConfig.for_budget(pool_bytes=2 * page_bytes, **SIZES).num_pages == 2
    with pytest.raises(ValueError, match=f"holds fewer than 2 pages of {page_bytes} bytes .*at least {2 * page_bytes}"):
        CacheConfig.for_budget(pool_bytes=2 * page_bytes - 1, **SIZES)


@pytest.mark.parametrize("name", [*SIZES, "num_pages", "page_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_sizes_are_positive_whole_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
        CacheConfig(**{**SIZES, "num_pages": 5, name: value})


def test_the_null_page_is_not_enough():
    with pytest.raises(ValueError, match="num_pages must be at least 2 .*got 1"):
        CacheConfig(num_pages=1, **SIZES)


def test_dtypes():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, float8_e4m3fn, got 'float16'"):
        CacheConfig(num_pages=5, **SIZES, dtype="float16")


WINDOWS: dict[str, Any] = {**SIZES, "num_layers": 4, "windows": (6, None, 6, 40), "page_size": 4}


def test_layers_of_one_window_are_a_group_with_pages_of_its_own():
    config = CacheConfig(num_pages=65, **{**WINDOWS, "window_pages": 9})
    # A row holds 32 tokens, so a window of 40 is none.
    assert config.groups == (LayerGroup((1, 3), None, 65), LayerGroup((0, 2), 6, 9))
    assert config.pool_bytes == PagePool.create(config).num_bytes == 2 * (65 + 9) * config.layer_page_bytes
    assert CacheConfig(num_pages=65, **SIZES).groups == (LayerGroup((0, 1), None, 65),)


def test_without_window_pages_all_sequences_and_a_prefill_step_fit():
    config = CacheConfig(num_pages=1000, **{**WINDOWS, "max_pages_per_sequence": 250, "windows": (6,) * 4})
    ((_, _, num_pages),) = map(dataclasses.astuple, config.groups)
    assert num_pages == 4 * (3 + 1) + 128 + 1  # 6 tokens touch at most 3 pages
    assert dataclasses.replace(config, num_pages=20).groups[0].num_pages == 20


@pytest.mark.parametrize("new_tokens", [1, 3, 4, 9])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
def test_pages_mapped_is_the_most_that_any_history_maps(window, new_tokens):
    config = CacheConfig(num_pages=65, **SIZES, page_size=4)
    columns = [
        (start + new_tokens - 1) // 4 - max(start - window + 1, 0) // 4 + 1 for start in range(0, 32 - new_tokens)
    ]
    assert max(columns) == config.pages_mapped(window, 32, new_tokens)
    assert config.pages_mapped(None, 32, new_tokens) == 8 and config.pages_mapped(window, 3, new_tokens) == 1


def test_a_budget_is_filled_beside_windows():
    sizes = {**WINDOWS, "max_pages_per_sequence": 250}
    for window_pages in (None, 9):
        config = CacheConfig.for_budget(pool_bytes=1_000_000, **{**sizes, "window_pages": window_pages})
        larger = dataclasses.replace(config, num_pages=config.num_pages + 1)
        assert config.pool_bytes <= 1_000_000 < larger.pool_bytes


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("windows", (6, None), "windows has 2 entries for num_layers=4: give one for each layer"),
        ("windows", (6, 0, None, 1), r"windows\[1\] must be a whole number of at least 1, got 0"),
        ("window_pages", 1, "window_pages must be at least 2 .*got 1"),
        ("window_pages", 0, "window_pages must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_windows_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(num_pages=5, **{**WINDOWS, field: value})


def test_it_is_a_static_value():
    config = CacheConfig(num_pages=5, **SIZES)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_pages = 6  # pyright: ignore[reportAttributeAccessIssue]  that it is frozen is the point
