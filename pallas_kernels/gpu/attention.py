"""`paged_attention` on a Hopper GPU: which kernel serves which queries."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu import hardware
from pallas_kernels.gpu.decode import attend_segments, decode_tile, merge_segments, padded_group
from pallas_kernels.gpu.moves import write_pages
from pallas_kernels.gpu.schedule import cut_rows
from pallas_kernels.pages import Pages, token_places
from pallas_kernels.reference import AttentionResult

HEAD_DIMS = (64, 128, 256)


class Options(NamedTuple):
    """What every form of attention takes."""

    scale: float
    window: int | None
    soft_cap: float | None
    sinks: Array | None


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
    shared_prefix: Int32[Array, ""] | None,
    max_query_len: int,
    return_lse: bool,
) -> AttentionResult:
    """As `pallas_kernels.paged_attention`; the arguments are already checked, here and by `refusal`."""
    del shared_prefix, max_query_len
    if k is not None and v is not None:
        pages = write_pages(pages, k, v, page_table, lengths, query_starts)
    options = Options(scale, window, soft_cap, sinks)
    places = token_places(lengths, query_starts, q.shape[0])
    out, lse = decode(q, pages, page_table, places.sequence, places.position, options)
    return AttentionResult(out, pages, lse if return_lse else None)


def decode(
    q: Float[Array, "R N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    sequence: Int32[Array, " R"],
    position: Int32[Array, " R"],
    options: Options,
) -> tuple[Float[Array, "R N H"], Float[Array, "R N"]]:
    """Attention of rows that each hold one query of one sequence; a row with a negative position is inert."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.num_kv_heads, pages.page_size
    group = num_heads // num_kv_heads
    tile = decode_tile(group, head_dim, page_size, page_table.shape[1])
    padding = padded_group(group) - group

    takes_part = position >= 0
    end = jnp.minimum(position + 1, page_table.shape[1] * page_size)
    begin = jnp.zeros_like(end) if options.window is None else jnp.maximum(position + 1 - options.window, 0)
    first_tile = begin // tile.tokens
    num_tiles = jnp.where(takes_part & (end > begin), -(-end // tile.tokens) - first_tile, 0)
    num_shares = max(1, hardware.num_multiprocessors() * tile.blocks // num_kv_heads)
    schedule = cut_rows(first_tile, num_tiles, num_shares)

    rows = jnp.stack([sequence, begin, end, takes_part.astype(jnp.int32)], axis=1)
    heads = pad_axis(q.reshape(num_rows, num_kv_heads, group, head_dim), 2, padding)
    columns = -page_table.shape[1] % tile.ids
    out, lse = attend_segments(
        heads, pages.data, pad_axis(page_table, 1, columns), rows, schedule,
        page_size=page_size, tile=tile, scale=options.scale, soft_cap=options.soft_cap,
    )  # fmt: skip
    sinks = options.sinks
    if sinks is not None:
        sinks = pad_axis(sinks.astype(jnp.float32).reshape(num_kv_heads, group), 1, padding)
    out, lse = merge_segments(out, lse, rows, schedule.row_starts, sinks, q.dtype)
    return out[:, :, :group].reshape(q.shape), lse[:, :, :group].reshape(num_rows, num_heads)


def pad_axis(x: Array, axis: int, amount: int) -> Array:
    """`x` with zeros behind the end of an axis."""
    if amount == 0:
        return x
    return jnp.pad(x, [(0, amount if i == axis else 0) for i in range(x.ndim)])


def refusal(q: Array, pages: Pages, max_query_len: int, **arguments: Any) -> str | None:
    """Why the kernels cannot run these arguments, or None."""
    del arguments
    if q.dtype != jnp.bfloat16:
        return f"the GPU kernels take bfloat16 queries, got {q.dtype.name}."
    if pages.dtype != jnp.bfloat16:
        return f"the GPU kernels take bfloat16 pages, got {pages.dtype.name}."
    if pages.head_dim not in HEAD_DIMS:
        return f"the GPU kernels take head sizes {HEAD_DIMS}, got {pages.head_dim}."
    if pages.page_size % 64 and pages.page_size not in (8, 16, 32):
        return f"the GPU kernels take pages of 8, 16, 32 or a multiple of 64 tokens, got {pages.page_size}."
    if max_query_len > 1:
        return f"the GPU kernels decode one query a sequence, got max_query_len {max_query_len}."
    if (group := q.shape[1] // pages.num_kv_heads) > 16:
        return f"the GPU kernels take up to 16 query heads a KV head, got {group}."
    return None
