"""Attention over tiles of KV tokens: what the decode loop and the prefill loop share."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pages import NULL_PAGE, Pages, gather_pages, is_mapped, is_stacked, numbers, split_scales

TILE_TOKENS = 128
NARROW_BYTES = 512  # a token: tiles of such pages hold twice the tokens, or the fixed cost of an item shows
FEW_QUERIES = 32  # a KV head: fewer, and splitting rows costs more than multiplying whole ones
LOWEST = -1e30  # stands for -inf as the largest score so far: a difference of two of them is 0, not NaN


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of one call."""

    scale: float
    window: int | None
    soft_cap: float | None


class Softmax(NamedTuple):
    """Attention over some keys, before the division: merging two of these is exact."""

    top: Float[Array, "*n"]  # the largest score, at least LOWEST
    total: Float[Array, "*n"]  # sum of exp(score - top)
    out: Float[Array, "*n H"]  # sum of exp(score - top) * value


def pages_per_tile(pages: Pages) -> int:
    """Whole pages in a tile of about 128 tokens, or 256 where they are narrow."""
    token_bytes = pages.num_kv_heads * 2 * pages.head_dim * pages.data.dtype.itemsize
    tokens = TILE_TOKENS if token_bytes > NARROW_BYTES else 2 * TILE_TOKENS
    return max(1, tokens // pages.page_size)


def tiled_table(page_table: Int32[Array, "B M"], pages: Pages) -> Int32[Array, "B tiles pages_per_tile"]:
    """The page table by tiles, padded with the null page, every unmapped id replaced by it."""
    per_tile = pages_per_tile(pages)
    rows, columns = page_table.shape
    table = jnp.where(is_mapped(page_table, pages), page_table, NULL_PAGE)
    table = jnp.pad(table, ((0, 0), (0, -columns % per_tile)), constant_values=NULL_PAGE)
    return table.reshape(rows, -1, per_tile)


def mapped_table(page_table: Int32[Array, "B M"], pages: Pages) -> Int32[Array, "B M"]:
    """The page table with the null page for every unmapped entry."""
    return jnp.where(is_mapped(page_table, pages), page_table, NULL_PAGE)


def merge(a: Softmax, b: Softmax) -> Softmax:
    """Attention over the keys of both."""
    top = jnp.maximum(a.top, b.top)
    shrink_a, shrink_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Softmax(
        top,
        a.total * shrink_a + b.total * shrink_b,
        a.out * shrink_a[..., None] + b.out * shrink_b[..., None],
    )


def start(sinks: Float[Array, " N"] | None, num_kv_heads: int, num_heads: int, head_dim: int) -> Softmax:
    """The state before any key: nothing but the sinks. `[K, G]` and `[K, G, H]`."""
    group = num_heads // num_kv_heads
    out = jnp.zeros((num_kv_heads, group, head_dim), jnp.float32)
    if sinks is None:
        return Softmax(jnp.full(out.shape[:2], LOWEST, jnp.float32), jnp.zeros(out.shape[:2], jnp.float32), out)
    sink = sinks.astype(jnp.float32).reshape(num_kv_heads, group)
    top = jnp.maximum(sink, LOWEST)
    return Softmax(top, jnp.exp(sink - top), out)


def finish(state: Softmax) -> tuple[Float[Array, "*n H"], Float[Array, "*n"]]:
    """Output and log-sum-exp; 0 and -inf where there was no key."""
    some = state.total > 0
    total = jnp.where(some, state.total, 1)
    return state.out / total[..., None], jnp.where(some, state.top + jnp.log(total), -jnp.inf)


def compute_dtype(q: Array, pages: Pages):
    """What the products are computed in; sums are float32 always."""
    return q.dtype if pages.scales is not None or q.dtype == pages.dtype else jnp.dtype(jnp.float32)


def attend(
    q: Float[Array, "C K R H"],
    pages: Pages,
    page_ids: Int32[Array, "C pages_per_tile"],
    exists: Bool[Array, "C tile"],
    visible: Bool[Array, "C _ tile"],
    options: Options,
) -> Softmax:
    """Attention of C groups of queries, each over one tile.

    Args:
        q: R queries for each tile and KV head.
        pages: one layer's pages.
        page_ids: the pages of each tile, all within `0 .. P-1`.
        exists: which tokens of a tile any query may see; the others may hold NaN.
        visible: which tokens each query sees.
        options: the static options.

    Returns:
        The state of each query over its tile alone, `[C, K, R]` and `[C, K, R, H]`.
    """
    dtype = compute_dtype(q, pages)
    head_dim = q.shape[-1]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    # Zero times NaN is NaN: what no query may see has to go from the values, whatever its weight.
    exists = jax.lax.optimization_barrier(exists)  # computed once, not again for every lane
    keep_rows = not is_stacked(pages) and q.shape[2] <= FEW_QUERIES
    if keep_rows:
        k = v = gather_rows(pages, page_ids, exists, dtype)  # [C, K, tile, 2H]
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    else:
        k, v = gather_kv(pages, page_ids, exists, dtype)  # [C, K, tile, H]
    scores = jnp.einsum("ckrh,ckth->ckrt", q.astype(dtype), k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * options.scale
    v_scale = None
    if pages.scales is not None:
        k_scale, v_scale = gather_scales(pages, page_ids, exists)  # [C, K, tile]
        scores = scores * k_scale[:, :, None, :]
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1), LOWEST)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    if v_scale is not None:
        weights = weights * v_scale[:, :, None, :]
    out = jnp.einsum(
        "ckrt,ckth->ckrh", weights.astype(dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    return Softmax(top, total, out[..., head_dim:] if keep_rows else out)


def strips(pages: Pages, page_ids: Int32[Array, "C pages_per_tile"]) -> Int32[Array, "C K pages_per_tile"]:
    """The index of each head's strip of rows in each page, in the flat view of all strips."""
    head = jnp.arange(pages.num_kv_heads, dtype=jnp.int32)
    return page_ids[:, None, :] * pages.num_kv_heads + head[None, :, None]


def gather_kv(pages: Pages, page_ids: Array, exists: Array, dtype) -> tuple[Array, Array]:
    """Keys and values of C tiles, `[C, K, tile, H]` each, with zeros for values that do not exist."""
    num_tiles, num_strips = page_ids.shape[0], pages.num_pages * pages.num_kv_heads

    def tiles(x):  # [C, K, pages_per_tile, S, H]
        x = x.reshape(num_tiles, pages.num_kv_heads, -1, pages.head_dim)
        return numbers(x).astype(dtype)

    if is_stacked(pages):
        halves = pages.data.reshape(2 * num_strips, pages.page_size, pages.head_dim)
        half = 2 * strips(pages, page_ids)
        k = tiles(halves.at[half].get(mode="promise_in_bounds"))
        v = tiles(halves.at[half + 1].get(mode="promise_in_bounds"))
    else:
        rows = pages.data.reshape(num_strips, pages.page_size, -1)
        rows = rows.at[strips(pages, page_ids)].get(mode="promise_in_bounds")
        k, v = (tiles(x) for x in jnp.split(rows, 2, axis=-1))
    return k, jnp.where(exists[:, None, :, None], v, jnp.zeros((), dtype))


def gather_rows(pages: Pages, page_ids: Array, exists: Array, dtype) -> Array:
    """Rows of C tiles, `[C, K, tile, 2H]`, each a key beside its value; zeros for rows that do not exist."""
    rows = pages.data.reshape(-1, pages.page_size, 2 * pages.head_dim)
    rows = rows.at[strips(pages, page_ids)].get(mode="promise_in_bounds")
    rows = rows.reshape(page_ids.shape[0], pages.num_kv_heads, -1, 2 * pages.head_dim)
    return jnp.where(exists[:, None, :, None], numbers(rows).astype(dtype), jnp.zeros((), dtype))


def gather_scales(pages: Pages, page_ids: Array, exists: Array) -> tuple[Array, Array]:
    """The scales of the keys and values of C tiles, `[C, K, tile]` each; zeros for those that do not exist."""
    _, scales = gather_pages(pages, page_ids)
    assert scales is not None
    scales = jnp.swapaxes(scales, 1, 2)  # [C, K, pages_per_tile, R]
    k, v = (x.reshape(*x.shape[:2], -1) for x in split_scales(pages, scales))
    return jnp.where(exists[:, None], k, 0), jnp.where(exists[:, None], v, 0)
