"""The XLA implementation: what a CPU runs, and any platform without a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, quotient, token_places
from pallas_kernels.reference import AttentionResult, copy_pages, refusal, write_pages
from pallas_kernels.sharing import FEWEST_ROWS, Sharing
from pallas_kernels.xla_decode import decode_attention, pages_per_item
from pallas_kernels.xla_prefill import prefill_attention
from pallas_kernels.xla_shared import find_blocks
from pallas_kernels.xla_tiles import Options, finish, padded_table, pages_per_block_tile, rows_at

__all__ = ["copy_pages", "paged_attention", "refusal", "write_pages"]

# With fewer new tokens than this a sequence's tokens are cheaper one by one than as a mostly empty block.
FEWEST_BLOCK_QUERIES = 9
# Each token holds a float32 softmax state while its batch runs: more take a loop over batches.
TOKENS_AT_ONCE = 128  # when decoding
FEW_AT_ONCE = 64  # among longer sequences: their queries are gathered, too


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
    if k is not None and v is not None:  # before any read, or XLA copies the pages
        pages = write_pages(pages, k, v, page_table, lengths, query_starts)
    options = Options(scale, window, soft_cap)
    out, lse = attend_pages(q, pages, page_table, lengths, query_starts, sinks, sharing, max_query_len, options)
    # Whoever writes to these pages next now depends on the reads above; where it does not, XLA copies the pages.
    out, lse, pages = jax.lax.optimization_barrier((out, lse, pages))
    return AttentionResult(out, pages, lse if return_lse else None)


def attend_pages(
    q: Float[Array, "T N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    sinks: Float[Array, " N"] | None,
    sharing: Sharing | None,
    max_query_len: int,
    options: Options,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Output and log-sum-exp of all tokens: those of short sequences one by one, the others in blocks."""
    num_columns = page_table.shape[1]
    num_tokens, num_heads = q.shape[:2]
    table = padded_table(page_table, pages, max(pages_per_item(num_heads, pages), pages_per_block_tile(pages)))
    places = token_places(lengths, query_starts, num_tokens)
    inert = (places.position < 0)[:, None]
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, pages.num_kv_heads, -1)

    def attend_each(q: Float[Array, "n N H"], places: TokenPlaces) -> tuple[Array, Array]:
        """Output in float32 and log-sum-exp of queries: together over what they share, one by one over the rest."""
        first_page = jnp.zeros_like(places.position)
        if options.window is not None:
            first_page = quotient(jnp.maximum(places.position - options.window + 1, 0), pages.page_size)
        blocks = None
        if sharing is not None and len(q) >= FEWEST_ROWS:
            blocks = find_blocks(sharing, places, pages.page_size)
            first_page = jnp.maximum(first_page, quotient(blocks.rest, pages.page_size))
        state = decode_attention(q, pages, table, num_columns, places, first_page, blocks, options)
        out, lse = finish(state, sink)
        return out.reshape(q.shape), lse.reshape(q.shape[:2])

    if max_query_len < FEWEST_BLOCK_QUERIES and num_tokens <= TOKENS_AT_ONCE:
        out, lse = attend_each(q, places)
        return jnp.where(inert[..., None], 0, out).astype(q.dtype), jnp.where(inert, -jnp.inf, lse)

    # Outputs take the place of their queries, token by token: a step then holds one array of that size, not two.
    out, lse = q, jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    query_lens = jnp.diff(query_starts)
    num_short = jnp.cumsum(jnp.where(query_lens < FEWEST_BLOCK_QUERIES, query_lens, 0), dtype=jnp.int32)
    at_once = min(num_tokens, lengths.size * (FEWEST_BLOCK_QUERIES - 1), FEW_AT_ONCE)

    def decode_some(i, carry):
        out, lse = carry
        short = i * at_once + jnp.arange(at_once, dtype=jnp.int32)
        sequence = jnp.sum(num_short[None, :] <= short[:, None], axis=1, dtype=jnp.int32)
        exists = sequence < lengths.size
        sequence = jax.lax.optimization_barrier(jnp.minimum(sequence, lengths.size - 1))
        end, length = rows_at(query_starts, sequence + 1), rows_at(lengths, sequence)
        token = end - rows_at(num_short, sequence) + short
        position = jnp.where(exists, length - end + token, -1)
        token = jnp.where(exists, token, num_tokens)
        index = jnp.minimum(token, num_tokens - 1)
        results = attend_each(rows_at(out, index), TokenPlaces(sequence, position))
        return tuple(
            whole.at[token].set(x.astype(whole.dtype), mode="drop", wrap_negative_indices=False)
            for whole, x in zip(carry, results, strict=True)
        )

    out, lse = jax.lax.fori_loop(0, quotient(num_short[-1] + at_once - 1, at_once), decode_some, (out, lse))
    if max_query_len >= FEWEST_BLOCK_QUERIES:
        out, lse = prefill_attention(
            out, lse, pages, table, num_columns, lengths, query_starts, sinks, options,
            fewest_queries=FEWEST_BLOCK_QUERIES, most_queries=max_query_len,
        )  # fmt: skip
    return jnp.where(inert[..., None], 0, out), lse
