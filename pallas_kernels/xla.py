"""The XLA implementation: what a CPU runs, and any platform without a kernel."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, token_places
from pallas_kernels.reference import AttentionResult, copy_pages, refusal, write_pages
from pallas_kernels.xla_decode import decode_attention
from pallas_kernels.xla_prefill import prefill_attention
from pallas_kernels.xla_tiles import Options, tiled_table

__all__ = ["copy_pages", "paged_attention", "refusal", "write_pages"]

# With fewer new tokens than this a sequence's tokens are cheaper one by one than as a mostly empty block.
FEWEST_BLOCK_QUERIES = 9


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
    del shared_prefix  # reading the prefix once for all would pay, but is not needed for the result
    if k is not None and v is not None:  # before any read, or XLA copies the pages
        pages = write_pages(pages, k, v, page_table, lengths, query_starts)
    options = Options(scale, window, soft_cap)
    table = tiled_table(page_table, pages)
    num_tokens = q.shape[0]
    places = token_places(lengths, query_starts, num_tokens)
    inert = (places.position < 0)[:, None]

    if max_query_len < FEWEST_BLOCK_QUERIES:
        out, lse = decode_attention(q, pages, table, places, sinks, options)
        out = jnp.where(inert[..., None], 0, out).astype(q.dtype)
        lse = jnp.where(inert, -jnp.inf, lse)
    else:
        out, lse = jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf)
        is_short = jnp.diff(query_starts)[places.sequence] < FEWEST_BLOCK_QUERIES
        # The few tokens of short sequences, gathered: their softmax states take memory. Past the end: nothing.
        most = min(num_tokens, lengths.size * (FEWEST_BLOCK_QUERIES - 1))
        token = jnp.flatnonzero(is_short & ~inert[:, 0], size=most, fill_value=num_tokens)
        index = jnp.minimum(token, num_tokens - 1)
        position = jnp.where(token < num_tokens, places.position[index], -1)
        few = TokenPlaces(places.sequence[index], position)
        few_out, few_lse = decode_attention(q[index], pages, table, few, sinks, options)
        out = out.at[token].set(few_out.astype(q.dtype), mode="drop")
        lse = lse.at[token].set(few_lse, mode="drop")
        out, lse = prefill_attention(
            q, out, lse, pages, table, lengths, query_starts, FEWEST_BLOCK_QUERIES, sinks, options
        )
    return AttentionResult(out, pages, lse if return_lse else None)
