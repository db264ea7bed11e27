"""Attention of many queries over the pages of one sequence: prefill, chunks, and groups that share pages.

A block takes 64 rows of queries of one head for each of its two or three computing warpgroups, and streams the
sequence's keys and values past them; another warpgroup moves pages. While one takes the softmax another has the tensor
cores. From FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608). README.md has the reasons and the numbers.
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

from pallas_kernels.gpu.hardware import is_interpreted, shared_memory_per_block
from pallas_kernels.gpu.layout import ACC, LANES, ROWS, clear, drain, spread, swizzled
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
from pallas_kernels.gpu.schedule import RowItems
from pallas_kernels.pages import numbers
from pallas_kernels.softmax import LOG2E

WARPGROUP_ROWS = 64
RAW_STAGES = 2  # 8-bit tiles of values on their way
OUT_LANES = 32  # of the result that are staged at a time
LSE_LANES = 8  # of the log-sum-exp in memory: the narrowest tile that a warpgroup can hold


class RowTile(NamedTuple):
    """The static sizes of the kernel.

    Args:
        warpgroups: that compute, each 64 rows.
        tokens: keys a step.
        stages: steps of keys and values in flight.
        ids: page ids staged at a time.
        registers: of a thread of the warpgroups that compute, and of the one that moves: what all start with.
        rows_per_query: consecutive rows that stand for heads of one query.
    """

    warpgroups: int
    tokens: int
    stages: int
    ids: int
    registers: tuple[int, int]
    rows_per_query: int

    @property
    def rows(self) -> int:
        """Of a block."""
        return self.warpgroups * WARPGROUP_ROWS


class Keys(NamedTuple):
    """The keys of an item, as in `RowItems`."""

    sequence: Any
    first_tile: Any
    num_tiles: Any
    end: Any


def row_tile(head_dim: int, page_size: int, max_pages: int, dtype: Any, rows_per_query: int) -> RowTile:
    """The sizes for head size H, pages of S tokens of a dtype and M columns of the table: as many stages as fit."""
    is_whole = 128 % page_size == 0 or page_size % 128 == 0
    is_quantised = jnp.dtype(dtype).itemsize == 1
    has_room = head_dim <= 128 and dtype != jnp.int8  # registers: int8 takes two sums
    tokens = 128 if is_whole and has_room else 64
    warpgroups = 3 if head_dim == 64 else 2  # products of 64 lanes are short: two softmaxes take longer
    fixed = warpgroups * WARPGROUP_ROWS * (2 * head_dim + 4 * OUT_LANES + 4 * LSE_LANES)  # queries, result, log-sum-exp
    fixed += 8192  # ids, sums across warps, barriers, alignment
    stage = 2 * 2 * tokens * head_dim
    if is_quantised:
        fixed += RAW_STAGES * tokens * head_dim
        stage += 4 * math.prod(scale_buffer(page_size, tokens)) - tokens * head_dim  # keys stay as they are
    stages = (shared_memory_per_block(1) - fixed) // stage
    registers = {64: (160, 32), 256: (232, 40)}.get(head_dim, (216, 72) if is_quantised else (208, 88))
    ids = min(256, -(-max_pages // 32) * 32)
    return RowTile(warpgroups, tokens, min(stages, 4), ids, registers, rows_per_query)


def attend_rows(
    q: Float[Array, "R N H"],
    data: Array,
    scales: Float[Array, "P K _"] | None,
    page_table: Int32[Array, "B M"],
    items: RowItems,
    sinks: Float[Array, " N"] | None,
    *,
    page_size: int,
    tile: RowTile,
    num_parts: int,
    scale: float,
    soft_cap: float | None,
    window: int | None,
) -> tuple[Float[Array, "parts R N H"], Float[Array, "parts R N 8"]]:
    """Attention of each item's rows over its tiles.

    Args:
        q: `[R, N, H]`, N a multiple of the pages' heads.
        data: the pages.
        scales: theirs, or None.
        page_table: `[B, M]`, M a multiple of `tile.ids`.
        items: the work.
        sinks: float32 `[N]` or None; for a single part only.
        page_size: S.
        tile: sizes.
        num_parts: of the keys, each with its own result.
        scale: of the scores.
        soft_cap: or None.
        window: or None.

    Returns:
        The mean of the values, in q's dtype or, where there are several parts, float32, and the natural log of the
        softmax denominator in each of 8 lanes. Rows of no item are not written.
    """
    num_rows, num_heads, head_dim = q.shape
    num_pages, num_kv_heads = data.shape[:2]
    is_stacked = data.shape[2] == 2 * page_size
    warpgroups, tokens, stages = tile.warpgroups, tile.tokens, tile.stages
    copy_tokens = min(page_size, tokens)
    copies = tokens // copy_tokens
    all_mapped = (1 << copies) - 1
    is_quantised = scales is not None
    scale_copies = (copies if page_size <= tokens else 2) if is_quantised else 0
    wide = q.dtype  # of weights, and of values for the tensor core
    out_dtype = wide if num_parts == 1 else jnp.float32
    row_layout, token_layout = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
    score_scale = scale * LOG2E if soft_cap is None else scale / soft_cap
    q_parts, num_sums, inputs = q[None], 1, []
    if scales is not None:
        data = numbers(data)
        high, low, q_scales = split_queries(q, data.dtype)
        q_parts = jnp.stack([high, low])
        num_sums = 1 if STEP[data.dtype.name] == 1 else 2
        q_scales = jnp.pad(q_scales.T * score_scale, ((0, 0), (0, tile.rows)))  # blocks begin anywhere
        inputs += [q_scales, view_scales(scales)]
    if sinks is not None:
        inputs.append(sinks)

    def kernel(q_ref, data_ref, table_ref, items_ref, *refs):
        none: Any = None  # what only 8-bit pages have
        (q_scales_ref, scales_ref), refs = ((none, none), refs) if scales is None else (refs[:2], refs[2:])
        sinks_ref, refs = (None, refs) if sinks is None else (refs[0], refs[1:])
        (out_ref, lse_ref, q_smem, k_smem, v_smem, ids_smem, mapped_smem, out_smem, lse_smem,
         q_bar, k_bar, v_bar, ids_bar, tail_bar, turn_bar, k_free, v_free, *refs) = refs  # fmt: skip
        scale_smem, raw_smem, raw_bar = refs if refs else (none, none, none)
        head, item = lax.axis_index("head"), lax.axis_index("item")
        warpgroup = lax.axis_index("warpgroup")

        def word(field):
            """A field of the item, read where it is used: that keeps it out of the registers until then."""
            return items_ref[item, RowItems._fields.index(field)]

        def find_keys():
            return Keys(*(word(field) for field in Keys._fields))

        kv_head = lax.div(head, jnp.int32(num_heads // num_kv_heads))

        def find_pages(i, keys):
            """The pages of tile i (the null page where there is none), a bit for each that exists, the first slot."""
            tile_position = (keys.first_tile + i) * tokens
            column = lax.div(tile_position, jnp.int32(page_size))
            id_block = lax.div(column, jnp.int32(tile.ids))

            @pl.when((i == 0) | (tile_position == id_block * (tile.ids * page_size)))
            def _():
                plgpu.commit_smem()  # all warps have read the old ids
                source = table_ref.at[keys.sequence, pl.ds(id_block * tile.ids, tile.ids)]
                plgpu.copy_gmem_to_smem(source, ids_smem, ids_bar)
                plgpu.barrier_wait(ids_bar)

            mapped, pages = jnp.int32(0), []
            for j in range(copies):
                page = ids_smem[column - id_block * tile.ids + j]
                is_mapped = (page > 0) & (page < num_pages)
                mapped = mapped | jnp.where(is_mapped, jnp.int32(1 << j), jnp.int32(0))
                pages.append(jnp.where(is_mapped, page, jnp.int32(0)))
            return pages, mapped, lax.rem(tile_position, jnp.int32(page_size)) if page_size > tokens else 0

        def load(part, pages, first_slot, target, bar):
            def copy(j):
                if is_stacked:
                    source = data_ref.at[pages[j], kv_head, pl.ds(part * page_size + first_slot, copy_tokens)]
                else:
                    lanes = pl.ds(part * head_dim, head_dim)
                    source = data_ref.at[pages[j], kv_head, pl.ds(first_slot, copy_tokens), lanes]
                plgpu.copy_gmem_to_smem(source, target.at[pl.ds(j * copy_tokens, copy_tokens)], bar)

            spread(copy, [(j,) for j in range(copies)])

        def exists(token, i, keys, mapped):
            """Which tokens of tile i exist."""
            is_mapped = (lax.shift_right_logical(mapped, token // copy_tokens) & 1) == 1
            return is_mapped & (token < keys.end - (keys.first_tile + i) * tokens)

        def wait_for_room(i, free):
            @pl.when(i >= stages)
            def _():
                plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])

        def fetch(i, keys):
            """Issues the copies of a tile's keys and, where they are 8 bits wide, of its scales and values."""
            slot = lax.rem(i, jnp.int32(stages))
            pages, mapped, first_slot = find_pages(i, keys)
            wait_for_room(i, k_free)
            mapped_smem[slot] = mapped
            load(0, pages, first_slot, k_smem.at[slot], k_bar.at[slot])
            if is_quantised:
                bar = k_bar.at[slot]
                load_scales(scales_ref, scale_smem.at[slot], bar, page_size, pages, kv_head, first_slot)
                raw = lax.rem(i, jnp.int32(RAW_STAGES))
                plgpu.commit_smem()  # all warps have read the values that make room
                load(1, pages, first_slot, raw_smem.at[raw], raw_bar.at[raw])
            return pages, mapped, first_slot

        def clear_tail(i, keys, mapped):
            clear(v_smem.at[lax.rem(i, jnp.int32(stages))], lambda token: exists(token, i, keys, mapped))

        def exists_all(i, keys, mapped):
            return ((keys.first_tile + i + 1) * tokens <= keys.end) & (mapped == all_mapped)

        def move_tile(i, keys):
            slot = lax.rem(i, jnp.int32(stages))
            pages, mapped, first_slot = fetch(i, keys)
            wait_for_room(i, v_free)
            is_whole = exists_all(i, keys, mapped)

            @pl.when(is_whole)
            def _():
                load(1, pages, first_slot, v_smem.at[slot], v_bar.at[slot])

            @pl.when(jnp.logical_not(is_whole))
            def _():
                load(1, pages, first_slot, v_smem.at[slot], tail_bar)
                plgpu.barrier_wait(tail_bar)
                clear_tail(i, keys, mapped)
                for _ in range(copies):
                    plgpu.barrier_arrive(v_bar.at[slot])

        def widen_values(i, keys):
            slot, raw = lax.rem(i, jnp.int32(stages)), lax.rem(i, jnp.int32(RAW_STAGES))
            plgpu.barrier_wait(raw_bar.at[raw])
            wait_for_room(i, v_free)
            widen(raw_smem.at[raw], v_smem.at[slot], ROWS, LANES)
            mapped = mapped_smem[slot]
            pl.when(jnp.logical_not(exists_all(i, keys, mapped)))(lambda: clear_tail(i, keys, mapped))
            plgpu.barrier_arrive(v_bar.at[slot])

        def move():
            plgpu.set_max_registers(tile.registers[1], action="decrease")
            place, keys = word("eighth") * 8, find_keys()
            for i in range(warpgroups):
                for part in range(q_parts.shape[0]):
                    rows = q_ref.at[part, pl.ds(place + i * WARPGROUP_ROWS, WARPGROUP_ROWS), head]
                    plgpu.copy_gmem_to_smem(rows, q_smem.at[i, part], q_bar)
            if is_quantised:

                @pl.loop(0, keys.num_tiles + 1)
                def _(i):
                    @pl.when(i < keys.num_tiles)
                    def _():
                        fetch(i, keys)

                    pl.when(i > 0)(lambda: widen_values(i - 1, keys))
            else:
                pl.loop(0, keys.num_tiles)(lambda i: move_tile(i, keys))
            drain(k_free, stages, keys.num_tiles)
            drain(v_free, stages, keys.num_tiles)

        def compute():
            plgpu.set_max_registers(tile.registers[0], action="increase")
            # My rows of the block: those of the sequence among them, and the positions of their queries.
            mine = warpgroup * WARPGROUP_ROWS
            first_row = jnp.clip(word("first_row") - mine, 0, WARPGROUP_ROWS)
            num_mine = jnp.clip(word("end_row") - mine, 0, WARPGROUP_ROWS) - first_row
            position, offset, keys = word("position"), word("offset") + mine, find_keys()
            first_tile, num_tiles = keys.first_tile, keys.num_tiles

            def position_of(row):
                return position + lax.div(offset + row, jnp.int32(tile.rows_per_query))

            lowest, highest = position_of(first_row), position_of(first_row + num_mine - 1)
            # The tiles that some row of mine sees, counted from the item's first.
            begin = jnp.int32(0)
            if window is not None:
                begin = jnp.maximum(lax.div(jnp.maximum(lowest - window + 1, 0), jnp.int32(tokens)) - first_tile, 0)
            stop = jnp.minimum(lax.div(highest, jnp.int32(tokens)) + 1 - first_tile, num_tiles)
            stop = jnp.where((num_mine > 0) & (highest >= 0), stop, 0)
            begin = jnp.minimum(begin, num_tiles)
            stop = jnp.maximum(stop, begin)

            def read_tile_scales(part, slot):
                return read_scales(scale_smem.at[slot], part, page_size, tokens, kv_head, token_layout)

            def stretch(x):
                """A number a row, or one for all of them, to multiply scores with."""
                return x if isinstance(x, float) else lax.broadcast_in_dim(x, (WARPGROUP_ROWS, tokens), [0])

            def wait_turn():
                """Until the others have issued their products: who takes a softmax leaves them the tensor cores.

                Left alone, all would take it at the same time. From FlashAttention-3, section 3.1.
                """
                plgpu.barrier_wait(turn_bar.at[warpgroup])

            def pass_turn():
                plgpu.barrier_arrive(turn_bar.at[lax.rem(warpgroup + 1, jnp.int32(warpgroups))])

            def skip_tile(i, _):
                pass_turn()
                wait_turn()
                slot = lax.rem(i, jnp.int32(stages))
                for ready, free in ((k_bar, k_free), (v_bar, v_free)):
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

            def attend_tile(i, carry):
                acc, top, total = carry
                slot = lax.rem(i, jnp.int32(stages))
                tile_position = (first_tile + i) * tokens
                plgpu.barrier_wait(k_bar.at[slot])
                mapped = mapped_smem[slot]

                def score(*acc_refs):
                    for part in range(q_parts.shape[0]):
                        acc_ref = acc_refs[part % num_sums]
                        plgpu.wgmma(acc_ref, q_smem.at[warpgroup, part], k_smem.at[slot].transpose((1, 0)))
                    pass_turn()
                    return [acc_ref[...] for acc_ref in acc_refs]

                shape = (WARPGROUP_ROWS, tokens)
                s, *low = pl.run_scoped(score, *[ACC(shape, sum_dtype(data.dtype))] * num_sums)
                v_scale = None
                if is_quantised:
                    if low:
                        s = s * STEP[data.dtype.name] + low[0]
                    s = s.astype(jnp.float32) * lax.broadcast_in_dim(read_tile_scales(0, slot), shape, [1])
                    v_scale = read_tile_scales(1, slot)
                plgpu.barrier_arrive(k_free.at[slot])
                factor = q_scale  # of the scores
                if soft_cap is not None:
                    s, factor = jnp.tanh(s * stretch(q_scale)), soft_cap * LOG2E

                def mask(s, v_scale):
                    def iota(axis):
                        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

                    token = iota(1)
                    query = position + (offset + iota(0)) // tile.rows_per_query
                    visible = (token <= query - tile_position) & exists(token, i, keys, mapped)
                    if window is not None:
                        visible &= token > query - (tile_position + window)
                    if v_scale is not None:  # that of a slot without a token may be NaN
                        column = plgpu.broadcasted_iota(jnp.int32, (tokens,), 0, layout=token_layout)
                        v_scale = jnp.where(exists(column, i, keys, mapped), v_scale, 0.0)
                    return jnp.where(visible, s, -jnp.inf), v_scale

                sees_all = (tile_position + tokens - 1 <= lowest) & (tile_position + tokens <= keys.end)
                sees_all &= mapped == all_mapped
                if window is not None:
                    sees_all &= tile_position > highest - window
                s, v_scale = lax.cond(sees_all, lambda *both: both, mask, s, v_scale)

                new_top = jnp.maximum(top, s.max(axis=1) * factor)
                safe_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # a row that has seen no key yet
                decay = jnp.exp2(top - safe_top)
                p = jnp.exp2(s * stretch(factor) - stretch(safe_top))
                total = total * decay + p.sum(axis=1)
                if v_scale is not None:
                    p = p * lax.broadcast_in_dim(v_scale, shape, [1])
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                wait_turn()
                plgpu.barrier_wait(v_bar.at[slot])
                acc = weigh(p.astype(wide), v_smem.at[slot], acc)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_top, total

            acc = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS, head_dim), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            top = jnp.full((WARPGROUP_ROWS,), -jnp.inf, jnp.float32)
            total = jnp.full((WARPGROUP_ROWS,), 0.0, jnp.float32)
            if sinks_ref is not None:
                top = lax.broadcast_in_dim(sinks_ref[head] * LOG2E, (WARPGROUP_ROWS,), ())
                total = jnp.full((WARPGROUP_ROWS,), 1.0, jnp.float32)
            top, total = plgpu.layout_cast(top, row_layout), plgpu.layout_cast(total, row_layout)
            q_scale = score_scale
            if q_scales_ref is not None:
                rows = pl.ds(word("eighth") * 8 + mine, WARPGROUP_ROWS)
                q_scale = plgpu.load(q_scales_ref.at[head, rows], layout=row_layout, optimized=False)

            plgpu.barrier_wait(q_bar)
            pl.when(warpgroup > 0)(wait_turn)
            lax.fori_loop(0, begin, skip_tile, None)
            acc, top, total = lax.fori_loop(begin, stop, attend_tile, (acc, top, total))
            lax.fori_loop(stop, num_tiles, skip_tile, None)
            pass_turn()
            pl.when(warpgroup == 0)(wait_turn)

            safe_total = jnp.where(total == 0.0, 1.0, total)
            acc = acc * lax.broadcast_in_dim(1.0 / safe_total, acc.shape, [0])
            lse = jnp.where(total == 0.0, -jnp.inf, (top + jnp.log2(safe_total)) * (1 / LOG2E))
            lse_smem.at[warpgroup][...] = lax.broadcast_in_dim(lse, (WARPGROUP_ROWS, LSE_LANES), [0])
            place, part = word("eighth") * 8 + mine, word("part")
            store_rows(lse_smem.at[warpgroup], lse_ref.at[part, :, head], first_row, num_mine, place)
            for lane in range(0, head_dim, OUT_LANES):
                if lane:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[warpgroup][...] = acc[:, lane : lane + OUT_LANES].astype(out_dtype)
                target = out_ref.at[part, :, head, pl.ds(lane, OUT_LANES)]
                store_rows(out_smem.at[warpgroup], target, first_row, num_mine, place)
            plgpu.wait_smem_to_gmem(0)

        is_used = word("end_row") > word("first_row")
        pl.when(is_used & (warpgroup < warpgroups))(compute)
        pl.when(is_used & (warpgroup == warpgroups))(move)

    scratch_types: list[Any] = [
        swizzled((warpgroups, *q_parts.shape[:1], WARPGROUP_ROWS, head_dim), q_parts.dtype),
        swizzled((stages, tokens, head_dim), data.dtype),
        swizzled((stages, tokens, head_dim), wide),
        plgpu.SMEM((tile.ids,), jnp.int32),
        plgpu.SMEM((stages,), jnp.int32),
        plgpu.SMEM((warpgroups, WARPGROUP_ROWS, OUT_LANES), out_dtype),
        plgpu.SMEM((warpgroups, WARPGROUP_ROWS, LSE_LANES), jnp.float32),
        plgpu.Barrier(num_arrivals=warpgroups * q_parts.shape[0]),
        plgpu.Barrier(num_arrivals=copies + scale_copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1 if is_quantised else copies, num_barriers=stages),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=copies),
        plgpu.Barrier(num_barriers=warpgroups),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    ]
    if is_quantised:
        scratch_types += [
            plgpu.SMEM((stages, *scale_buffer(page_size, tokens)), jnp.float32),
            swizzled((RAW_STAGES, tokens, head_dim), data.dtype),
            plgpu.Barrier(num_arrivals=copies, num_barriers=RAW_STAGES),
        ]
    fields = jnp.stack(items, axis=1)
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((num_parts, num_rows, num_heads, head_dim), out_dtype),
            jax.ShapeDtypeStruct((num_parts, num_rows, num_heads, LSE_LANES), jnp.float32),
        ),
        grid=(fields.shape[0], num_heads),
        grid_names=("item", "head"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_rows",
    )(q_parts, data, page_table, fields, *inputs)


def weigh(weights: Any, values: Any, acc: Any) -> Any:
    """`acc + weights @ values`, the weights and sums in registers.

    The one step that the interpreter cannot run as it is: there the tensor core's first operand must lie in shared
    memory, and its sums begin at 0.
    """
    if is_interpreted():
        product = jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a read of this kind is not ordered before the copy engine's next write otherwise
        return acc + product

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, weights, values)

    return pl.run_state(multiply)(ACC.init(acc))


def store_rows(source: Any, target: Any, first: Any, num_rows: Any, place: Any) -> None:
    """Stores rows `first : first + num_rows` of a shared tile that belongs at row `place` of the target.

    In copies of 64, 32, .. 1 rows: the copy engine wants their sizes to be static.
    """
    plgpu.commit_smem()
    size = WARPGROUP_ROWS
    while size:
        row = first + num_rows - lax.rem(num_rows, jnp.int32(2 * size))

        @pl.when((num_rows & size) != 0)
        def _(row=row, size=size):
            plgpu.copy_smem_to_gmem(source.at[pl.ds(row, size)], target.at[pl.ds(place + row, size)])

        size //= 2
