"""The XLA implementation: what a CPU runs, and any platform without a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.pages import Pages, TokenPlaces, token_places
from pallas_kernels.reference import AttentionResult, copy_pages, refusal, write_pages
from pallas_kernels.sharing import Sharing
from pallas_kernels.xla_decode import decode_attention
from pallas_kernels.xla_prefill import prefill_attention
from pallas_kernels.xla_shared import attend_shared
from pallas_kernels.xla_tiles import Options, finish, mapped_table, merge, start, tiled_table

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
    table = mapped_table(page_table, pages)
    num_tokens = q.shape[0]
    places = token_places(lengths, query_starts, num_tokens)
    inert = (places.position < 0)[:, None]

    if max_query_len < FEWEST_BLOCK_QUERIES and num_tokens <= TOKENS_AT_ONCE:
        out, lse = attend_each(q, pages, table, places, sinks, sharing, options)
        return jnp.where(inert[..., None], 0, out).astype(q.dtype), jnp.where(inert, -jnp.inf, lse)

    # Outputs take the place of their queries, token by token: a step then holds one array of that size, not two.
    out, lse = q, jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    is_short = jnp.diff(query_starts)[places.sequence] < FEWEST_BLOCK_QUERIES
    most = min(num_tokens, lengths.size * (FEWEST_BLOCK_QUERIES - 1))
    at_once = min(most, FEW_AT_ONCE)
    most += -most % at_once
    short = jnp.flatnonzero(is_short & ~inert[:, 0], size=most, fill_value=num_tokens).astype(jnp.int32)

    def decode_some(i, carry):
        out, lse = carry
        token = jax.lax.dynamic_slice_in_dim(short, i * at_once, at_once)
        index = jnp.minimum(token, num_tokens - 1)
        position = jnp.where(token < num_tokens, places.position[index], -1)
        some = TokenPlaces(places.sequence[index], position)
        some_out, some_lse = attend_each(out[index], pages, table, some, sinks, sharing, options)
        return (
            out.at[token].set(some_out.astype(q.dtype), mode="drop"),
            lse.at[token].set(some_lse, mode="drop"),
        )

    num_short = jnp.sum(short < num_tokens, dtype=jnp.int32)
    out, lse = jax.lax.fori_loop(0, -(-num_short // at_once), decode_some, (out, lse))
    if max_query_len >= FEWEST_BLOCK_QUERIES:
        out, lse = prefill_attention(
            out, lse, pages, tiled_table(page_table, pages), lengths, query_starts, FEWEST_BLOCK_QUERIES, sinks, options
        )
    return jnp.where(inert[..., None], 0, out), lse


def attend_each(
    q: Float[Array, "T N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    places: TokenPlaces,
    sinks: Float[Array, " N"] | None,
    sharing: Sharing | None,
    options: Options,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Output in float32 and log-sum-exp of queries: together over what their rows share, one by one over the rest."""
    begin = jnp.zeros_like(places.position)
    if options.window is not None:
        begin = jnp.maximum(places.position - options.window + 1, 0)
    shared = None
    if sharing is not None:
        shared, begin = attend_shared(q, pages, page_table, places, begin, sharing, options)
    state = decode_attention(q, pages, page_table, places, begin, options)
    if shared is not None:
        state = merge(state, shared)
    if sinks is not None:
        alone = start(sinks, pages.num_kv_heads, *q.shape[1:])
        state = merge(state, jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), alone, state))
    out, lse = finish(state)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])
