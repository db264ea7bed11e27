"""The meaning of every op in plain jax.numpy: one query at a time, one page at a time, nothing clever."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import (
    Pages,
    gather_pages,
    is_mapped,
    numbers,
    put_pages,
    put_tokens,
    split_kv,
    split_scales,
    token_places,
    token_slots,
)
from pallas_kernels.sharing import Sharing


class AttentionResult(NamedTuple):
    """What `paged_attention` returns.

    Args:
        out: `[T, N, H]`, in the queries' dtype.
        pages: the pages with the new tokens in them.
        lse: float32 `[T, N]`, log of the softmax denominator; None unless asked for.
    """

    out: Array
    pages: Pages
    lse: Array | None


def read_pages(pages: Pages, page_ids: Int32[Array, " n"]) -> tuple[Float[Array, "n S K H"], Float[Array, "n S K H"]]:
    mapped = is_mapped(page_ids, pages)
    index = jnp.where(mapped, page_ids, 0)

    def tokens_first(x):
        x = jnp.where(mapped[:, None, None, None], x, jnp.zeros((), x.dtype))
        return jnp.swapaxes(x, 1, 2)

    data, scales = gather_pages(pages, index)
    k, v = split_kv(pages, numbers(data))  # [n, K, S, H]
    if scales is not None:
        k_scale, v_scale = split_scales(pages, scales)  # [n, K, S]
        k = k.astype(jnp.float32) * k_scale[..., None]
        v = v.astype(jnp.float32) * v_scale[..., None]
    return tokens_first(k), tokens_first(v)


def write_pages(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
) -> Pages:
    places = token_places(lengths, query_starts, k.shape[0])
    page, slot = token_slots(pages, page_table, places)
    return put_tokens(pages, k, v, page, slot)


def copy_pages(pages: Pages, source: Int32[Array, " C"], target: Int32[Array, " C"]) -> Pages:
    both = is_mapped(source, pages) & is_mapped(target, pages)
    source = jnp.where(both, source, 0)
    target = jnp.where(both, target, pages.num_pages)  # past the end: dropped

    return put_pages(pages, target, *gather_pages(pages, source))


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    pages: Pages,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " N"] | None,
    sharing: Sharing | None,
    max_query_len: int,
    return_lse: bool,
) -> AttentionResult:
    del sharing, max_query_len  # promises that a faster implementation may use
    if k is not None and v is not None:
        pages = write_pages(pages, k, v, page_table, lengths, query_starts)
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // pages.num_kv_heads
    places = token_places(lengths, query_starts, num_tokens)
    if sinks is None:
        sinks = jnp.full(num_heads, -jnp.inf, jnp.float32)

    def attend(query):
        """One token: its row's pages, the keys it may see, their softmax, the mean of their values."""
        q, sequence, position = query
        row = page_table[sequence]
        keys, values = read_pages(pages, row)  # [M, S, K, H]
        keys = keys.reshape(-1, *keys.shape[2:]).astype(jnp.float32)  # [M * S, K, H]
        values = values.reshape(-1, *values.shape[2:]).astype(jnp.float32)

        key_position = jnp.arange(keys.shape[0])
        visible = jnp.repeat(is_mapped(row, pages), pages.page_size) & (key_position <= position)
        if window is not None:
            visible &= key_position > position - window
        keys = jnp.where(visible[:, None, None], keys, 0)  # what is not visible may be NaN
        values = jnp.where(visible[:, None, None], values, 0)

        q = q.astype(jnp.float32).reshape(-1, group, head_dim)
        scores = jnp.einsum("kgh,skh->kgs", q, keys, precision="highest") * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(visible[None, None, :], scores, -jnp.inf)
        sink = sinks.astype(jnp.float32).reshape(-1, group)

        top = jnp.maximum(jnp.max(scores, axis=-1), sink)  # [K, G]
        top = jnp.where(jnp.isfinite(top), top, 0)
        weights = jnp.exp(scores - top[..., None])
        total = jnp.sum(weights, axis=-1) + jnp.exp(sink - top)
        out = jnp.einsum("kgs,skh->kgh", weights, values, precision="highest")
        out = out / jnp.where(total > 0, total, 1)[..., None]
        lse = top + jnp.log(total)
        inert = position < 0
        out = jnp.where(inert, 0, out).reshape(num_heads, head_dim)
        lse = jnp.where(inert, -jnp.inf, lse).reshape(num_heads)
        return out, lse

    out, lse = jax.lax.map(attend, (q, places.sequence, places.position))
    return AttentionResult(out.astype(q.dtype), pages, lse if return_lse else None)


def refusal(op: str, **arguments) -> str | None:
    """Why this implementation cannot run `op`: it always can."""
    del op, arguments
    return None
