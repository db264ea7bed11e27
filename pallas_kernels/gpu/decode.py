"""Decoding: one query a sequence against its pages, bound by the memory's bandwidth.

The product is taken in swapped form, K Q^T: 64 tokens are the rows of the tensor core's tile and the query heads of
a KV head its 8 or 16 columns, so that no row is padding. One warpgroup moves pages with the copy engine (one copy a
page for its keys, one for its values), the other computes. README.md has the reasons and the numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.gpu.hardware import shared_memory_per_block
from pallas_kernels.gpu.layout import ACC, clear, drain, spread, swizzled
from pallas_kernels.gpu.quantised import (
    STEP,
    load_scales,
    read_scales,
    scale_buffer,
    split_queries,
    sum_dtype,
    view_scales,
    widen,
)
from pallas_kernels.gpu.schedule import Schedule
from pallas_kernels.pages import numbers
from pallas_kernels.softmax import LOG2E

MASKED = -1e30  # a score that no key has; finite, so that a difference of two is not NaN
LSE_LANES = 32  # of a partial's log-sum-exp in memory: the copy engine moves multiples of 128 bytes
MERGE_STAGES = 4


class DecodeTile(NamedTuple):
    """The static sizes of the decode kernel.

    Args:
        tokens: keys a step.
        stages: steps of keys and values in flight.
        ids: page ids staged at a time.
        blocks: how many blocks a multiprocessor has room for.
    """

    tokens: int
    stages: int
    ids: int
    blocks: int


def decode_tile(group: int, head_dim: int, page_size: int, max_pages: int, dtype: Any) -> DecodeTile:
    """The sizes for G query heads a KV head, head size H, pages of S tokens of a dtype and M columns of the table.

    A step of 16 KiB of keys hides a step's latencies; two blocks a multiprocessor hide each other's starts. As many
    stages as then fit.
    """
    is_whole = 128 % page_size == 0 or page_size % 128 == 0
    tokens = 128 if head_dim == 64 and group <= 8 and is_whole else 64
    blocks = 2 if head_dim <= 128 else 1
    columns = padded_group(group)
    fixed = columns * (2 * 2 * head_dim + 2 * tokens + 4 * head_dim)  # queries, weights, result
    fixed += 8192  # ids, sums across warps, barriers, alignment
    itemsize = jnp.dtype(dtype).itemsize
    stage = 2 * itemsize * tokens * head_dim
    if itemsize == 1:
        fixed += 2 * tokens * head_dim  # a tile widened for the tensor core
        stage += 4 * math.prod(scale_buffer(page_size, tokens))
    stages = (shared_memory_per_block(blocks) - fixed) // stage
    return DecodeTile(tokens, min(stages, 6), min(256, -(-max_pages // 32) * 32), blocks)


def padded_group(group: int) -> int:
    """The columns that the tensor core needs for the query heads of one KV head."""
    return 8 if group <= 8 else 16


def attend_segments(
    q: Float[Array, "R K G H"],
    data: Array,
    scales: Float[Array, "P K _"] | None,
    page_table: Int32[Array, "B M"],
    rows: Int32[Array, "R 4"],
    schedule: Schedule,
    *,
    page_size: int,
    tile: DecodeTile,
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "W K H G"], Float[Array, "W K 32"]]:
    """Attention of each segment's query over its tiles, not yet merged.

    Args:
        q: `[R, K, G, H]`, G padded to 8 or 16.
        data: the pages.
        scales: theirs, or None.
        page_table: `[B, M]`, M a multiple of `tile.ids`.
        rows: `[R, 4]`: row of the page table, first visible position, end of the visible positions, 0.
        schedule: the segments.
        page_size: S.
        tile: sizes.
        scale: of the scores.
        soft_cap: or None.

    Returns:
        Each segment's mean of the values `[W, K, H, G]` and the base 2 log of its softmax denominator (in the first
        G of 32 lanes).
    """
    _, num_heads, group, head_dim = q.shape
    num_pages = data.shape[0]
    num_segments = schedule.segments.shape[0]
    num_shares = schedule.share_starts.shape[0] - 1
    is_stacked = data.shape[2] == 2 * page_size
    tokens, stages = tile.tokens, tile.stages
    copy_tokens = min(page_size, tokens)  # tokens of one copy
    copies = tokens // copy_tokens  # of the keys of a tile
    all_mapped = (1 << copies) - 1
    is_quantised = scales is not None
    scale_copies = (copies if page_size <= tokens else 2) if is_quantised else 0
    score_scale = scale * LOG2E if soft_cap is None else scale / soft_cap
    wide = q.dtype  # of weights, and of values for the tensor core
    token_layout, query_layout = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
    inputs = [page_table, rows, schedule.segments, schedule.share_starts]
    if scales is not None:
        data = numbers(data)
        high, low, q_scales = split_queries(q, data.dtype)
        q = jnp.concatenate([high, low], axis=2)
        inputs += [q_scales * score_scale, view_scales(scales)]

    def kernel(q_ref, data_ref, table_ref, rows_ref, segments_ref, starts_ref, *refs):
        (q_scales_ref, scales_ref), refs = ((None, None), refs) if scales is None else (refs[:2], refs[2:])
        (out_ref, lse_ref, q_smem, k_smem, v_smem, p_smem, ids_smem, mapped_smem, field_smem, out_smem, lse_smem,
         q_bar, k_bar, v_bar, ids_bar, q_free, k_free, v_free, *refs) = refs  # fmt: skip
        wide_smem, scale_smem = refs if refs else (None, None)
        head, share = lax.axis_index("head"), lax.axis_index("share")
        first_segment, end_segment = starts_ref[share], starts_ref[share + 1]

        def load_segment(segment, step):
            """Issues all copies of a segment; `step` counts the block's tiles."""
            row, first_tile, num_tiles = (segments_ref[segment, field] for field in range(3))
            sequence, begin, end = (rows_ref[row, field] for field in range(3))
            buffer = lax.rem(segment - first_segment, jnp.int32(2))

            @pl.when(segment - first_segment >= 2)
            def _():
                plgpu.barrier_wait(q_free.at[buffer])

            for field, value in enumerate((row, begin, end, first_tile, num_tiles)):
                field_smem[buffer, field] = value
            plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[buffer], q_bar.at[buffer])

            @pl.loop(0, num_tiles)
            def _(i):
                slot = lax.rem(step + i, jnp.int32(stages))
                position = (first_tile + i) * tokens
                column = lax.div(position, jnp.int32(page_size))
                id_block = lax.div(column, jnp.int32(tile.ids))
                is_block_start = position == id_block * (tile.ids * page_size)

                @pl.when((i == 0) | is_block_start)
                def _():
                    plgpu.commit_smem()  # all warps have read the old ids
                    source = table_ref.at[sequence, pl.ds(id_block * tile.ids, tile.ids)]
                    plgpu.copy_gmem_to_smem(source, ids_smem, ids_bar)
                    plgpu.barrier_wait(ids_bar)

                @pl.when(step + i >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])

                mapped = jnp.int32(0)
                pages = []
                for j in range(copies):
                    page = ids_smem[column - id_block * tile.ids + j]
                    is_mapped = (page > 0) & (page < num_pages)
                    mapped = mapped | jnp.where(is_mapped, jnp.int32(1 << j), jnp.int32(0))
                    pages.append(jnp.where(is_mapped, page, jnp.int32(0)))
                mapped_smem[slot] = mapped
                first_slot = lax.rem(position, jnp.int32(page_size)) if page_size > tokens else 0

                def copy(part, j):
                    smem, bar = (v_smem, v_bar) if part else (k_smem, k_bar)
                    if is_stacked:
                        source = data_ref.at[pages[j], head, pl.ds(part * page_size + first_slot, copy_tokens)]
                    else:
                        lanes = pl.ds(part * head_dim, head_dim)
                        source = data_ref.at[pages[j], head, pl.ds(first_slot, copy_tokens), lanes]
                    target = smem.at[slot, pl.ds(j * copy_tokens, copy_tokens)]
                    plgpu.copy_gmem_to_smem(source, target, bar.at[slot])

                spread(copy, [(part, j) for part in range(2) for j in range(copies)])
                if scales_ref is not None and scale_smem is not None:
                    bar = k_bar.at[slot]
                    load_scales(scales_ref, scale_smem.at[slot], bar, page_size, pages, head, first_slot)

            return step + num_tiles

        def attend_segment(segment, step):
            buffer = lax.rem(segment - first_segment, jnp.int32(2))
            plgpu.barrier_wait(q_bar.at[buffer])
            row, begin, end, first_tile, num_tiles = (field_smem[buffer, field] for field in range(5))
            q_scale: Any = None
            if q_scales_ref is not None:
                q_scale = plgpu.load(q_scales_ref.at[row, head], layout=query_layout, optimized=False)

            def attend_tile(i, carry):
                acc, top, total = carry
                slot = lax.rem(step + i, jnp.int32(stages))
                position = (first_tile + i) * tokens
                plgpu.barrier_wait(k_bar.at[slot])
                mapped = mapped_smem[slot]
                values = v_smem.at[slot]
                k_scale = v_scale = None
                if scale_smem is not None:
                    k_scale, v_scale = (
                        read_scales(scale_smem.at[slot], part, page_size, tokens, head, token_layout)
                        for part in range(2)
                    )

                def score(acc_ref):
                    plgpu.wgmma(acc_ref, k_smem.at[slot], q_smem.at[buffer].transpose((1, 0)))
                    return acc_ref[...]

                s = pl.run_scoped(score, ACC((tokens, q.shape[2]), sum_dtype(data.dtype)))
                plgpu.barrier_arrive(k_free.at[slot])
                if k_scale is None:
                    s = s * score_scale
                else:  # of the two parts of each query
                    s = (s[:, :group] * STEP[data.dtype.name] + s[:, group:]).astype(jnp.float32)
                    s = s * lax.broadcast_in_dim(k_scale, s.shape, [0]) * lax.broadcast_in_dim(q_scale, s.shape, [1])
                if soft_cap is not None:
                    s = jnp.tanh(s) * (soft_cap * LOG2E)

                def exists(token):
                    is_mapped = (lax.shift_right_logical(mapped, token // copy_tokens) & 1) == 1
                    return is_mapped & (token >= begin - position) & (token < end - position)

                visible = exists(plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA))
                s = jnp.where(visible, s, MASKED)
                new_top = jnp.maximum(top, s.max(axis=0))
                decay = jnp.exp2(top - new_top)
                p = jnp.where(visible, jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [1])), 0.0)
                total = total * lax.broadcast_in_dim(decay, s.shape, [1]) + p
                if v_scale is not None:  # that of a slot without a token may be NaN
                    p = jnp.where(visible, p * lax.broadcast_in_dim(v_scale, s.shape, [0]), 0.0)
                p_smem.transpose((1, 0))[...] = p.astype(p_smem.dtype)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_bar.at[slot])

                if wide_smem is not None:
                    widen(values, wide_smem, tokens, head_dim)
                    values = wide_smem
                is_whole = (begin <= position) & (position + tokens <= end) & (mapped == all_mapped)
                pl.when(jnp.logical_not(is_whole))(lambda: clear(values, exists))

                def weigh(acc_ref):
                    plgpu.wgmma(acc_ref, values.transpose((1, 0)), p_smem.transpose((1, 0)))
                    return acc_ref[...]

                update = pl.run_scoped(weigh, ACC((head_dim, group), jnp.float32))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc * lax.broadcast_in_dim(decay, acc.shape, [1]) + update, new_top, total

            acc = jnp.full((head_dim, group), 0.0, jnp.float32)
            top = jnp.full((group,), MASKED, jnp.float32)
            total = plgpu.layout_cast(jnp.full((tokens, group), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            acc, top, total = lax.fori_loop(0, num_tiles, attend_tile, (acc, top, total))
            plgpu.barrier_arrive(q_free.at[buffer])
            total = total.sum(axis=0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            safe_total = jnp.where(total == 0.0, 1.0, total)
            out_smem[...] = acc / lax.broadcast_in_dim(safe_total, acc.shape, [1])
            lse_smem[pl.ds(0, group)] = jnp.where(total == 0.0, MASKED, top + jnp.log2(safe_total))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_ref.at[segment, head])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[segment, head])
            return step + num_tiles

        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            lax.fori_loop(first_segment, end_segment, attend_segment, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _():
            num_tiles = lax.fori_loop(first_segment, end_segment, load_segment, jnp.int32(0))
            drain(q_free, 2, end_segment - first_segment)
            drain(k_free, stages, num_tiles)
            drain(v_free, stages, num_tiles)

    scratch_types: list[Any] = [
        swizzled((2, q.shape[2], head_dim), q.dtype),
        swizzled((stages, tokens, head_dim), data.dtype),
        swizzled((stages, tokens, head_dim), data.dtype),
        swizzled((group, tokens), wide),
        plgpu.SMEM((tile.ids,), jnp.int32),
        plgpu.SMEM((stages,), jnp.int32),
        plgpu.SMEM((2, 5), jnp.int32),
        plgpu.SMEM((head_dim, group), jnp.float32),
        plgpu.SMEM((LSE_LANES,), jnp.float32),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=copies + scale_copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    ]
    if is_quantised:
        scratch_types.append(swizzled((tokens, head_dim), wide))
        scratch_types.append(plgpu.SMEM((stages, *scale_buffer(page_size, tokens)), jnp.float32))
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_segments, num_heads, head_dim, group), jnp.float32),
            jax.ShapeDtypeStruct((num_segments, num_heads, LSE_LANES), jnp.float32),
        ),
        grid=(num_heads, num_shares),
        grid_names=("head", "share"),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
    )(q, data, *inputs)


