"""Random paged attention problems in which whatever must not be read is poison."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pages import LARGEST, Pages, init_pages

INVALID_IDS = (0, -1, -7, 10**6, 2**31 - 1)


class Problem(NamedTuple):
    """Arguments of `paged_attention`, in its order."""

    q: jnp.ndarray
    k: jnp.ndarray | None
    v: jnp.ndarray | None
    pages: Pages
    page_table: jnp.ndarray
    lengths: jnp.ndarray
    query_starts: jnp.ndarray


def make_problem(
    lengths,
    *,
    query_lens=None,
    padding=0,
    heads=(4, 2),
    head_dim=128,
    page_size=16,
    max_pages=None,
    write=False,
    dtype="bfloat16",
    seed=0,
) -> Problem:
    """Sequences on shuffled pages of distinct data.

    NaN fills the null page, unowned pages and every slot behind a length; columns behind the mapped ones hold
    invalid ids. Padding tokens follow the last sequence. With `write`, the new tokens' slots are NaN as well. Of
    quantised pages the scales are NaN too, and of int8 pages nothing else can be.
    """
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    query_lens = np.ones_like(lengths) if query_lens is None else np.asarray(query_lens, np.int32)
    num_heads, num_kv_heads = heads
    needed = -(-lengths // page_size)
    max_pages = max_pages or int(needed.max()) + 1
    num_pages = int(needed.sum()) + 3
    ids = rng.permutation(np.arange(1, num_pages))
    table = rng.choice(INVALID_IDS, (lengths.size, max_pages))

    k = np.full((num_pages, num_kv_heads, page_size, head_dim), np.nan, np.float32)
    v = k.copy()
    taken = 0
    for row, length in enumerate(lengths):
        table[row, : needed[row]] = ids[taken : taken + needed[row]]
        taken += needed[row]
        written = length - (query_lens[row] if write else 0)
        for position in range(max(written, 0)):
            page, slot = table[row, position // page_size], position % page_size
            k[page, :, slot], v[page, :, slot] = rng.normal(size=(2, num_kv_heads, head_dim))

    empty = jax.eval_shape(lambda: init_pages(num_pages, num_kv_heads, page_size, head_dim, dtype))
    axis = 2 if empty.data.shape[2] == 2 * page_size else 3
    scales = None
    if dtype in LARGEST:
        scales = np.abs(np.concatenate([k, v], axis=2)).max(axis=-1) / LARGEST[dtype]
        k, v = (x / scale[..., None] for x, scale in zip((k, v), np.split(scales, 2, axis=2), strict=True))
        scales = jnp.asarray(scales, jnp.float32)
    kv = np.concatenate([k, v], axis=axis)
    if dtype == "int8":
        kv = np.where(np.isnan(kv), 77, np.round(kv))
    elif dtype == "float8_e4m3fn":
        kv = kv.astype(dtype).view(np.uint8)
    data = jnp.asarray(kv, empty.data.dtype)
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    num_tokens = int(starts[-1]) + padding

    def normal(num):
        return jnp.asarray(rng.normal(size=(num_tokens, num, head_dim)), jnp.bfloat16)

    q, new_k, new_v = normal(num_heads), normal(num_kv_heads), normal(num_kv_heads)
    return Problem(
        q,
        new_k if write else None,
        new_v if write else None,
        Pages(data, scales, page_size),
        jnp.asarray(table, jnp.int32),
        jnp.asarray(lengths),
        jnp.asarray(starts),
    )
