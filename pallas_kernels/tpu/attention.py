"""From the arguments of `paged_attention` to the operands of the TPU kernels, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.pages import Pages, is_mapped, is_stacked
from pallas_kernels.reference import AttentionResult
from pallas_kernels.tpu import decode as kernel
from pallas_kernels.tpu.blocks import decode_sizes
from pallas_kernels.tpu.heads import LANES, pack_heads, pack_queries, pad_group, unpack_rows


def page_chunks(pages: Pages, page_table: Array) -> tuple[Array, int]:
    """The page table as rows of 128 ids `[B * chunks, 1, 128]`, 0 where there is no page, and chunks a row."""
    num_rows, max_pages = page_table.shape
    chunks = -(-max_pages // kernel.IDS)
    ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
    ids = jnp.pad(ids, ((0, 0), (0, chunks * kernel.IDS - max_pages)))
    return ids.reshape(num_rows * chunks, 1, kernel.IDS), chunks


def decode_rows(lengths: Array, query_starts: Array, sizes: kernel.DecodeSizes, window: int | None) -> Array:
    """The scalars of each row that the decode kernel needs; rows without exactly one new token sit out."""
    tokens, page_size = sizes.tokens, sizes.page_size
    length = jnp.where(query_starts[1:] - query_starts[:-1] == 1, jnp.maximum(lengths, 0), 0)
    first = jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0) // tokens
    last = jnp.maximum(length - 1, 0)
    blocks = jnp.where(length > 0, last // tokens + 1 - first, 0)
    fields = jnp.stack(
        [length, query_starts[:-1], first, last % tokens // page_size, last % page_size, blocks]
    )
    added = -length.size % kernel.UNROLL
    return jnp.pad(fields, ((0, 0), (0, added))).reshape(-1)


def new_rows(k: Array, v: Array, pages: Pages) -> Array:
    """New keys and values as rows of a page, float32 `[T, K * planes, L]`."""
    k, v = (x.astype(pages.dtype).astype(jnp.float32) for x in (k, v))
    if is_stacked(pages):
        return jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    return jnp.concatenate([k, v], axis=2)


def decode(
    q: Array, k: Array | None, v: Array | None, pages: Pages, page_table: Array, lengths: Array, query_starts: Array,
    *, scale: float, window: int | None, soft_cap: float | None, sinks: Array | None, return_lse: bool,
    sizes: kernel.DecodeSizes | None = None, interpret: Any = False,
) -> AttentionResult:  # fmt: skip
    """`paged_attention` for the sequences that have exactly one new token; 0 for all other tokens.

    Args:
        sizes: None (the heuristic of blocks.py) or explicit block sizes.
        interpret: as `pallas_call` has it: False, or `pltpu.InterpretParams` on a CPU.
    """
    num_tokens, num_heads, head_dim = q.shape
    packing = pack_heads(num_heads, pages.num_kv_heads, head_dim, pages.data.shape[3])
    if sizes is None:
        sizes = decode_sizes(pages, page_table.shape[1], packing)
    lengths = jnp.minimum(lengths, page_table.shape[1] * pages.page_size)
    rows = decode_rows(lengths, query_starts, sizes, window)
    table, chunks = page_chunks(pages, page_table)
    if sinks is not None:
        sinks = pad_group(sinks.astype(jnp.float32)[None], packing).reshape(packing.rows, 1)
        sinks = jnp.broadcast_to(sinks, (packing.rows, LANES))
    options = kernel.DecodeOptions(scale, window, soft_cap, k is not None, sinks is not None, return_lse)
    out, lse, data = kernel.decode(
        pack_queries(q, packing), None if k is None else new_rows(k, v, pages), sinks, rows, table, pages.data,
        chunks=chunks, sizes=sizes, packing=packing, options=options, interpret=interpret,
    )  # fmt: skip
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    is_mine = (query_starts[None, :-1] == token[:, None]) & (rows[: lengths.size] > 0)[None, :]
    is_mine = jnp.any(is_mine, axis=1)[:, None]  # [T, 1]
    out = jnp.where(is_mine[..., None], unpack_rows(out, packing)[..., -head_dim:], jnp.zeros((), q.dtype))
    if return_lse:
        lse = jnp.where(is_mine, unpack_rows(lse[..., 0], packing), -jnp.inf)
    return AttentionResult(out, dataclasses.replace(pages, data=data), lse if return_lse else None)
