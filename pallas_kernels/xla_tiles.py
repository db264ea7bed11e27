"""Attention over tiles of KV tokens: what the decode loop and the prefill loop share."""

from __future__ import annotations

import dataclasses
import functools
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


def rows_at(x: Array, index: Int32[Array, "*n"]) -> Array:
    """`x[index]` for indices within bounds: without what JAX adds for those that count from the end."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def repeated(x: Array, times: int, axis: int) -> Array:
    """`jnp.repeat` as a broadcast."""
    x = jnp.expand_dims(x, axis + 1)
    x = jnp.broadcast_to(x, (*x.shape[: axis + 1], times, *x.shape[axis + 2 :]))
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def tile_width(pages: Pages) -> int:
    """Numbers that a token's key and value take for each KV head."""
    return pages.data.shape[-1] * (2 if is_stacked(pages) else 1)


def pages_per_block_tile(pages: Pages) -> int:
    """Whole pages in a tile that a block of queries meets: about 128 tokens, or 256 where they are narrow."""
    token_bytes = pages.num_kv_heads * tile_width(pages) * pages.data.dtype.itemsize
    tokens = TILE_TOKENS if token_bytes > NARROW_BYTES else 2 * TILE_TOKENS
    return max(1, tokens // pages.page_size)


def padded_table(page_table: Int32[Array, "B M"], pages: Pages, num_columns: int) -> Int32[Array, "B columns"]:
    """The page table with the null page for every unmapped entry, and in `num_columns` more columns."""
    table = jnp.where(is_mapped(page_table, pages), page_table, NULL_PAGE)
    return jnp.pad(table, ((0, 0), (0, num_columns)), constant_values=NULL_PAGE)


def empty_state(*shape: int) -> Softmax:
    """Before any key; the last size is that of a head."""
    return Softmax(jnp.full(shape[:-1], LOWEST), jnp.zeros(shape[:-1]), jnp.zeros(shape))


def finish(state: Softmax, sinks: Float[Array, ...] | None) -> tuple[Float[Array, "*n H"], Float[Array, "*n"]]:
    """Output and log-sum-exp, sinks included; 0 and -inf where there was neither a key nor a sink."""
    top, total, out = state
    if sinks is not None:
        top = jnp.maximum(top, sinks)
        shrink = jnp.exp(state.top - top)
        total = total * shrink + jnp.exp(sinks - top)
        out = out * shrink[..., None]
    some = total > 0
    total = jnp.where(some, total, 1)
    return out / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)


def compute_dtype(q: Array, pages: Pages):
    """What the products are computed in; sums are float32 always."""
    return q.dtype if pages.scales is not None or q.dtype == pages.dtype else jnp.dtype(jnp.float32)


def attend(
    state: Softmax,
    q: Float[Array, "C K R H"],
    pages: Pages,
    page_ids: Int32[Array, "C pages_per_tile"],
    exists: Bool[Array, "C tile"],
    visible: Bool[Array, "C R tile"] | None,
    options: Options,
) -> Softmax:
    """Attention of C groups of queries, each over one more tile: a step of the online softmax.

    Args:
        state: of the queries over the keys before, `[C, K, R]` and `[C, K, R, H]`.
        q: R queries for each tile and KV head.
        pages: one layer's pages.
        page_ids: the pages of each tile, all within `0 .. P-1`.
        exists: which tokens of a tile any query may see; the others may hold NaN.
        visible: which tokens each query sees; None: those that exist.
        options: the static options.

    Returns:
        The state of the queries over the keys before and those of the tile.
    """
    dtype = compute_dtype(q, pages)
    head_dim = q.shape[-1]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    # Zero times NaN is NaN: what no query may see has to go from the values, whatever its weight.
    exists, visible = jax.lax.optimization_barrier((exists, visible))  # computed once, not again for every lane
    visible = exists[:, None] if visible is None else visible
    has_few = q.shape[2] <= FEW_QUERIES
    keep_rows = has_few and not is_stacked(pages)
    if keep_rows:
        k = v = gather_rows(pages, page_ids, exists, dtype)  # [C, K, tile, 2H]
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    else:
        k, v = gather_kv(pages, page_ids, exists, dtype)  # [C, K, tile, H]
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    if has_few and dtype == jnp.float32:  # takes less of a CPU than the other way round; in bfloat16 it takes more
        # Without the barrier, XLA would turn this into the other product.
        scores = jnp.swapaxes(jax.lax.optimization_barrier(product("ckth,ckrh->cktr", k, q.astype(dtype))), 2, 3)
    else:
        scores = product("ckrh,ckth->ckrt", q.astype(dtype), k)
    scores = scores * options.scale
    v_scale = None
    if pages.scales is not None:
        k_scale, v_scale = gather_scales(pages, page_ids, exists)  # [C, K, tile]
        scores = scores * k_scale[:, :, None, :]
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1), state.top)
    weights = jnp.exp(scores - top[..., None])
    shrink = jnp.exp(state.top - top)
    total = state.total * shrink + jnp.sum(weights, axis=-1)
    if v_scale is not None:
        weights = weights * v_scale[:, :, None, :]
    out = product("ckrt,ckth->ckrh", weights.astype(dtype), v)
    out = out[..., head_dim:] if keep_rows else out
    return Softmax(top, total, state.out * shrink[..., None] + out)


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
