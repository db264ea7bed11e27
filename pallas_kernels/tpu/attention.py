"""From the arguments of `paged_attention` to the operands of the TPU kernels, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.pages import Pages, is_mapped, is_stacked, quantise
from pallas_kernels.reference import AttentionResult
from pallas_kernels.tpu import decode as kernel
from pallas_kernels.tpu import prefill as prefill_kernel
from pallas_kernels.tpu.blocks import decode_sizes, prefill_sizes
from pallas_kernels.tpu.heads import LANES, SUBLANES, pack_heads, pack_queries, pad_group, unpack_rows
from pallas_kernels.tpu.write import rows_per_tile, tiles_of_step


def page_chunks(ids: Array) -> tuple[Array, int]:
    """A page table `[B, M]` as rows of whole chunks, flat, and the chunks of a row."""
    max_pages = ids.shape[1]
    chunks = -(-max_pages // kernel.IDS)
    ids = jnp.pad(ids, ((0, 0), (0, chunks * kernel.IDS - max_pages)))
    return ids.reshape(-1), chunks


def decode_rows(
    lengths: Array, query_starts: Array, ids: Array, sizes: kernel.DecodeSizes, window: int | None
) -> Array:
    """The scalars of each row that the decode kernel needs; rows without exactly one new token sit out.

    Args:
        ids: int32 `[B, M]`, the page table, 0 where there is no page.
    """
    tokens, page_size = sizes.tokens, sizes.page_size
    length = jnp.where(query_starts[1:] - query_starts[:-1] == 1, jnp.maximum(lengths, 0), 0)
    last = jnp.maximum(length - 1, 0)
    first = jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0)
    first_block, last_block = first // tokens, last // tokens
    row = jnp.arange(length.size, dtype=jnp.int32)
    column = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    needed = (column >= (first // page_size)[:, None]) & (column <= (last // page_size)[:, None])
    fields = {
        kernel.TABLE_ROW: row,
        kernel.LENGTH: length,
        kernel.TOKEN: query_starts[:-1],
        kernel.FIRST_BLOCK: first_block,
        kernel.FIRST_PAGE: first % tokens // page_size,
        kernel.LAST_PAGE: last % tokens // page_size,
        kernel.LAST_SLOT: last % page_size,
        kernel.HOLES: jnp.any(needed & (ids == 0), axis=1).astype(jnp.int32),
    }
    rows = jnp.stack([fields[i] for i in range(kernel.FIELDS)])
    active = length > 0
    num_items = jnp.sum(jnp.where(active, last_block + 1 - first_block, 0), dtype=jnp.int32)
    return jnp.concatenate([active_first(rows, active), num_items[None]])


def active_first(rows: Array, active: Array) -> Array:
    """Fields `[F, B]`, those of the rows that take part in front, flat, and then their number.

    It is cheaper than a sort, and done once a step for all layers.
    """
    row = jnp.arange(active.size, dtype=jnp.int32)
    rank = jnp.sum((row[None, :] < row[:, None]) & active[None, :], axis=1, dtype=jnp.int32)
    is_nth = (rank[None, :] == row[:, None]) & active[None, :]
    rows = jnp.sum(jnp.where(is_nth[None], rows[:, None, :], 0), axis=2)
    return jnp.concatenate([rows.reshape(-1), jnp.sum(active, dtype=jnp.int32)[None]])


def prefill_rows(lengths: Array, query_starts: Array, ids: Array, sizes: prefill_kernel.PrefillSizes) -> Array:
    """The scalars of each row that the prefill kernel needs; rows with fewer than two new tokens sit out."""
    num_tokens = query_starts[1:] - query_starts[:-1]
    active = (num_tokens > 1) & (lengths > 0)
    column = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    needed = column * sizes.page_size < lengths[:, None]
    fields = {
        prefill_kernel.TABLE_ROW: jnp.arange(lengths.size, dtype=jnp.int32),
        prefill_kernel.LENGTH: lengths,
        prefill_kernel.TOKEN: query_starts[:-1],
        prefill_kernel.NUM_TASKS: -(-num_tokens // sizes.query_tokens),
        prefill_kernel.HOLES: jnp.any(needed & (ids == 0), axis=1).astype(jnp.int32),
        prefill_kernel.FIRST_POSITION: lengths - num_tokens,
    }
    return active_first(jnp.stack([fields[i] for i in range(prefill_kernel.FIELDS)]), active)


def prefill(
    q: Array, pages: Pages, page_table: Array, lengths: Array, query_starts: Array, *, scale: float,
    window: int | None, soft_cap: float | None, sinks: Array | None, return_lse: bool, max_query_len: int,
    sizes: prefill_kernel.PrefillSizes | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Attention for the tokens of sequences with several new tokens, which their pages hold already.

    Args:
        sizes: None (the heuristic of blocks.py) or explicit block sizes.

    Returns:
        out `[T, N, H]` and lse; other tokens hold anything.
    """
    num_tokens, num_heads, head_dim = q.shape
    lanes = pages.data.shape[3]
    if sizes is None:
        sizes = prefill_sizes(pages, num_heads, max_query_len)
    lengths = jnp.minimum(lengths, page_table.shape[1] * pages.page_size)
    ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
    rows = prefill_rows(lengths, query_starts, ids, sizes)
    table, chunks = page_chunks(ids)
    padded_heads = -(-num_heads // SUBLANES) * SUBLANES
    padding = ((0, sizes.query_tokens), (0, padded_heads - num_heads), (0, lanes - head_dim))
    q_rows = jnp.pad(q.astype(jnp.float32), padding).reshape(-1, lanes)
    if sinks is not None:
        by_row = jnp.repeat(sinks.astype(jnp.float32), sizes.query_tokens).reshape(-1, sizes.rows_per_unit, 1)
        sinks = jnp.broadcast_to(by_row, (*by_row.shape[:2], LANES))
    options = prefill_kernel.PrefillOptions(scale, window, soft_cap, sinks is not None, return_lse, True)
    out, lse = prefill_kernel.prefill(
        q_rows, sinks, rows, table, pages.data, chunks=chunks, num_heads=num_heads,
        dtype=compute_dtype(q, pages), sizes=sizes, options=options,
    )  # fmt: skip
    out = out.reshape(-1, padded_heads, lanes)[:num_tokens, :num_heads, lanes - head_dim :].astype(q.dtype)
    if not return_lse:
        return out, None
    return out, lse.reshape(-1, padded_heads, LANES)[:num_tokens, :num_heads, 0]


def write_scalars(pages: Pages, ids: Array, lengths: Array, query_starts: Array, num_tokens: int) -> Array:
    """The scalars of the write kernel."""
    tile_rows = rows_per_tile(pages.page_size, pages.dtype.itemsize)
    tiles = tiles_of_step(ids, lengths, query_starts, num_tokens, pages.page_size, tile_rows)
    return tiles.scalars


def new_rows(k: Array, v: Array, pages: Pages) -> tuple[Array, Array | None]:
    """New keys and values as rows of a page, int32 `[T, K * planes, L]`: a value in all parts of its word.

    For 8-bit pages also their scales, float32 `[T, 2, K, 128]`, the same in all lanes.
    """
    scales = None
    if pages.scales is not None:
        (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        scales = jnp.stack([k_scale, v_scale], axis=1)[..., None]
        scales = jnp.broadcast_to(scales, (*scales.shape[:-1], LANES))
    k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    if is_stacked(pages):
        rows = jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    else:
        rows = jnp.concatenate([k, v], axis=2)
    bits = 8 * rows.dtype.itemsize
    words = jax.lax.bitcast_convert_type(rows, f"uint{bits}").astype(jnp.uint32)
    words = words * jnp.uint32(sum(1 << at for at in range(0, 32, bits)))
    return jax.lax.bitcast_convert_type(words, jnp.int32), scales


def compute_dtype(q: Array, pages: Pages):
    """Of the products: q's where pages are quantised, else whichever is wider."""
    return q.dtype if pages.scales is not None else jnp.promote_types(q.dtype, pages.dtype)


def decode(
    q: Array, k: Array | None, v: Array | None, pages: Pages, page_table: Array, lengths: Array, query_starts: Array,
    *, scale: float, window: int | None, soft_cap: float | None, sinks: Array | None, return_lse: bool,
    sizes: kernel.DecodeSizes | None = None,
) -> AttentionResult:  # fmt: skip
    """`paged_attention` for the sequences that have exactly one new token; 0 for all other tokens.

    Args:
        sizes: None (the heuristic of blocks.py) or explicit block sizes.
    """
    num_tokens, num_heads, head_dim = q.shape
    packing = pack_heads(num_heads, pages.num_kv_heads, head_dim, pages.data.shape[3])
    if sizes is None:
        sizes = decode_sizes(pages, page_table.shape[1], packing)
    lengths = jnp.minimum(lengths, page_table.shape[1] * pages.page_size)
    ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
    rows = decode_rows(lengths, query_starts, ids, sizes, window)
    table, chunks = page_chunks(ids)
    if sinks is not None:
        sinks = pad_group(sinks.astype(jnp.float32)[None], packing).reshape(packing.rows, 1)
        sinks = jnp.broadcast_to(sinks, (packing.rows, LANES))
    options = kernel.DecodeOptions(
        scale, window, soft_cap,
        append=k is not None, sinks=sinks is not None, lse=return_lse, quantised=pages.scales is not None,
    )  # fmt: skip
    new, new_scales = (None, None) if k is None or v is None else new_rows(k, v, pages)
    out, lse, data, scales = kernel.decode(
        pack_queries(q.astype(compute_dtype(q, pages)), packing), new, new_scales, sinks, rows, table,
        pages.data, pages.scales, chunks=chunks, sizes=sizes, packing=packing, options=options,
    )  # fmt: skip
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    takes_part = (query_starts[1:] - query_starts[:-1] == 1) & (lengths > 0)
    is_mine = jnp.any((query_starts[None, :-1] == token[:, None]) & takes_part[None, :], axis=1)[:, None]
    out = jnp.where(is_mine[..., None], unpack_rows(out, packing)[..., -head_dim:], 0).astype(q.dtype)
    if return_lse:
        lse = jnp.where(is_mine, unpack_rows(lse[..., 0], packing), -jnp.inf)
    new_pages = Pages(data, None if pages.scales is None else scales, pages.page_size)
    return AttentionResult(out, new_pages, lse if return_lse else None)
