"""Sizes of a cache: bytes, budgets, refusals."""

import dataclasses
from typing import Any

import pytest

from paged_jax.config import CacheConfig
from paged_jax.pool import PagePool

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


def test_it_is_a_static_value():
    config = CacheConfig(num_pages=5, **SIZES)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_pages = 6  # pyright: ignore[reportAttributeAccessIssue]
