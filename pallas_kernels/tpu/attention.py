"""From the arguments of `paged_attention` to the operands of the TPU kernels, and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.merge import merge_states
from pallas_kernels.pages import LANES, SUBLANES, Pages, is_mapped, is_stacked, quantise
from pallas_kernels.platform import target_device_kind
from pallas_kernels.reference import AttentionResult
from pallas_kernels.sharing import FEWEST_ROWS, RUN, Runs, Sharing, runs_of
from pallas_kernels.tpu import decode as kernel
from pallas_kernels.tpu import prefill as prefill_kernel
from pallas_kernels.tpu import tasks, walk
from pallas_kernels.tpu.blocks import (
    ALL_COUNTS,
    SHORT_REST,
    SMALL_GROUP,
    decode_sizes,
    prefill_kernels,
    prefill_sizes,
    whole_heads,
)
from pallas_kernels.tpu.heads import pack_heads, pack_queries, pad_group, unpack_outputs, unpack_rows
from pallas_kernels.tpu.memory import IDS
from pallas_kernels.tpu.tasks import PrefillSizes


def page_chunks(ids: Array) -> tuple[Array, int]:
    """A page table `[B, M]` as rows of whole chunks, flat, and the chunks of a row."""
    max_pages = ids.shape[1]
    chunks = -(-max_pages // IDS)
    ids = jnp.pad(ids, ((0, 0), (0, chunks * IDS - max_pages)))
    return ids.reshape(-1), chunks


def decode_rows(
    lengths: Array, query_starts: Array, ids: Array, sizes: walk.DecodeSizes, first_key: Array | None
) -> Array:
    """The scalars of each row that the decode kernel needs; rows without exactly one new token sit out.

    Args:
        ids: int32 `[B, M]`, the page table, 0 where there is no page.
        first_key: int32 `[B]`, the first position that a row's query sees; None: 0.
    """
    tokens, page_size = sizes.tokens, sizes.page_size
    length = jnp.where(query_starts[1:] - query_starts[:-1] == 1, jnp.maximum(lengths, 0), 0)
    last = jnp.maximum(length - 1, 0)
    first = jnp.zeros_like(length) if first_key is None else jnp.minimum(jnp.maximum(first_key, 0), last)
    first_block, last_block = first // tokens, last // tokens
    row = jnp.arange(length.size, dtype=jnp.int32)
    column = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    needed = (column >= (first // page_size)[:, None]) & (column <= (last // page_size)[:, None])
    fields = {
        walk.TABLE_ROW: row,
        walk.LENGTH: length,
        walk.TOKEN: query_starts[:-1],
        walk.FIRST_KEY: first,
        walk.FIRST_BLOCK: first_block,
        walk.FIRST_PAGE: first % tokens // page_size,
        walk.LAST_PAGE: last % tokens // page_size,
        walk.LAST_SLOT: last % page_size,
        walk.HOLES: jnp.any(needed & (ids == 0), axis=1).astype(jnp.int32),
    }
    rows = jnp.stack([fields[i] for i in range(walk.FIELDS)])
    active = length > 0
    num_items = jnp.sum(jnp.where(active, last_block + 1 - first_block, 0), dtype=jnp.int32)
    return jnp.concatenate([active_first(rows, active), num_items[None]])


def in_window(lengths: Array, ids: Array, page_size: int, window: int) -> tuple[Array, Array, Array]:
    """Decode with a window, as decode of a shorter page table: that of the pages which the window touches.

    Its blocks then start with the first of these pages, so that a short window takes one small block.

    Returns:
        Of each row the tokens from that page on, int32 `[B]`; its page ids, int32 `[B, pages]`; and the first position
        that its query sees, int32 `[B]`, counted from that page.
    """
    num_pages = min(ids.shape[1], -(-(window - 1) // page_size) + 1)
    first_key = jnp.maximum(lengths - window, 0)
    first_page = first_key // page_size
    column = first_page[:, None] + jnp.arange(num_pages, dtype=jnp.int32)[None, :]
    ids = jnp.take_along_axis(ids, jnp.minimum(column, ids.shape[1] - 1), axis=1)
    return lengths - first_page * page_size, ids, first_key - first_page * page_size


def active_first(rows: Array, active: Array) -> Array:
    """Fields `[F, B]`, flattened, with the rows that take part first; after them the number of these rows.

    It is cheaper than a sort, and done once a step for all layers.
    """
    row = jnp.arange(active.size, dtype=jnp.int32)
    rank = jnp.sum((row[None, :] < row[:, None]) & active[None, :], axis=1, dtype=jnp.int32)
    is_nth = (rank[None, :] == row[:, None]) & active[None, :]
    rows = jnp.sum(jnp.where(is_nth[None], rows[:, None, :], 0), axis=2)
    return jnp.concatenate([rows.reshape(-1), jnp.sum(active, dtype=jnp.int32)[None]])


def prompts(lengths: Array, query_starts: Array) -> tuple[Array, Array, Array]:
    """Of each row: its first token that is not inert (of negative position), how many follow, whether several came."""
    num_tokens = jnp.diff(query_starts)
    inert = jnp.maximum(num_tokens - lengths, 0)
    return query_starts[:-1] + inert, num_tokens - inert, (num_tokens > 1) & (lengths > 0)


def prefill_rows(lengths: Array, query_starts: Array, ids: Array, sizes: PrefillSizes, counts: range) -> Array:
    """The scalars of each row that a prefill kernel needs; rows with other counts of new tokens sit out."""
    first, count, active = prompts(lengths, query_starts)
    active &= (counts.start <= count) & (count < counts.stop)
    column = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    needed = column * sizes.page_size < lengths[:, None]
    fields = {
        tasks.TABLE_ROW: jnp.arange(lengths.size, dtype=jnp.int32),
        tasks.LENGTH: lengths,
        tasks.TOKEN: first,
        tasks.NUM_TOKENS: count,
        tasks.HOLES: jnp.any(needed & (ids == 0), axis=1).astype(jnp.int32),
        tasks.FIRST: lengths - count,
    }
    return active_first(jnp.stack([fields[i] for i in range(tasks.FIELDS)]), active)


def is_prefilled(lengths: Array, query_starts: Array, num_tokens: int) -> Array:
    """Which tokens belong to sequences with several new tokens."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    first, count, active = (x[None] for x in prompts(lengths, query_starts))
    return jnp.any((first <= token) & (token < first + count) & active, axis=1)