def merge_segments(
    out: Float[Array, "W K H G"],
    lse: Float[Array, "W K 32"],
    rows: Int32[Array, "R 4"],
    row_starts: Int32[Array, " R+1"],
    sinks: Float[Array, "K G"] | None,
    dtype: Any,
) -> tuple[Float[Array, "R K G H"], Float[Array, "R K 32"]]:
    """Merges the segments of each row.

    Args:
        out: `[W, K, H, G]`, the partial results of `attend_segments`.
        lse: `[W, K, 32]`, base 2.
        rows: `[R, 4]`: as there; the last word is 1 where the row's query takes part.
        row_starts: `[R + 1]`, the segments of each row.
        sinks: float32 `[K, G]` or None.
        dtype: of the result.

    Returns:
        `[R, K, G, H]` and the natural log of each softmax denominator, in the first G of 32 lanes; 0 and -inf where
        a row saw no key.
    """
    _, num_heads, head_dim, group = out.shape
    num_rows = rows.shape[0]
    inputs = [out, lse, rows, row_starts] + ([] if sinks is None else [sinks])

    def kernel(part_ref, part_lse_ref, rows_ref, starts_ref, *refs):
        sinks_ref, refs = (None, refs) if sinks is None else (refs[0], refs[1:])
        out_ref, lse_ref, part_smem, part_lse_smem, out_smem, lse_smem, part_bar, lse_bar = refs
        head, row = lax.axis_index("head"), lax.axis_index("row")
        first_segment = starts_ref[row]
        num_parts = starts_ref[row + 1] - first_segment

        def load(i):
            slot = lax.rem(i, jnp.int32(MERGE_STAGES))
            source = part_lse_ref.at[first_segment + i, head]
            plgpu.copy_gmem_to_smem(source, part_lse_smem.at[slot], lse_bar.at[slot])
            plgpu.copy_gmem_to_smem(part_ref.at[first_segment + i, head], part_smem.at[slot], part_bar.at[slot])

        for stage in range(MERGE_STAGES):
            pl.when(stage < num_parts)(lambda stage=stage: load(jnp.int32(stage)))

        def merge(i, carry):
            acc, top, total = carry
            slot = lax.rem(i, jnp.int32(MERGE_STAGES))
            plgpu.barrier_wait(lse_bar.at[slot])
            part_lse = part_lse_smem[slot, pl.ds(0, group)]
            new_top = jnp.maximum(top, part_lse)
            decay, weight = jnp.exp2(top - new_top), jnp.exp2(part_lse - new_top)
            weight = jnp.where(part_lse == MASKED, 0.0, weight)
            plgpu.barrier_wait(part_bar.at[slot])
            part = plgpu.load(part_smem.at[slot], layout=plgpu.Layout.WGMMA, optimized=False)
            decayed = acc * lax.broadcast_in_dim(decay, acc.shape, [1])
            acc = decayed + part * lax.broadcast_in_dim(weight, acc.shape, [1])

            @pl.when(i + MERGE_STAGES < num_parts)
            def _():
                plgpu.commit_smem()  # all warps have read the part that makes room
                load(i + MERGE_STAGES)

            return acc, new_top, total * decay + weight

        acc = jnp.full((head_dim, group), 0.0, jnp.float32)
        columns = plgpu.Layout.WGMMA.reduce(0)
        top = plgpu.layout_cast(jnp.full((group,), MASKED, jnp.float32), columns)
        total = plgpu.layout_cast(jnp.full((group,), 0.0, jnp.float32), columns)
        if sinks_ref is not None:
            top = plgpu.load(sinks_ref.at[head], layout=columns, optimized=False) * LOG2E
            total += rows_ref[row, 3].astype(jnp.float32)
        acc, top, total = lax.fori_loop(0, num_parts, merge, (acc, top, total))

        safe_total = jnp.where(total == 0.0, 1.0, total)
        acc = acc / lax.broadcast_in_dim(safe_total, acc.shape, [1])
        out_smem.transpose((1, 0))[...] = acc.astype(dtype)
        seen_lse = (top + jnp.log2(safe_total)) * (1 / LOG2E)
        lse_smem[pl.ds(0, group)] = jnp.where(total == 0.0, -jnp.inf, seen_lse)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, head])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[row, head])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, num_heads, group, head_dim), dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads, LSE_LANES), jnp.float32),
        ),
        grid=(num_heads, num_rows),
        grid_names=("head", "row"),
        scratch_types=[
            plgpu.SMEM((MERGE_STAGES, head_dim, group), jnp.float32),
            plgpu.SMEM((MERGE_STAGES, LSE_LANES), jnp.float32),
            swizzled((group, head_dim), dtype),
            plgpu.SMEM((LSE_LANES,), jnp.float32),
            plgpu.Barrier(num_barriers=MERGE_STAGES),
            plgpu.Barrier(num_barriers=MERGE_STAGES),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode_merge",
    )(*inputs)
