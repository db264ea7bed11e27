"""Data for the benchmarks: pages in shuffled order, and the same tokens contiguous for those who need them so."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Pages
from pallas_kernels.pages import LARGEST

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128


class Problem(NamedTuple):
    """Arguments of `paged_attention`: `context` tokens in every sequence."""

    q: jax.Array
    pages: Pages
    page_table: jax.Array
    lengths: jax.Array
    query_starts: jax.Array

    @property
    def kv_bytes(self) -> int:
        """What one pass over all keys and values reads."""
        scales = 0 if self.pages.scales is None else 4
        token = 2 * NUM_KV_HEADS * (HEAD_DIM * self.pages.data.dtype.itemsize + scales)
        return int(np.sum(self.lengths)) * token


def make_problem(batch: int, context: int, page_size: int, dtype: str, *, queries: int = 1, prefix: int = 0) -> Problem:
    """Random data; `prefix` tokens are shared by all. A few random pages repeat: bandwidth does not depend on them."""
    rng = np.random.default_rng(0)
    columns = -(-context // page_size)
    shared = prefix // page_size
    own = rng.permutation(batch * (columns - shared)).reshape(batch, -1) + 1 + shared
    table = np.concatenate([np.tile(np.arange(shared) + 1, (batch, 1)), own], axis=1)
    num_pages = int(table.max()) + 1
    distinct = min(num_pages, 64)
    shape = (distinct, NUM_KV_HEADS, 2 * page_size, HEAD_DIM)
    data = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    scales = None
    if dtype == "int8":
        data = jnp.round(data.astype(jnp.float32) * 30).astype(jnp.int8)
    elif dtype == "float8_e4m3fn":
        data = jax.lax.bitcast_convert_type((data * 30).astype(dtype), jnp.uint8)
    if dtype in LARGEST:
        scales = jnp.full((num_pages, NUM_KV_HEADS, 2 * page_size), 1 / 30, jnp.float32)
    repeat = jax.jit(lambda x: jnp.tile(x, (math.ceil(num_pages / distinct), 1, 1, 1))[:num_pages])
    starts = np.arange(batch + 1, dtype=np.int32) * queries
    return Problem(
        jax.random.normal(jax.random.key(1), (batch * queries, NUM_HEADS, HEAD_DIM), jnp.bfloat16),
        Pages(repeat(data), scales, page_size),
        jnp.asarray(table, jnp.int32),
        jnp.full(batch, context, jnp.int32),
        jnp.asarray(starts),
    )


def contiguous(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """The keys and values as `[B, context, K, H]`."""
    page_size = problem.pages.page_size
    pages = problem.pages.data[problem.page_table]  # [B, M, K, 2S, H]
    tokens = jnp.swapaxes(pages, 2, 3).reshape(pages.shape[0], -1, 2, page_size, NUM_KV_HEADS, HEAD_DIM)
    k, v = (tokens[:, :, part].reshape(pages.shape[0], -1, NUM_KV_HEADS, HEAD_DIM) for part in range(2))
    length = int(problem.lengths[0])
    return k[:, :length], v[:, :length]
