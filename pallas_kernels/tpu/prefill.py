"""Prefill: sequences with several new tokens each attend to their pages, which already hold those tokens.

A *task* is a block of Q tokens of one sequence and of all heads or some of them; it keeps its queries, softmax state
and output in VMEM while the keys pass by, T tokens (a *block*) at a time, each block read once a task and fetched ahead
across tasks. A block is worked off in *units*: R query rows against T keys, in one or several products, each with the
keys of one KV head. As in decode, a step of the loop holds three stages of three different units, so that the matrix
unit and the vector units work side by side:

    values(u - 2)  |  scores(u)  |  softmax(u - 1)

The pipeline runs on from block to block and drains at the end of a task. Where a stage has no unit to work on,
what it computes goes where nobody looks.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.pages import LANES, SUBLANES
from pallas_kernels.softmax import FLOOR, LOG2E, MASKED
from pallas_kernels.tpu.memory import IDS, by_rows, in_hbm, is_streamed, tiled_as_in_hbm
from pallas_kernels.tpu.products import dot, load_rows
from pallas_kernels.tpu.tasks import FIELDS, HOLES, NUM_TOKENS, TABLE_ROW, TOKEN, PrefillSizes, Tasks
from pallas_kernels.tpu.units import Units

NEVER = 1 << 30  # a position behind all others
LARGE_PRODUCT = 512 * 512  # rows times keys


@dataclasses.dataclass(frozen=True)
class PrefillOptions:
    """What a call asks for, apart from sizes."""

    scale: float
    window: int | None
    soft_cap: float | None
    sinks: bool
    lse: bool
    causal: bool
    quantised: bool = False

    @property
    def query_factor(self) -> float:
        """What queries are multiplied with, once: the scale, in base 2 or in units of the cap."""
        return self.scale * LOG2E if self.soft_cap is None else self.scale / self.soft_cap


def _kernel(rows, sinks, table, pages, scales, q_in_hbm, lse_in, out_hbm, lse_hbm, kv, scales_by_page, scales_by_head,
            front, sent, due, streamed, q_in, words, q, out, lse, m_ref, l_ref, alpha_ref, acc_ref, s_a, s_b, p_a, p_b,
            page_sem, id_sem, q_sem, out_sem, *, num_rows: int, chunks: int, streams: bool,
            num_heads: int, sizes: PrefillSizes, options: PrefillOptions):  # fmt: skip
    del q_in_hbm, lse_in  # the same memory as `out_hbm` and `lse_hbm`: a task's outputs replace its queries
    S, NP, T, Q, R = (sizes.page_size, sizes.pages_per_block, sizes.tokens, sizes.query_tokens, sizes.rows_per_unit)
    ring = sizes.blocks_in_ring
    kv = by_rows(kv, 5)
    K = kv.shape[2]  # of a task
    L = pages.shape[3]
    planes = pages.shape[2] // S  # 2: value rows below key rows; 1: side by side in the lanes
    value_row = (planes - 1) * S
    shares_tile = S % (SUBLANES * 4 // pages.dtype.itemsize) != 0  # the keys and values of a page
    num_active = rows[FIELDS * num_rows]
    tasks = Tasks(sizes, options.causal, options.window, rows, num_rows, num_active, front)
    field = tasks.field
    all_units = Units(sizes, num_heads, q_in, words, q, m_ref, l_ref, acc_ref, out, lse)
    units, interleave = q.shape[0], all_units.interleave
    steps = units + units % 2  # of a block
    parts, part_rows = sizes.products_per_unit, sizes.rows_per_product
    parts_per_head = num_heads // K // sizes.heads_per_product

    # ---- copies --------------------------------------------------------------------------------------------
    ids = streamed if streams else table

    def id_copy(row, first_page, slot):
        """The copy of the page ids of a block, where they stream."""
        chunk = field(TABLE_ROW, row) * chunks + lax.div(first_page, IDS)
        here = pl.ds(pl.multiple_of(slot * IDS, IDS), IDS)
        return pltpu.make_async_copy(table.at[chunk, 0], ids.at[here], id_sem.at[slot])

    def start_ids(slot):
        """Starts the copy of the ids of the block that is fetched next."""
        row, nth, block = front[0], front[1], front[2]
        first_page = tasks.geometry(row, nth, block)[2]
        pl.when(row < num_active)(lambda: id_copy(row, first_page, slot).start())

    def place_of_ids(row, first_page, slot):
        if streams:
            return slot * IDS + (first_page & (IDS - 1))
        return field(TABLE_ROW, row) * (chunks * IDS) + first_page

    def start_pages(slot, nth, left, low, at):
        """Starts the copy of each page of the block that the task needs, and notes how many these are.

        The ids of the pages begin at `at`.
        """
        heads = pl.ds(tasks.head_block(nth) * K, K)

        def body(j, count):
            page = ids[at + j]
            wanted = (j * S < left) & ((j + 1) * S > low) & (page > 0)
            pl.when(wanted)(pltpu.make_async_copy(pages.at[page, heads], kv.at[slot, j], page_sem.at[slot]).start)
            if options.quantised:
                copy = pltpu.make_async_copy(scales.at[page, heads], scales_by_page.at[slot, j], page_sem.at[slot])
                pl.when(wanted)(copy.start)
            return count + jnp.where(wanted, 1, 0)

        due[slot] = lax.fori_loop(0, NP, body, jnp.int32(0), unroll=min(NP, 8))

    def wait_for_pages(slot):
        for array in (kv, scales_by_page) if options.quantised else (kv,):
            part = array.at[slot, pl.ds(0, due[slot])]
            pl.when(due[slot] > 0)(pltpu.make_async_copy(part, part, page_sem.at[slot]).wait)

    def fetch(slot):
        """Starts the copies of the block at the front of the walk and moves the front on."""
        row, nth, block = front[0], front[1], front[2]

        @pl.when(row < num_active)
        def _():
            left, low, first_page = tasks.geometry(row, nth, block)
            if streams:
                id_copy(row, first_page, slot).wait()
            start_pages(slot, nth, left, low, place_of_ids(row, first_page, slot))
            tasks.advance()
            if streams:
                start_ids((slot + 1) & (ring - 1))

    def place_of_task(row, nth):
        """Where its tokens and heads are in out_hbm, their queries before and their outputs after; and in VMEM."""
        first = tasks.first_token(nth)
        count = jnp.minimum(field(NUM_TOKENS, row) - first, Q)
        heads = q_in.shape[1]
        first_head = pl.multiple_of(tasks.head_block(nth) * heads, heads)
        return (pl.ds(field(TOKEN, row) + first, count), pl.ds(first_head, heads)), pl.ds(0, count)

    def q_copy(row, nth):
        there, here = place_of_task(row, nth)
        return pltpu.make_async_copy(out_hbm.at[there], q_in.at[here], q_sem)

    def out_copies(row, nth):
        there, here = place_of_task(row, nth)
        copies = [pltpu.make_async_copy(out.at[here], out_hbm.at[there], out_sem)]
        if options.lse:
            lse_there = lse_hbm.at[tasks.head_block(nth), there[0]]
            copies.append(pltpu.make_async_copy(lse.at[here], lse_there, out_sem))
        return copies

    # ---- a block ---------------------------------------------------------------------------------------------
    def zero_unless(condition, x):
        """Also of 8 and 16 bits, which have no masks of their own on older chips."""
        if x.dtype.itemsize == 4:
            return jnp.where(condition, x, 0)
        wide = jnp.float32 if x.dtype == jnp.bfloat16 else jnp.int32
        return jnp.where(condition, x.astype(wide), 0).astype(x.dtype)

    def clean(slot, left, low, at):
        """Zeroes the values of keys that do not exist: 0 * NaN is NaN."""

        def page(j, _):
            exists = (ids[at + j] > 0) & ((j + 1) * S > low)
            live = jnp.where(exists, left - j * S, 0)

            @pl.when(live < S)
            def _():
                first = 0 if shares_tile else value_row
                row = first + lax.broadcasted_iota(jnp.int32, (value_row + S - first, L), 0)
                for h in range(K):
                    here = kv[slot, j, h, first : value_row + S, :]
                    kv[slot, j, h, first : value_row + S, :] = zero_unless(row < value_row + live, here)
                if options.quantised:
                    lane = lax.broadcasted_iota(jnp.int32, scales_by_page.shape[2:], 1)
                    scales_by_page[slot, j] = jnp.where(lane < S + live, scales_by_page[slot, j], 0.0)

            return 0

        lax.fori_loop(0, NP, page, 0)

    def put_scales_together(slot):
        """Those of a block's keys and of its values, from page by page to one row for each head."""
        for i in range(2):
            parts = [scales_by_page[slot, j, :, i * S : (i + 1) * S] for j in range(NP)]
            scales_by_head[slot, i] = jnp.concatenate(parts, axis=1)

    def page_bits(at):
        def body(j, bits):
            return bits | jnp.where(ids[at + j] > 0, jnp.left_shift(1, j), 0)

        return lax.fori_loop(0, NP, body, jnp.int32(0))

    # ---- the three stages of a unit ----------------------------------------------------------------------------
    def head_rows(slot, head, first_row):
        return load_rows(kv.at[slot, :, head], first_row, S).astype(q.dtype)

    def scales_of_head(slot, head, is_value):
        """Of its keys or its values, `[1, T]`."""
        return scales_by_head[slot, int(is_value), pl.ds(head, 1), :]

    key = lax.broadcasted_iota(jnp.int32, (1, T), 1)
    page_of_key = lax.convert_element_type((key.astype(jnp.float32) + 0.5) / S, jnp.int32)

    def scores(unit, part, slot, mask, position, left, low, bits):
        """Args:
        unit: `units` for none.
        mask: whether some of the block's keys may be hidden from some rows.
        position: of the task's first token, from the block's start.
        low: the first key that a token sees, likewise.
        """
        real = jnp.minimum(unit, units - 1)
        s = dot(q[real, rows_of(part)], head_rows(slot, head_of(real, part), 0), 1)  # [rows of a product, T]
        if options.quantised:
            s = s * scales_of_head(slot, head_of(real, part), False)
        if options.soft_cap is not None:
            s = jnp.tanh(s) * (options.soft_cap * LOG2E)
        if mask:
            exists = (key < left) & ((jnp.right_shift(bits, page_of_key) & 1) > 0)
            token = jnp.right_shift(lax.broadcasted_iota(jnp.int32, (part_rows, 1), 0), interleave // 2) & (Q - 1)
            last = position + token if options.causal else left
            visible = jnp.where(exists, key, NEVER) <= last
            if options.window is not None:
                visible = visible & (key > last - options.window)
            if not options.causal:
                visible = visible & (key >= low)
            s = jnp.where(visible, s, MASKED)
        here = unit, rows_of(part)
        m_before = m_ref[here]
        m = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))
        m_ref[here], alpha_ref[here] = m, jnp.exp2(m_before - m)
        return s

    def softmax(unit, part, slot, s):
        here = unit, rows_of(part)
        p = jnp.exp2(s - jnp.concatenate([m_ref[here]] * (T // LANES), axis=1))
        l_ref[here] = l_ref[here] * alpha_ref[here] + jnp.sum(p, axis=1, keepdims=True)
        if options.quantised:
            p = p * scales_of_head(slot, head_of(unit, part), True)
        return p.astype(q.dtype)

    def values(unit, part, slot, p):
        v = head_rows(slot, head_of(unit, part), value_row)
        here = unit, rows_of(part)
        acc_ref[here] = acc_ref[here] * all_units.wide(alpha_ref[here]) + dot(p, v, 0)

    def rows_of(part):
        return slice(part * part_rows, (part + 1) * part_rows)

    def head_of(unit, part):
        """The KV head of a part of a unit."""
        return lax.div(jnp.minimum(unit, units - 1) * parts + part, parts_per_head)

    def reset(unit, head_block):
        floor = jnp.full((R, LANES), FLOOR, jnp.float32)
        m_ref[unit] = sinks[head_block * units + unit] * LOG2E if options.sinks else floor
        l_ref[unit] = jnp.full((R, LANES), 1.0 if options.sinks else 0.0, jnp.float32)
        acc_ref[unit] = jnp.zeros((R, L), jnp.float32)
        return head_block

    def run_stages(stages):
        """Calls each stage for each part of a unit. The compiler keeps to this order roughly: one part after another
        where each fills the matrix unit, else one stage after another."""
        if L == LANES and part_rows * T >= LARGE_PRODUCT:
            calls = [(stage, part) for part in range(parts) for stage in stages]
        else:
            calls = [(stage, part) for stage in stages for part in range(parts)]
        for stage, part in calls:
            stage(part)

    # ---- a task ----------------------------------------------------------------------------------------------
    def run_task(row, nth, number, slot):
        """Args:
        number: of the task. slot: of its first block in the ring.
        """
        blocks = tasks.num_blocks(row, nth)
        lax.fori_loop(0, units + 1, reset, tasks.head_block(nth))
        q_copy(row, nth).wait()
        all_units.load_queries(options.query_factor)
        more = tasks.has_more(row, nth)
        next_row, next_nth = jnp.where(more, row, row + 1), jnp.where(more, nth + 1, 0)
        pl.when(next_row < num_active)(lambda: q_copy(next_row, next_nth).start())

        def ring_slot(block):
            return (slot + block) & (ring - 1)

        def geometry_and_masks(block):
            """The scalars of a block, read by the stages of its units."""
            here = ring_slot(block)
            left, low, first_page = tasks.geometry(row, nth, block)
            at = place_of_ids(row, first_page, here)
            position = tasks.first_position(row, nth) - (tasks.first_block(row, nth) + block) * T
            has_holes = field(HOLES, row) > 0
            is_edge = (left < T) | (low > 0) | has_holes
            is_masked = is_edge
            if options.causal:
                is_masked = is_masked | (position < T - 1)
            if options.window is not None:
                is_masked = is_masked | (position + Q - 1 >= options.window)
            wait_for_pages(here)
            pl.when(is_edge)(lambda: clean(here, left, low, at))
            if options.quantised:
                put_scales_together(here)
            bits = lax.cond(has_holes, lambda: page_bits(at), lambda: jnp.int32(-1))
            return here, left, low, position, bits, is_masked

        def run_block(block, last_slot):
            """Args:
            last_slot: of the block before, whose last units end here.
            """
            slot, left, low, position, bits, is_masked = geometry_and_masks(block)

            def unit_before(unit, by):
                """The unit `by` steps ago; `units` stands for nothing."""
                before = unit - by
                if not isinstance(unit, int):
                    before = jnp.where(unit >= by, before, jnp.where(block == 0, units, before + steps))
                return jnp.minimum(before, units)

            def step(unit, mask, s_new, s_old, p_new, p_old):
                def soften(part):
                    there = jnp.where(unit < 1, last_slot, slot)
                    p_new[rows_of(part)] = softmax(unit_before(unit, 1), part, there, s_old[rows_of(part)])

                def score(part):
                    this = jnp.minimum(unit, units)
                    s_new[rows_of(part)] = scores(this, part, slot, mask, position, left, low, bits)

                def add_values(part):
                    values(unit_before(unit, 2), part, jnp.where(unit < 2, last_slot, slot), p_old[rows_of(part)])

                # With two units or fewer, both stages are of the same unit: its values need the old `alpha` first.
                run_stages((soften, score, add_values) if units > 2 else (soften, add_values, score))

            def pair(i, mask):
                """Two steps, each a basic block of its own: in one they would wait for each other."""
                even, odd = 2 * i, 2 * i + 1
                step(even, mask, s_a, s_b, p_b, p_a)
                pl.when(odd >= 0)(lambda: step(odd, mask, s_b, s_a, p_a, p_b))
                return 0

            def pairs(mask):
                lax.fori_loop(0, steps // 2, lambda i, _: pair(i, mask), 0)

            pl.when(is_masked)(lambda: pairs(True))
            pl.when(~is_masked)(lambda: pairs(False))

            @pl.when(block + 1 == blocks)
            def _():
                """What is left of the last two units."""
                for part in range(parts):
                    p_b[rows_of(part)] = softmax(unit_before(steps, 1), part, slot, s_b[rows_of(part)])
                    values(unit_before(steps, 2), part, slot, p_a[rows_of(part)])
                for part in range(parts):
                    values(unit_before(steps + 1, 2), part, slot, p_b[rows_of(part)])

            fetch((slot + ring - 1) & (ring - 1))  # the slot of the block before, which has ended now
            return slot

        lax.fori_loop(0, blocks, run_block, slot)

        def wait_for_last():
            for copy in out_copies(sent[0], sent[1]):
                copy.wait()

        pl.when(number > 0)(wait_for_last)
        all_units.store_outputs()
        if options.lse:
            all_units.store_lse()
        for copy in out_copies(row, nth):
            copy.start()
        sent[0], sent[1] = row, nth
        return next_row, next_nth, number + 1, ring_slot(blocks)

    def run():
        for i in range(3):
            front[i] = jnp.int32(0)
        q_copy(jnp.int32(0), jnp.int32(0)).start()
        if streams:
            start_ids(0)
        for slot in range(ring - 1):
            fetch(jnp.int32(slot))
        zero = jnp.int32(0)
        lax.while_loop(lambda state: state[0] < num_active, lambda state: run_task(*state), (zero, zero, zero, zero))
        for copy in out_copies(sent[0], sent[1]):
            copy.wait()

    pl.when(num_active > 0)(run)


def prefill(q: Array, lse: Array | None, sinks: Array | None, rows: Array, table: Array, pages: Array,
            scales: Array | None, *, chunks: int, num_heads: int, sizes: PrefillSizes, options: PrefillOptions,
            ) -> tuple[Array, Array]:  # fmt: skip
    """Attends; the pages hold the new tokens already.

    Args:
        q: `[T, padded_heads, L]` in the dtype of the products, the heads of a token padded to whole registers. The
            outputs take the place of the queries of rows that take part; other tokens may hold anything.
        lse: float32 `[head_blocks, T, ceil(N / head_blocks / 128), 128]`, a head a lane, likewise; or None.
        sinks: float32 `[head_blocks * units, R, 128]`, or None.
        rows: int32 `[FIELDS * B + 1]`: the fields of each row that takes part, field by field, then the number of
            such rows.
        table: int32 `[B * chunks * 128]`, the page ids, of each row in so many chunks; 0: no page.
        pages: `[P, K, planes * S, L]`.
        scales: float32 `[P, K, R]`, for 8-bit pages; or None.

    Returns:
        q with outputs in it, and lse.
    """
    L = pages.shape[3]
    Q, R, T = sizes.query_tokens, sizes.rows_per_unit, sizes.tokens
    num_heads //= sizes.head_blocks  # of a task
    units = num_heads * Q // R
    task_heads, kv_heads = q.shape[1] // sizes.head_blocks, pages.shape[1] // sizes.head_blocks
    num_rows = rows.shape[0] // FIELDS
    f32, vmem, smem = jnp.float32, pltpu.VMEM, pltpu.SMEM
    hbm, scalars = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=smem)
    if sinks is None:
        sinks = jnp.zeros((1, SUBLANES, LANES), f32)
    else:
        sinks = jnp.concatenate([sinks, jnp.zeros((1, R, LANES), f32)])
    if lse is None:
        lse = jnp.zeros((1, 1, 1, LANES), f32)
    if scales is None:
        scales = jnp.zeros((1, kv_heads, LANES), f32)
    scale_slots = sizes.blocks_in_ring if options.quantised else 1
    streams = is_streamed(table)
    table = in_hbm(table.reshape(-1, 1, IDS)) if streams else table
    arrays = (pages, scales, q, lse)
    kernel = functools.partial(
        _kernel, num_rows=num_rows, chunks=chunks, streams=streams, num_heads=num_heads, sizes=sizes, options=options
    )
    return pl.pallas_call(
        kernel,
        name=f"paged_prefill_{Q}",
        out_shape=(pltpu.HBM(q.shape, q.dtype), pltpu.HBM(lse.shape, f32)),
        in_specs=[scalars, pl.BlockSpec(memory_space=vmem), hbm if streams else scalars] + [hbm] * len(arrays),
        out_specs=(hbm, hbm),
        input_output_aliases={5: 0, 6: 1},
        scratch_shapes=[
            tiled_as_in_hbm((sizes.blocks_in_ring, sizes.pages_per_block, kv_heads, *pages.shape[2:]), pages.dtype),
            vmem((scale_slots, sizes.pages_per_block if options.quantised else 1, kv_heads, scales.shape[2]), f32),
            vmem((scale_slots, 2, kv_heads, T if options.quantised else LANES), f32),
            smem((3,), jnp.int32),
            smem((2,), jnp.int32),
            smem((sizes.blocks_in_ring,), jnp.int32),
            smem((sizes.blocks_in_ring * IDS if streams else IDS,), jnp.int32),
            vmem((Q, task_heads, L), q.dtype),
            vmem((L // LANES, Q * task_heads * q.dtype.itemsize // 4, LANES), jnp.int32),
            vmem((units, R, L), q.dtype),
            vmem((Q, task_heads, L), q.dtype),
            vmem((Q if options.lse else 1, *lse.shape[2:]), f32),
            vmem((units + 1, R, LANES), f32),
            vmem((units + 1, R, LANES), f32),
            vmem((units + 1, R, LANES), f32),
            vmem((units + 1, R, L), f32),
            vmem((R, T), f32),
            vmem((R, T), f32),
            vmem((R, T), q.dtype),
            vmem((R, T), q.dtype),
            pltpu.SemaphoreType.DMA((sizes.blocks_in_ring,)),
            pltpu.SemaphoreType.DMA((sizes.blocks_in_ring,)),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA,
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=56 << 20, disable_bounds_checks=True),
    )(rows, sinks, table, *(in_hbm(x) for x in arrays))
