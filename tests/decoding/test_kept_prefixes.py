"""What `prefill` refuses; what it keeps is tested in test_score.py, with a program that goes on from there."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import KVCache, prefill

PLAIN, HYBRID = (None, None), (None, 6)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(tokens=0), "tokens must be at least 1, got 0"),
        (dict(chunk=0), "chunk must be at least 1, got 0"),
        (dict(tokens=81), "81 tokens, but rows hold 64: give fewer, or raise max_pages_per_sequence to 21"),
        (
            dict(tokens=48),
            "48 tokens in steps of 8 tokens need 12 pages, but the pool has 11: raise num_pages to 13, give",
        ),
        (dict(tokens=44, prefix=True), "44 tokens in steps of 8 tokens need 12 pages, but the pool has 11: raise"),
        (dict(window_pages=3), "4 pages, but layers with a window of 6 have 2: raise window_pages to 5"),
    ],
)
def test_sizes_that_never_fit_are_refused_when_it_is_traced(sizes, message):
    pages = dict(window_pages=sizes["window_pages"]) if "window_pages" in sizes else {}
    windows = HYBRID if pages else PLAIN
    tokens, chunk = np.zeros(sizes.get("tokens", 20), np.int32), sizes.get("chunk", 8)

    def trace():
        cache = KVCache.create(decoder.config(12, 4, 16, windows, **pages))
        prefix = cache.tables.publish(0, 0)[1] if "prefix" in sizes else None
        return prefill(decoder.forward_with(windows), jnp.int32(0), tokens, 1, cache, chunk=chunk, prefix=prefix)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(trace)


@pytest.mark.parametrize("shape, num_tokens", [((2, 3), 3), ((), 3), (3, [3]), (3, 2.5)])
def test_arrays_of_other_shapes_are_refused(shape, num_tokens):
    unchecked: Any = inspect.unwrap(prefill)  # past the annotations of the test run
    cache = KVCache.create(decoder.config(12))
    with pytest.raises(ValueError, match=r"give one text \[C\], and one whole number"):
        unchecked(decoder.forward, jnp.int32(0), np.zeros(shape, np.int32), num_tokens, cache)
