"""Attention over tiles of KV tokens: what the decode loop and the prefill loop share."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pages import NULL_PAGE, Pages, gather_pages, is_mapped, split_kv

TILE_TOKENS = 128
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


def pages_per_tile(page_size: int) -> int:
    """Whole pages in a tile of about 128 tokens."""
    return max(1, TILE_TOKENS // page_size)


def tiled_table(page_table: Int32[Array, "B M"], pages: Pages) -> Int32[Array, "B tiles pages_per_tile"]:
    """The page table by tiles, padded with the null page, every unmapped id replaced by it."""
    per_tile = pages_per_tile(pages.page_size)
    rows, columns = page_table.shape
    table = jnp.where(is_mapped(page_table, pages), page_table, NULL_PAGE)
    table = jnp.pad(table, ((0, 0), (0, -columns % per_tile)), constant_values=NULL_PAGE)
    return table.reshape(rows, -1, per_tile)


def start(sinks: Float[Array, " N"] | None, num_kv_heads: int, num_heads: int, head_dim: int) -> Softmax:
    """The state before any key: nothing but the sinks. `[K, G]` and `[K, G, H]`."""
    group = num_heads // num_kv_heads
    out = jnp.zeros((num_kv_heads, group, head_dim), jnp.float32)
    if sinks is None:
        return Softmax(jnp.full(out.shape[:2], LOWEST), jnp.zeros(out.shape[:2]), out)
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
    num_tiles, num_heads = q.shape[:2]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def by_head(x):  # [C, pages_per_tile, K, S, ...] -> [C, K, tile, ...]
        return jnp.swapaxes(x, 1, 2).reshape(num_tiles, num_heads, -1, *x.shape[4:])

    data, scales = gather_pages(pages, page_ids)
    k, v = split_kv(pages, data)
    k, v = by_head(k).astype(dtype), by_head(v).astype(dtype)
    scores = jnp.einsum("ckrh,ckth->ckrt", q.astype(dtype), k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * options.scale
    v_scale = None
    if scales is not None:
        k_scale, v_scale = (by_head(x) for x in jnp.split(scales, 2, axis=-1))  # [C, K, tile]
        scores = scores * k_scale[:, :, None, :]
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1), LOWEST)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    # Zero times NaN is NaN, so what no query may see has to go from the values too.
    if v_scale is not None:
        weights = weights * jnp.where(exists[:, None, None, :], v_scale[:, :, None, :], 0)
    else:
        v = jnp.where(exists[:, None, :, None], v, jnp.zeros((), dtype))
    out = jnp.einsum(
        "ckrt,ckth->ckrh", weights.astype(dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    return Softmax(top, total, out)