def prefill(
    out: Array, lse: Array | None, pages: Pages, page_table: Array, lengths: Array, query_starts: Array, *,
    scale: float, window: int | None, soft_cap: float | None, sinks: Array | None, max_query_len: int,
    sizes: PrefillSizes | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Attention for the tokens of sequences with several new tokens, which their pages hold already.

    Args:
        out: `[T, N, H]`, the queries of those tokens, and what the others have; lse: float32 `[T, N]`, or None.
        sizes: None (the heuristic of blocks.py) or explicit block sizes.

    Returns:
        out and lse, with those tokens' in them.
    """
    if sizes is None:
        dtype = compute_dtype(out, pages)
        max_pages = page_table.shape[1]
        kernels = prefill_kernels(pages, out.shape[1], lengths.size, max_query_len, max_pages, window, dtype)
    else:
        kernels = [(sizes, ALL_COUNTS)]
    lengths = jnp.minimum(lengths, page_table.shape[1] * pages.page_size)
    ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
    kernels = [(sizes, prefill_rows(lengths, query_starts, ids, sizes, counts)) for sizes, counts in kernels]
    options = prefill_kernel.PrefillOptions(
        scale, window, soft_cap, sinks is not None, lse is not None, causal=True, quantised=pages.scales is not None
    )
    is_query = is_prefilled(lengths, query_starts, out.shape[0])
    return _run_prefill(out, is_query, lse, sinks, kernels, ids, pages, options)


def group_rows(runs: Runs, ids: Array, sizes: PrefillSizes) -> Array:
    """The scalars of the prefill kernel for the large groups of each level; the queries are those of `runs.row`."""
    (num_levels, num_rows), num_places = runs.size.shape, runs.row.shape[1]
    level = jnp.arange(num_levels, dtype=jnp.int32)[:, None]
    token = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, None, :] * sizes.page_size  # the first of each page
    needed = (token >= runs.begin[..., None]) & (token < runs.end[..., None])
    fields = {
        tasks.TABLE_ROW: jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32), runs.size.shape),
        tasks.LENGTH: runs.end,
        tasks.TOKEN: level * num_places + runs.place,
        tasks.NUM_TOKENS: runs.size,
        tasks.HOLES: jnp.any(needed & (ids == 0)[None], axis=2).astype(jnp.int32),
        tasks.FIRST: runs.begin,
    }
    active = runs.leads & (runs.size > SMALL_GROUP)
    return active_first(jnp.stack([fields[i].reshape(-1) for i in range(tasks.FIELDS)]), active.reshape(-1))


def chunk_rows(runs: Runs) -> tuple[Array, Array, Array]:
    """Small groups, `RUN` rows at a time, as rows of the decode kernel.

    Returns:
        Of each chunk, int32 `[levels * P // RUN]`: a row whose pages it reads, the first token and the end of these; 0
        for all of them where it has none.
    """
    first = runs.row[:, ::RUN]
    row = jnp.maximum(first, 0)
    begin, end, size = (jnp.take_along_axis(x, row, axis=1) for x in (runs.begin, runs.end, runs.size))
    is_small = (first >= 0) & (size <= SMALL_GROUP)
    begin, end = (jnp.where(is_small, x, 0).reshape(-1) for x in (begin, end))
    return row.reshape(-1), begin, end


def attend_to_groups(
    q: Array, pages: Pages, page_table: Array, runs: Runs, *, scale: float, soft_cap: float | None
) -> tuple[Array, Array, Pages]:
    """Attention of each row's query to what its groups share.

    The rows of a small group are more query heads of one row of the decode kernel, which reads the pages once for
    `RUN` of them. A large one is a task of the prefill kernel.

    Args:
        q: `[B, N, H]`, a query of each row.
        page_table: int32 `[B, M]`.

    Returns:
        out `[levels, B, N, H]` and lse, where a row is in no group, anything and -inf; and the pages, to go on with.
    """
    num_rows, num_heads, head_dim = q.shape
    num_levels, num_places = runs.row.shape
    queries = q[jnp.maximum(runs.row, 0).reshape(-1)]
    # [chunk, RUN, K, G, H] -> [chunk, K, RUN * G, H]
    by_head = (-1, RUN, pages.num_kv_heads, num_heads // pages.num_kv_heads)
    table_row, begin, end = chunk_rows(runs)
    small = decode(
        queries.reshape(*by_head, head_dim).swapaxes(1, 2).reshape(-1, RUN * num_heads, head_dim), None, None, pages,
        page_table[table_row], end, jnp.arange(end.size + 1, dtype=jnp.int32),
        scale=scale, window=None, soft_cap=soft_cap, sinks=None, return_lse=True, first_key=begin, name="paged_group",
    )  # fmt: skip
    assert small.lse is not None
    pages = small.pages  # the same memory; XLA would copy the pages if the old ones were read after the kernel

    def of_rows(x: Array) -> Array:
        """From places to rows."""
        x = x.reshape(num_levels, num_places, *x.shape[1:])
        return jnp.stack([x[i, jnp.minimum(runs.place[i], num_places - 1)] for i in range(num_levels)])

    def from_chunks(x: Array) -> Array:
        x = x.reshape(-1, by_head[2], RUN, by_head[3], *x.shape[2:]).swapaxes(1, 2)
        return of_rows(x.reshape(num_levels * num_places, num_heads, *x.shape[4:]))

    out, lse = from_chunks(small.out), from_chunks(small.lse)
    if num_rows > SMALL_GROUP:
        max_pages = page_table.shape[1]
        sizes = prefill_sizes(pages, num_heads, num_rows, max_pages, None, compute_dtype(q, pages))
        ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
        options = prefill_kernel.PrefillOptions(
            scale, None, soft_cap, sinks=False, lse=True, causal=False, quantised=pages.scales is not None
        )
        nothing, everyone = jnp.full(queries.shape[:2], -jnp.inf, jnp.float32), jnp.ones(len(queries), bool)
        rows = group_rows(runs, ids, sizes)
        large_out, large_lse = _run_prefill(queries, everyone, nothing, None, [(sizes, rows)], ids, pages, options)
        assert large_lse is not None
        is_large = runs.size > SMALL_GROUP
        out = jnp.where(is_large[..., None, None], of_rows(large_out), out)
        lse = jnp.where(is_large[..., None], of_rows(large_lse), lse)
    return out, jnp.where((runs.size > 0)[..., None], lse, -jnp.inf), pages


def rests_are_short(runs: Runs, lengths: Array, is_one: Array) -> Array:
    """Whether what the rows have of their own is so short that small items read it faster."""
    own = jnp.where(is_one, lengths - runs.rest, 0)
    return jnp.sum(own, dtype=jnp.int32) <= SHORT_REST * jnp.sum(is_one, dtype=jnp.int32)


def decode_shared(
    q: Array, k: Array | None, v: Array | None, pages: Pages, page_table: Array, lengths: Array, query_starts: Array,
    *, sharing: Sharing, scale: float, soft_cap: float | None, sinks: Array | None, return_lse: bool,
    window: int | None = None,
) -> AttentionResult:  # fmt: skip
    """`decode`, with the pages that groups of rows share read once for each group, then the rest of each row."""
    if lengths.size < FEWEST_ROWS or window is not None:
        return decode(
            q, k, v, pages, page_table, lengths, query_starts,
            scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    is_one = (jnp.diff(query_starts) == 1) & (lengths > 0)
    lengths = jnp.minimum(lengths, page_table.shape[1] * pages.page_size)
    runs = runs_of(sharing, lengths, is_one, pages.page_size)
    of_rest = partial(
        decode, q, k, v, pages, page_table, lengths, query_starts,
        scale=scale, window=None, soft_cap=soft_cap, sinks=sinks, return_lse=True, first_key=runs.rest,
    )  # fmt: skip
    of_short_rest = partial(of_rest, item_tokens=LANES, name="paged_rest")
    if page_table.shape[1] * pages.page_size <= SHORT_REST:
        rest = of_short_rest()
    else:
        rest = jax.lax.cond(rests_are_short(runs, lengths, is_one), of_short_rest, of_rest)
    token = jnp.minimum(query_starts[:-1], q.shape[0] - 1)
    out, lse, pages = attend_to_groups(q[token], rest.pages, page_table, runs, scale=scale, soft_cap=soft_cap)
    assert rest.lse is not None
    merged, merged_lse = rest.out[token].astype(jnp.float32), rest.lse[token]
    for level_out, level_lse in zip(out, lse, strict=True):
        merged, merged_lse = merge_states(merged, merged_lse, level_out, level_lse)
    target = jnp.where(is_one, token, q.shape[0] + jnp.arange(token.size))  # past the end: dropped
    merged = rest.out.at[target].set(merged.astype(q.dtype), mode="drop", unique_indices=True)
    merged_lse = rest.lse.at[target].set(merged_lse, mode="drop", unique_indices=True)
    return AttentionResult(merged, pages, merged_lse if return_lse else None)


def _run_prefill(
    out: Array, is_query: Array, lse: Array | None, sinks: Array | None, kernels: list[tuple[PrefillSizes, Array]],
    ids: Array, pages: Pages, options: prefill_kernel.PrefillOptions,
) -> tuple[Array, Array | None]:  # fmt: skip
    """The prefill kernels, from and to heads as the model has them: where they fill registers, without a copy."""
    num_tokens, num_heads, head_dim = out.shape
    lanes, dtype = pages.data.shape[3], compute_dtype(out, pages)
    table, chunks = page_chunks(ids)
    tile_rows = SUBLANES * 4 // dtype.itemsize
    more_heads = -num_heads % tile_rows
    new = out.astype(dtype)
    if lanes > head_dim:  # a query beside zeros, as a key lies beside its value; an output where the values are
        beside = jnp.where(is_query[:, None, None], 0, new)
        new = jnp.concatenate([jnp.pad(new, ((0, 0), (0, 0), (0, lanes - 2 * head_dim))), beside], axis=2)
    new = jnp.pad(new, ((0, 0), (0, more_heads), (0, 0)))
    kernel_heads = whole_heads(num_heads, pages.num_kv_heads)
    if sinks is not None:
        sinks = jnp.pad(sinks.astype(jnp.float32), (0, kernel_heads - num_heads))
    blocks = kernels[0][0].head_blocks  # of heads
    if lse is not None:
        by_block = lse.reshape(num_tokens, blocks, -1).swapaxes(0, 1)
        lse = jnp.pad(by_block, ((0, 0), (0, 0), (0, -by_block.shape[2] % LANES))).reshape(
            blocks, num_tokens, -1, LANES
        )
    for sizes, rows in kernels:
        by_row = None
        if sinks is not None:
            by_head = sinks.reshape(-1, 1, sizes.interleave(dtype))
            by_row = jnp.repeat(by_head, sizes.query_tokens, axis=1).reshape(-1, sizes.rows_per_unit, 1)
            by_row = jnp.broadcast_to(by_row, (*by_row.shape[:2], LANES))
        new, new_lse = prefill_kernel.prefill(
            new, lse, by_row, rows, table, pages.data, pages.scales,
            chunks=chunks, num_heads=kernel_heads, sizes=sizes, options=options,
        )  # fmt: skip
        lse = None if lse is None else new_lse
    out = new[:, :num_heads, lanes - head_dim :].astype(out.dtype)
    if lse is None:
        return out, None
    by_block = lse.reshape(blocks, num_tokens, -1)[..., : num_heads // blocks]
    return out, by_block.swapaxes(0, 1).reshape(num_tokens, num_heads)


def new_rows(k: Array, v: Array, pages: Pages) -> Array:
    """New keys and values as rows of a page, int32 `[T, K * planes, L]`: a value in all parts of its word.

    For 8-bit pages 2 K rows follow, the bits of the scales of keys, then of values, each the same in all lanes.
    """
    scales = ()
    if pages.scales is not None:
        (k, k_scale), (v, v_scale) = (quantise(x, pages.dtype) for x in (k, v))
        scales = jax.lax.bitcast_convert_type(jnp.concatenate([k_scale, v_scale], axis=1), jnp.int32)
        scales = (jnp.broadcast_to(scales[..., None], (*scales.shape, pages.data.shape[3])),)
    k, v = k.astype(pages.data.dtype), v.astype(pages.data.dtype)
    if is_stacked(pages):
        rows = jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * k.shape[1], k.shape[2])
    else:
        rows = jnp.concatenate([k, v], axis=2)
    bits = 8 * rows.dtype.itemsize
    words = jax.lax.bitcast_convert_type(rows, f"uint{bits}").astype(jnp.uint32)
    words = words * jnp.uint32(sum(1 << at for at in range(0, 32, bits)))
    return jnp.concatenate([jax.lax.bitcast_convert_type(words, jnp.int32), *scales], axis=1)


def compute_dtype(q: Array, pages: Pages):
    """The dtype of the products: that of q if the pages are quantised, else the wider of both."""
    return q.dtype if pages.scales is not None else max(q.dtype, pages.dtype, key=lambda dtype: dtype.itemsize)


def decode(
    q: Array, k: Array | None, v: Array | None, pages: Pages, page_table: Array, lengths: Array, query_starts: Array,
    *, scale: float, window: int | None, soft_cap: float | None, sinks: Array | None, return_lse: bool,
    first_key: Array | None = None, item_tokens: int | None = None, sizes: walk.DecodeSizes | None = None,
    name: str = "paged_decode",
) -> AttentionResult:  # fmt: skip
    """`paged_attention` for the sequences that have exactly one new token; 0 for all other tokens.

    Args:
        first_key: int32 `[B]`, the first position that a row's query sees, where there is no window; None: 0.
        item_tokens: the most in an item; None: as many as a row can have.
        sizes: None (the heuristic of blocks.py) or explicit block sizes.
        name: of the kernel.
    """
    num_tokens, num_heads, head_dim = q.shape
    packing = pack_heads(num_heads, pages.num_kv_heads, head_dim, pages.data.shape[3])
    lengths = jnp.minimum(lengths, page_table.shape[1] * pages.page_size)
    ids = jnp.where(is_mapped(page_table, pages), page_table, 0)
    if window is not None:
        assert first_key is None
        lengths, ids, first_key = in_window(lengths, ids, pages.page_size, window)
    if sizes is None:
        sizes = decode_sizes(pages, ids.shape[1], packing, target_device_kind(), item_tokens)
    num_pages = sizes.pages_per_item
    assert IDS % num_pages == 0 or -(-ids.shape[1] // num_pages) * num_pages <= IDS, (ids.shape, sizes)
    rows = decode_rows(lengths, query_starts, ids, sizes, first_key)
    table, chunks = page_chunks(ids)
    if sinks is not None:
        sinks = pad_group(sinks.astype(jnp.float32)[None], packing).reshape(packing.rows, 1)
        sinks = jnp.broadcast_to(sinks, (packing.rows, LANES))
    options = kernel.DecodeOptions(
        scale, first_key is not None, soft_cap,
        append=k is not None, sinks=sinks is not None, lse=return_lse, quantised=pages.scales is not None, name=name,
    )  # fmt: skip
    new = None if k is None or v is None else new_rows(k, v, pages)
    out, lse, data, scales = kernel.decode(
        pack_queries(q.astype(compute_dtype(q, pages)), packing), new, sinks, rows, table,
        pages.data, pages.scales, chunks=chunks, sizes=sizes, packing=packing, options=options,
    )  # fmt: skip
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    takes_part = (query_starts[1:] - query_starts[:-1] == 1) & (lengths > 0)
    is_mine = jnp.any((query_starts[None, :-1] == token[:, None]) & takes_part[None, :], axis=1)[:, None]
    out = jnp.where(is_mine[..., None], unpack_outputs(out, packing), 0).astype(q.dtype)
    if return_lse:
        lse = jnp.where(is_mine, unpack_rows(lse.reshape(num_tokens, -1)[:, : packing.rows], packing), -jnp.inf)
    new_pages = Pages(data, None if pages.scales is None else scales, pages.page_size)
    return AttentionResult(out, new_pages, lse if return_lse else None)


def decode_some(
    q: Array, k: Array | None, v: Array | None, pages: Pages, page_table: Array, lengths: Array, query_starts: Array,
    others: Array, *, sharing: Sharing | None, return_lse: bool, **options: Any,
) -> AttentionResult:  # fmt: skip
    """`decode` where most tokens belong to other sequences: those of the sequences with one are gathered first.

    Args:
        sharing: which sequences share pages, if they do.
        others: `[T, N, H]`, what to return for the tokens of those sequences; 0 for all other tokens.
    """
    num_tokens, num_rows = q.shape[0], lengths.size
    run = decode if sharing is None else partial(decode_shared, sharing=sharing)
    if num_tokens <= num_rows:
        result = run(q, k, v, pages, page_table, lengths, query_starts, return_lse=return_lse, **options)
        return result._replace(out=result.out + others)
    is_one = query_starts[1:] - query_starts[:-1] == 1
    token = jnp.minimum(query_starts[:-1], num_tokens - 1)
    q, (k, v) = q[token], (None if x is None else x[token] for x in (k, v))
    starts = jnp.arange(num_rows + 1, dtype=jnp.int32)
    lengths = jnp.where(is_one, lengths, 0)
    some = run(q, k, v, pages, page_table, lengths, starts, return_lse=return_lse, **options)
    # Rows without a token of their own aim past the end, each at another place.
    target = jnp.where(is_one, token, num_tokens + starts[:-1])

    def spread(x: Array, everyone: Array) -> Array:
        return everyone.at[target].set(x, mode="drop", unique_indices=True)

    nothing = jnp.full(others.shape[:2], -jnp.inf)
    lse = None if some.lse is None else spread(some.lse, nothing)
    return AttentionResult(spread(some.out, others), some.pages, lse)
