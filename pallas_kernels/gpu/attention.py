"""`paged_attention` on a Hopper GPU: which kernel serves which queries."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu import hardware
from pallas_kernels.gpu.decode import attend_segments, decode_tile, merge_segments, padded_group
from pallas_kernels.gpu.moves import write_pages
from pallas_kernels.gpu.rows import attend_rows, row_tile
from pallas_kernels.gpu.schedule import Queries, cut_queries, cut_rows, max_row_items
from pallas_kernels.merge import merge_states
from pallas_kernels.pages import Pages, token_places
from pallas_kernels.reference import AttentionResult
from pallas_kernels.sharing import FEWEST_ROWS, RUN, Runs, Sharing, gpu_step_pays, runs_of

MOST_PACKED_QUERIES = 32  # of a sequence: up to this many, the rows of a block are the query heads of a KV head as well
MOST_DECODE_GROUP = 16  # query heads of a KV head that the decode kernel takes
SEES_ALL = 2**30  # the position of a query that sees every key
LEAST_TILES = 4  # of keys in a part, where a sequence's keys are cut to keep every multiprocessor busy


class AttentionOptions(NamedTuple):
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
    sharing: Sharing | None,
    max_query_len: int,
    return_lse: bool,
) -> AttentionResult:
    """As `pallas_kernels.paged_attention`; the arguments are already checked, here and by `refusal`."""
    if k is not None and v is not None:
        pages = write_pages(pages, k, v, page_table, lengths, query_starts)
    options = AttentionOptions(scale, window, soft_cap, sinks)
    places = token_places(lengths, query_starts, q.shape[0])
    group = q.shape[1] // pages.num_kv_heads
    if window is not None or lengths.size < FEWEST_ROWS or group > MOST_DECODE_GROUP:
        sharing = None
    if max_query_len == 1 and group <= MOST_DECODE_GROUP and sharing is None:
        where = places.sequence, places.position
        out, lse = decode(q, pages, page_table, *where, jnp.zeros_like(places.position), options)
    else:
        out, lse = prefill(q, pages, page_table, lengths, query_starts, max_query_len, sharing, options)
        lse = jnp.where(places.position[:, None] >= 0, lse, -jnp.inf)
    # A write or copy of the pages that follows then waits for these reads, and needs no copy of the pool.
    out, lse, pages = lax.optimization_barrier((out, lse, pages))
    return AttentionResult(out, pages, lse if return_lse else None)


def prefill(
    q: Float[Array, "T N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    max_query_len: int,
    sharing: Sharing | None,
    options: AttentionOptions,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of sequences with any number of queries; those with one go to the decode kernel where it pays."""
    num_tokens, num_heads, _ = q.shape
    num_sequences, capacity = lengths.size, page_table.shape[1] * pages.page_size
    group = num_heads // pages.num_kv_heads
    is_packed = max_query_len <= MOST_PACKED_QUERIES
    decodes_apart = num_sequences > 1 and (not is_packed or sharing is not None) and group <= MOST_DECODE_GROUP

    starts, num = query_starts[:-1], jnp.diff(query_starts)
    is_decoding = (num == 1) & decodes_apart
    # The padding after the last sequence is one more run of queries, which sees nothing.
    queries = Queries(
        sequence=jnp.append(jnp.arange(num_sequences, dtype=jnp.int32), 0),
        start=query_starts,
        num=jnp.append(jnp.where(is_decoding, 0, num), num_tokens - query_starts[-1]),
        position=jnp.append(lengths - num, 0),
        end=jnp.append(jnp.minimum(lengths, capacity), 0),
    )
    if max_query_len > 1 or not decodes_apart:
        out, lse = attend_queries(q, pages, page_table, queries, options, is_packed)
    else:
        out, lse = jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    if decodes_apart:
        position = jnp.where(is_decoding, lengths - 1, -1)
        rows = q[jnp.where(is_decoding, starts, 0)]
        sequence = jnp.arange(num_sequences, dtype=jnp.int32)
        if sharing is None:
            row_out, row_lse = decode(rows, pages, page_table, sequence, position, 0 * position, options)
        else:
            row_out, row_lse = decode_shared(rows, pages, page_table, position, sharing, options)
        target = jnp.where(is_decoding, starts, num_tokens + sequence)  # past the end: dropped
        out = out.at[target].set(row_out, mode="drop", unique_indices=True)
        lse = lse.at[target].set(row_lse, mode="drop", unique_indices=True)
    return out, lse


def attend_queries(
    q: Float[Array, "T N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    queries: Queries,
    options: AttentionOptions,
    is_packed: bool,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention of runs of queries by the rows kernel.

    Packed, the rows of a block are the queries of a KV head's whole group, and its keys are read once for all of
    them; otherwise those of one query head.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = pages.num_kv_heads
    group = num_heads // num_kv_heads if is_packed else 1
    tile = row_tile(head_dim, pages.page_size, page_table.shape[1], pages.dtype, group)
    num_items = max_row_items(queries.num.size, num_tokens, group, tile.rows)
    columns = num_heads // group
    most_parts = page_table.shape[1] * pages.page_size // (LEAST_TILES * tile.tokens)
    num_parts = max(1, min(hardware.num_multiprocessors() // (num_items * columns), most_parts))
    items = cut_queries(
        queries, num_tokens, rows_per_query=group, rows_per_block=tile.rows, tokens_per_tile=tile.tokens,
        num_parts=num_parts, window=options.window,
    )  # fmt: skip
    # [T, K, G, H] -> [T * G, K, H]
    rows = q.reshape(num_tokens, columns, group, head_dim).swapaxes(1, 2).reshape(-1, columns, head_dim)
    sinks = None if options.sinks is None else options.sinks.astype(jnp.float32)
    is_merged = num_parts > 1 or (is_packed and sinks is not None)
    out, lse = attend_rows(
        rows, pages.data, pages.scales, pad_axis(page_table, 1, -page_table.shape[1] % tile.ids), items,
        None if is_merged else sinks,
        page_size=pages.page_size, tile=tile, num_parts=num_parts, scale=options.scale,
        soft_cap=options.soft_cap, window=options.window,
    )  # fmt: skip

    def unpack(x):
        x = x.reshape(num_parts, num_tokens, group, columns, -1)
        return x.swapaxes(2, 3).reshape(num_parts, num_tokens, num_heads, -1)

    out, lse = unpack(out), unpack(lse)[..., 0]
    if is_merged:
        return merge_parts(out, lse, sinks, q.dtype)
    return out[0], lse[0]


def merge_parts(
    out: Float[Array, "parts T N H"], lse: Float[Array, "parts T N"], sinks: Float[Array, " N"] | None, dtype: Any
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
    """Attention over the union of disjoint parts of the keys, and sinks."""
    top = jnp.max(lse, axis=0, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks[None, None, :])
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lse - top)  # [parts, T, N]
    total = jnp.sum(weights, axis=0, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks[None, None, :] - top)
    weights /= jnp.where(total > 0, total, 1)
    out = jnp.sum(weights[..., None] * out.astype(jnp.float32), axis=0)
    return out.astype(dtype), (top + jnp.log(total))[0]


def decode_shared(
    q: Float[Array, "B N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    position: Int32[Array, " B"],
    sharing: Sharing,
    options: AttentionOptions,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"]]:
    """`decode` where groups of sequences begin with the same pages: those are read once for each group.

    The queries of a group are rows of one attention over what it shares, each decodes the keys after that, and the
    results are merged. Where little would be saved the groups count as empty, and their blocks have nothing to do; a
    branch would have to wait for the host. From Hydragen (Juravsky et al. 2024, arXiv 2402.05099).
    """
    token_bytes = 2 * pages.num_kv_heads * pages.head_dim * jnp.dtype(pages.dtype).itemsize
    runs = runs_of(sharing, position + 1, position >= 0, pages.page_size)
    runs = where_it_pays(runs, token_bytes)
    num_levels, num_places = runs.row.shape
    queries, table = queries_of_runs(runs, page_table, pages.page_size)
    of_runs = q[jnp.maximum(runs.row, 0).reshape(-1)]
    run_out, run_lse = attend_queries(of_runs, pages, table, queries, options._replace(sinks=None), True)
    sequence = jnp.arange(len(position), dtype=jnp.int32)
    out, lse = decode(q, pages, page_table, sequence, position, runs.rest, options)
    for level, place in enumerate(runs.place):
        at = level * num_places + jnp.minimum(place, num_places - 1)
        level_lse = jnp.where((place < num_places)[:, None], run_lse[at], -jnp.inf)
        out, lse = merge_states(out, lse, run_out[at], level_lse)
    return out, lse


def queries_of_runs(runs: Runs, page_table: Int32[Array, "B M"], page_size: int) -> tuple[Queries, Int32[Array, "C M"]]:
    """Each group as a sequence whose pages are those that the group reads."""
    num_levels, num_places = runs.row.shape
    first = runs.row[:, ::RUN]
    row = jnp.maximum(first, 0)
    leads, size, begin, end = (
        jnp.take_along_axis(x, row, axis=1) for x in (runs.leads, runs.size, runs.begin, runs.end)
    )
    starts = jnp.arange(0, num_levels * num_places, RUN, dtype=jnp.int32)
    row, begin = row.reshape(-1, 1), begin.reshape(-1, 1)
    column = jnp.arange(page_table.shape[1], dtype=jnp.int32)[None, :] + begin // page_size
    queries = Queries(
        sequence=jnp.arange(starts.size, dtype=jnp.int32),
        start=starts,
        num=jnp.where((first >= 0) & leads, size, 0).reshape(-1),
        position=jnp.full_like(starts, SEES_ALL),
        end=end.reshape(-1) - begin[:, 0],
    )
    return queries, page_table[row, jnp.minimum(column, page_table.shape[1] - 1)]


def where_it_pays(runs: Runs, token_bytes: int) -> Runs:
    """The same groups, or none where reading them once saves too little to pay for the kernels that it takes."""
    others = jnp.where(runs.leads, runs.size - 1, 0).astype(jnp.float32)
    saved = jnp.sum(others * (runs.end - runs.begin).astype(jnp.float32)) * token_bytes
    pays = gpu_step_pays(saved)
    num_places = runs.row.shape[1]
    return runs._replace(
        row=jnp.where(pays, runs.row, -1),
        place=jnp.where(pays, runs.place, num_places),
        rest=jnp.where(pays, runs.rest, 0),
    )


def decode(
    q: Float[Array, "R N H"],
    pages: Pages,
    page_table: Int32[Array, "B M"],
    sequence: Int32[Array, " R"],
    position: Int32[Array, " R"],
    begin: Int32[Array, " R"],
    options: AttentionOptions,
) -> tuple[Float[Array, "R N H"], Float[Array, "R N"]]:
    """Attention of rows that each hold one query of one sequence to the keys from `begin` up to its position.

    A row with a negative position is inert.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.num_kv_heads, pages.page_size
    group = num_heads // num_kv_heads
    tile = decode_tile(group, head_dim, page_size, page_table.shape[1], pages.dtype)
    padding = padded_group(group) - group

    takes_part = position >= 0
    end = jnp.minimum(position + 1, page_table.shape[1] * page_size)
    if options.window is not None:
        begin = jnp.maximum(begin, position + 1 - options.window)
    first_tile = begin // tile.tokens
    num_tiles = jnp.where(takes_part & (end > begin), -(-end // tile.tokens) - first_tile, 0)
    num_shares = max(1, hardware.num_multiprocessors() * tile.blocks // num_kv_heads)
    schedule = cut_rows(first_tile, num_tiles, num_shares)

    rows = jnp.stack([sequence, begin, end, takes_part.astype(jnp.int32)], axis=1)
    heads = pad_axis(q.reshape(num_rows, num_kv_heads, group, head_dim), 2, padding)
    columns = -page_table.shape[1] % tile.ids
    out, lse = attend_segments(
        heads, pages.data, pages.scales, pad_axis(page_table, 1, columns), rows, schedule,
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


def refusal(q: Array, pages: Pages, **arguments: Any) -> str | None:
    """Why the kernels cannot run these arguments, or None."""
    del arguments
    if q.dtype != jnp.bfloat16:
        return f"the GPU kernels take bfloat16 queries, got {q.dtype.name}."
    if pages.dtype == jnp.float32:
        return "the GPU kernels take bfloat16, int8 or float8_e4m3fn pages, got float32."
    if pages.page_size % 64 and pages.page_size not in (8, 16, 32):
        return f"the GPU kernels take pages of 8, 16, 32 or a multiple of 64 tokens, got {pages.page_size}."
    if pages.scales is not None and pages.page_size == 8 and pages.num_kv_heads % 2:
        return (
            "the GPU kernels take quantised pages of 8 tokens with an even number of KV heads, "
            f"got {pages.num_kv_heads}."
        )
    if pages.scales is not None and pages.scales.shape[2] != 2 * pages.page_size:
        return "the GPU kernels take quantised pages whose scales are not padded: init_pages(is_padded=False)."
    return None
