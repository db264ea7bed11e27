"""Decode: one new token a sequence, appended to its page and attended in the same pass over the pages.

The kernel walks a flat sequence of *items*, a block of T tokens of one sequence each, so that short contexts are
just more items and the pipeline never drains between sequences. Items pass through these stages:

    plan     the walker names the next item; the page ids of its block are copied from HBM to scalar memory
    fetch    its pages are copied to a slot of the ring, `ahead` items before they are needed
    scores   q . K on the matrix unit              }
    softmax  one group later, beside the next scores } W items, a *group*, in one basic block
    values   p . V, two groups later                 }

The three stages of a basic block belong to three groups, so none waits for another. Every wait is a scheduling
barrier, hence a group waits once, at its top. The slots of the ring are separate references: a dynamic index
into one costs nine cycles a copy. Lists live in HBM and stream, so no table size overflows scalar memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tpu.heads import LANES, SUBLANES, HeadPacking

MASKED = -1e30  # score of a key that does not exist
FLOOR = -1e20  # the running maximum before the first key: exp2(MASKED - FLOOR) is 0
LOG2E = 1.4426950408889634
IDS = 128  # page ids in a chunk of the page table: one row of lanes
FIELDS = 6  # of a row in `rows`
LENGTH, TOKEN, FIRST_BLOCK, LAST_PAGE, LAST_SLOT, NUM_BLOCKS = range(FIELDS)
UNROLL = 8


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Static sizes of one kernel.

    Args:
        page_size: S.
        pages_per_item: pages in a block of T tokens; a power of two, at most 32.
        items_per_group: W.
        items_in_ring: U, a multiple of W.
    """

    page_size: int
    pages_per_item: int
    items_per_group: int
    items_in_ring: int

    @property
    def tokens(self) -> int:
        return self.page_size * self.pages_per_item

    @property
    def ahead(self) -> int:
        """Items between an item's fetch and its scores."""
        return self.items_in_ring - 2 * self.items_per_group

    @property
    def plan_ahead(self) -> int:
        """Items between an item's plan and its fetch."""
        return 2 * self.items_per_group

    @property
    def records(self) -> int:
        """Items whose scalars are kept: from the plan to the write-back, one lap after the values."""
        return pl.next_power_of_2(2 * self.items_in_ring + self.plan_ahead + 3 * self.items_per_group)

    @property
    def sequences(self) -> int:
        """Sequences whose queries, new tokens and outputs are kept."""
        return pl.next_power_of_2(self.items_in_ring + 2 * self.items_per_group)


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """What a call asks for, apart from sizes."""

    scale: float
    window: int | None
    soft_cap: float | None
    append: bool
    sinks: bool
    lse: bool


def _dot(a: Array, b: Array, contract_b: int) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _kernel(rows, q_hbm, new_hbm, sink_vmem, table, pages_in, out_hbm, lse_hbm, pages, *scratch,
            num_rows: int, chunks: int, sizes: DecodeSizes, packing: HeadPacking, options: DecodeOptions):  # fmt: skip
    del pages_in  # the same memory as `pages`
    S, NP, W, U = sizes.page_size, sizes.pages_per_item, sizes.items_per_group, sizes.items_in_ring
    T, ahead, plan_ahead = sizes.tokens, sizes.ahead, sizes.plan_ahead
    num_groups_in_ring, last_record, last_sequence = U // W, sizes.records - 1, sizes.sequences - 1
    K, E, L = packing.num_kv_heads, packing.heads_per_pass, packing.lanes
    R, G, num_rows_q = packing.rows_per_pass, packing.padded_group, packing.rows
    planes = pages.shape[2] // S  # 2: value rows below key rows; 1: side by side in the lanes
    value_row = (planes - 1) * S
    tile_rows = SUBLANES * 4 // pages.dtype.itemsize  # what a copy can address
    slots, scratch = scratch[:U], scratch[U:]
    (order, cursor, left_of, low_of, column_of, bits_of, count_of, first_of, sequence_of, token_of,
     ids, q, new, out, lse, tile, m_ref, l_ref, acc_ref, s_ref, p_ref, alpha_ref, l_out, m_out,
     page_sem, row_sem, id_sem, out_sem, tile_sem) = scratch  # fmt: skip

    def field(index, row):
        return rows[index * num_rows + row]

    # ---- the walk over items -------------------------------------------------------------------------------
    def collect_rows():
        """Lists the rows that take part and counts their items."""

        def body(i, carry):
            count, items = carry
            for j in range(UNROLL):
                row = i * UNROLL + j
                length = field(LENGTH, row)
                order[count] = row
                count = count + jnp.where(length > 0, 1, 0)
                items = items + field(NUM_BLOCKS, row)
            return count, items

        zero = jnp.int32(0)
        return lax.fori_loop(0, num_rows // UNROLL, body, (zero, zero))

    def plan(item, at, num_active):
        """Writes the item's record, starts the copy of its page ids and advances the walker."""
        nth, block = cursor[0], cursor[1]
        real = nth < num_active
        row = order[jnp.minimum(nth, num_active - 1)]
        length = field(LENGTH, row)
        left = length - block * T
        first_page = block * NP
        r = item & last_record
        left_of[r] = jnp.where(real, left, 0)
        column_of[r] = first_page & (IDS - 1)
        first_of[r] = jnp.where(real & (block == field(FIRST_BLOCK, row)), 1, 0)
        # Items past the end leave their output where nobody looks.
        sequence_of[r] = jnp.where(real, nth & last_sequence, last_sequence + 1)
        token_of[r] = row
        if options.window is not None:
            low_of[r] = jnp.where(real, length - options.window - block * T, T)
        chunk = row * chunks + jnp.right_shift(first_page, IDS.bit_length() - 1)
        pltpu.make_async_copy(table.at[chunk], ids.at[pl.ds(r, 1)], id_sem.at[at]).start()
        finished = left <= T
        following = order[jnp.minimum(nth + 1, num_active - 1)]
        cursor[0] = jnp.where(finished & real, nth + 1, nth)
        cursor[1] = jnp.where(finished, field(FIRST_BLOCK, following), block + 1)

    def is_last(r):
        return (left_of[r] > 0) & (left_of[r] <= T)

    def total(values, first):
        return functools.reduce(lambda a, b: a + b, [values((first + w) & last_record) for w in range(W)])

    # ---- data movement -------------------------------------------------------------------------------------
    def row_copies(r):
        """The query of the item's sequence and, where it is appended, its new token."""
        sequence, row = sequence_of[r], field(TOKEN, token_of[r])
        copies = [(q_hbm.at[row], q.at[sequence])]
        return copies + ([(new_hbm.at[row], new.at[sequence])] if options.append else [])

    def fetch(item, slot):
        r = item & last_record
        left, column = left_of[r], column_of[r]
        bits = count = jnp.int32(0)
        for j in range(NP):
            page = ids[r, column + j]
            wanted = (left > j * S) & (page > 0)
            if options.window is not None:
                wanted = wanted & (low_of[r] < (j + 1) * S)

            @pl.when(wanted)
            def _(page=page, j=j):
                pltpu.make_async_copy(pages.at[page], slots[slot].at[j], page_sem.at[slot // W]).start()

            bits = bits | jnp.where(wanted, jnp.int32(-(1 << 31) if j == 31 else 1 << j), 0)
            count = count + jnp.where(wanted, 1, 0)
        bits_of[r], count_of[r] = bits, count

        @pl.when(first_of[r] > 0)
        def _():
            for source, target in row_copies(r):
                pltpu.make_async_copy(source, target, row_sem.at[slot // W]).start()

    def wait(ref, count, sem):
        """Waits for the bytes of `count` leading elements of `ref`."""
        part = ref.at[pl.ds(0, count)]
        pl.when(count > 0)(pltpu.make_async_copy(part, part, sem).wait)

    def arrive(first, u0):
        wait(pages, total(lambda r: count_of[r], first), page_sem.at[u0 // W])
        num_first = total(lambda r: first_of[r], first)
        wait(q_hbm, num_first, row_sem.at[u0 // W])
        if options.append:
            wait(new_hbm, num_first, row_sem.at[u0 // W])

    def ids_arrive(at):
        part = ids.at[pl.ds(0, W)]
        pltpu.make_async_copy(part, part, id_sem.at[at]).wait()

    def leave(first, group):
        """Waits for what the items from `first` wrote to HBM a lap ago: outputs."""
        count = total(lambda r: jnp.where(is_last(r), 1, 0), first)
        wait(out_hbm, count, out_sem.at[group])
        if options.lse:
            wait(lse_hbm, count, out_sem.at[group])

    def ends_here(r):
        return is_last(r) & ((jnp.right_shift(bits_of[r], field(LAST_PAGE, token_of[r])) & 1) > 0)

    def tiles_leave(first, group):
        wait(tile, total(lambda r: jnp.where(ends_here(r), 1, 0), first), tile_sem.at[group])

    def send_outputs(r, group):
        sequence, row = sequence_of[r], field(TOKEN, token_of[r])

        @pl.when(is_last(r))
        def _():
            pltpu.make_async_copy(out.at[sequence], out_hbm.at[row], out_sem.at[group]).start()
            if options.lse:
                pltpu.make_async_copy(lse.at[sequence], lse_hbm.at[row], out_sem.at[group]).start()

    # ---- the pages of an item: what does not exist becomes zero, what is new is put in ------------------------
    def clean(r, slot):
        """Zeroes the values of pages that were not fetched: 0 * NaN is NaN."""
        left = left_of[r]

        @pl.when((left > 0) & (bits_of[r] != (1 << NP) - (1 << 32 if NP == 32 else 0) - 1))
        def _():
            def page(j, _):
                @pl.when((jnp.right_shift(bits_of[r], j) & 1) == 0)
                def _():
                    slots[slot][j, :, value_row : value_row + S, :] = jnp.zeros((K, S, L), pages.dtype)

                return 0

            lax.fori_loop(0, NP, page, 0)

    def finish(r, slot, group):
        """The last page of a sequence: appends its new token and zeroes the values behind it."""
        row, sequence = token_of[r], sequence_of[r]
        j, at = field(LAST_PAGE, row), field(LAST_SLOT, row)
        first_row = pl.multiple_of(at & -tile_rows, tile_rows)
        in_tile = lax.broadcasted_iota(jnp.int32, (tile_rows, L), 0) - (at - first_row)

        @pl.when(ends_here(r))
        def _():
            for h in range(K):
                for e in range(planes):
                    here = pl.ds(pl.multiple_of(e * S + first_row, tile_rows), tile_rows)
                    x = slots[slot][j, h, here, :].astype(jnp.float32)
                    if options.append:
                        x = jnp.where(in_tile == 0, new[sequence, h * planes + e : h * planes + e + 1, :], x)
                        tile[sequence, h, e] = x.astype(pages.dtype)
                    if e == planes - 1:
                        x = jnp.where(in_tile > 0, 0.0, x)
                    slots[slot][j, h, here, :] = x.astype(pages.dtype)
            if options.append:
                for e in range(planes):
                    here = pl.ds(pl.multiple_of(e * S + first_row, tile_rows), tile_rows)
                    target = pages.at[ids[r, column_of[r] + j], :, here, :]
                    pltpu.make_async_copy(tile.at[sequence, :, e], target, tile_sem.at[group]).start()

            def behind(t, _):
                here = pl.ds(pl.multiple_of(value_row + t * tile_rows, tile_rows), tile_rows)
                slots[slot][j, :, here, :] = jnp.zeros((K, tile_rows, L), pages.dtype)
                return 0

            if S > tile_rows:
                lax.fori_loop(lax.div(first_row, tile_rows) + 1, S // tile_rows, behind, 0)

    # ---- the three stages ----------------------------------------------------------------------------------
    def side_by_side(slot, n, first_row):
        heads = [slots[slot][:, n * E + e, first_row : first_row + S, :].reshape(T, L) for e in range(E)]
        return jnp.concatenate(heads, axis=1).astype(q.dtype)  # [T, E * L]

    def scores(r, slot):
        sequence = sequence_of[r]
        return jnp.concatenate(
            [_dot(q[sequence, n], side_by_side(slot, n, 0), 1) for n in range(packing.num_passes)], axis=0
        )  # [rows, T]

    column = lax.broadcasted_iota(jnp.int32, (1, T), 1)
    page_of_column = lax.convert_element_type((lax.convert_element_type(column, jnp.float32) + 0.5) / S, jnp.int32)

    def softmax(r, s, m, l):
        s = s * options.scale
        if options.soft_cap is not None:
            s = options.soft_cap * jnp.tanh(s * (1 / options.soft_cap))
        exists = (column < left_of[r]) & ((jnp.right_shift(bits_of[r], page_of_column) & 1) > 0)
        if options.window is not None:
            exists = exists & (column >= low_of[r])
        s = jnp.where(exists, s * LOG2E, MASKED)
        is_first = first_of[r] > 0
        m_before = jnp.where(is_first, sink_vmem[...] * LOG2E if options.sinks else FLOOR, m)
        l_before = jnp.where(is_first, 1.0 if options.sinks else 0.0, l)
        m = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp2(s - m[:, :1])
        alpha = jnp.exp2(m_before - m)
        return p.astype(q.dtype), alpha, m, l_before * alpha + jnp.sum(p, axis=1, keepdims=True)

    head_of_row = lax.broadcasted_iota(jnp.int32, (R, L), 0)

    def values(slot, p):
        outs = []
        for n in range(packing.num_passes):
            wide = _dot(p[n * R : (n + 1) * R], side_by_side(slot, n, value_row), 0)  # [R, E * L]
            o = wide[:, :L]
            for e in range(1, E):
                o = jnp.where(head_of_row >= e * G, wide[:, e * L : (e + 1) * L], o)
            outs.append(o)
        return jnp.concatenate(outs, axis=0)  # [rows, L]

    def lanes(x):
        """A value held in all 128 lanes, `[rows, 128]`, in L lanes."""
        return x if L == LANES else jnp.broadcast_to(x[:, :1], (num_rows_q, L))

    # ---- the pipeline --------------------------------------------------------------------------------------
    def group(first, u0, num_active):
        at = u0 // W
        behind = [((first + w - 2 * W) & last_record, (u0 + w - 2 * W) % U) for w in range(W)]
        arrive(first, u0)
        ids_arrive((at + ahead // W) % num_groups_in_ring)
        leave(first - 2 * W - U, at)
        if options.append:
            tiles_leave(first - U, at)
        for w in range(W):
            r = (first + w) & last_record
            clean(r, u0 + w)
            finish(r, u0 + w, at)

        m, l, acc = m_ref[...], l_ref[...], acc_ref[...]
        for w, (r, slot) in enumerate(behind):
            o = values(slot, p_ref[w])
            acc = jnp.where(first_of[r] > 0, 0.0, acc * lanes(alpha_ref[w])) + o
            d = l_out[w]
            out[sequence_of[r]] = (acc / lanes(jnp.where(d > 0, d, 1.0))).astype(out.dtype)
            if options.lse:
                log = (m_out[w] + jnp.log2(jnp.where(d > 0, d, 1.0))) * (1 / LOG2E)
                lse[sequence_of[r]] = jnp.where(d > 0, log, -jnp.inf)
            send_outputs(r, at)
            fetch(first + w + ahead, slot)
            plan(first + w + ahead + plan_ahead, (at + (ahead + plan_ahead) // W) % num_groups_in_ring, num_active)
        s = [scores((first + w) & last_record, u0 + w) for w in range(W)]
        for w in range(W):
            p, alpha, m, l = softmax((first + w - W) & last_record, s_ref[w], m, l)
            p_ref[w], alpha_ref[w], l_out[w] = p, alpha, l
            if options.lse:
                m_out[w] = m
        for w in range(W):
            s_ref[w] = s[w]
        m_ref[...], l_ref[...], acc_ref[...] = m, l, acc

    def run(num_active, num_items):
        cursor[0], cursor[1] = jnp.int32(0), field(FIRST_BLOCK, order[0])
        for item in range(-2 * W - U, 0):  # nothing came before
            r = item & last_record
            left_of[r] = first_of[r] = bits_of[r] = count_of[r] = column_of[r] = token_of[r] = jnp.int32(0)
            sequence_of[r] = jnp.int32(last_sequence + 1)
            if options.window is not None:
                low_of[r] = jnp.int32(0)
        for item in range(ahead + plan_ahead):
            plan(jnp.int32(item), item // W % num_groups_in_ring, num_active)
        for item in range(ahead):
            if item % W == 0:
                ids_arrive(item // W)
            fetch(jnp.int32(item), item)
        m_ref[...] = jnp.full_like(m_ref, FLOOR)
        for ref in (l_ref, acc_ref, s_ref, p_ref, alpha_ref, l_out, m_out):
            ref[...] = jnp.zeros_like(ref)

        num_groups = lax.div(num_items + (W - 1), W) + 2

        def lap(g0):
            for u0 in range(0, U, W):
                g = g0 + u0 // W
                pl.when(g < num_groups)(functools.partial(group, g * W, u0, num_active))
            return g0 + num_groups_in_ring

        end = lax.while_loop(lambda g0: g0 < num_groups, lap, jnp.int32(0))

        for at in range(num_groups_in_ring):  # what was started and has nobody left to wait for it
            g = end - num_groups_in_ring + at
            g = jnp.where(g < num_groups, g, g - num_groups_in_ring)
            leave((g - 2) * W, at)
            if options.append:
                tiles_leave(g * W, at)
        at = num_groups - end + (ahead // W) % num_groups_in_ring + num_groups_in_ring
        for _ in range(plan_ahead // W):  # planned, never fetched
            at = jnp.where(at >= num_groups_in_ring, at - num_groups_in_ring, at)
            ids_arrive(at)
            at = at + 1

    num_active, num_items = collect_rows()
    pl.when(num_items > 0)(functools.partial(run, num_active, num_items))


def decode(q: Array, new: Array | None, sinks: Array | None, rows: Array, table: Array, pages: Array, *,
           chunks: int, sizes: DecodeSizes, packing: HeadPacking, options: DecodeOptions, interpret: Any = False):  # fmt: skip
    """Attends and appends.

    Args:
        q: packed queries `[T, passes, R, E * L]`.
        new: float32 `[T, K * planes, L]`, the new rows of a page, or None.
        sinks: float32 `[rows, 128]`, or None.
        rows: int32 `[6 * B]`: of each row of the table its length (0: takes no part), token, first block,
            page within the last block and slot of the new token, and number of blocks. B a multiple of 8.
        table: int32 `[B * chunks, 1, 128]`, the page ids, of each row in so many chunks; 0: no page.
        pages: `[P, K, planes * S, L]`.

    Returns:
        out `[T, rows, L]` in q's dtype, lse float32 `[T, rows, 128]`, and the pages. Tokens of rows that
        take no part are not written.
    """
    num_tokens, num_rows = q.shape[0], rows.shape[0] // FIELDS
    W, U, N, L = sizes.items_per_group, sizes.items_in_ring, packing.rows, packing.lanes
    planes = pages.shape[2] // sizes.page_size
    tile_rows = SUBLANES * 4 // pages.dtype.itemsize
    f32, i32 = jnp.float32, jnp.int32
    if new is None:
        new = jnp.zeros((1, SUBLANES, LANES), f32)
    if sinks is None:
        sinks = jnp.zeros((SUBLANES, LANES), f32)
    vmem, smem = pltpu.VMEM, pltpu.SMEM
    ring = sizes.sequences + 1  # the last entry takes what nobody reads
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    lse_shape = (num_tokens, N, LANES) if options.lse else (1, SUBLANES, LANES)
    kept = (ring, N, LANES) if options.lse else (1, SUBLANES, LANES)
    scratch = [vmem((sizes.pages_per_item, *pages.shape[1:]), pages.dtype)] * U
    scratch += [smem((num_rows + 1,), i32), smem((2,), i32)] + [smem((sizes.records,), i32)] * 8
    scratch += [
        smem((sizes.records, IDS), i32),
        vmem((ring, *q.shape[1:]), q.dtype),
        vmem((ring, *new.shape[1:]), f32),
        vmem((ring, N, L), q.dtype),
        vmem(kept, f32),
        vmem((ring, pages.shape[1], planes, tile_rows, L), pages.dtype),
        vmem((N, LANES), f32),
        vmem((N, LANES), f32),
        vmem((N, L), f32),
        vmem((W, N, sizes.tokens), f32),
        vmem((W, N, sizes.tokens), q.dtype),
        vmem((W, N, LANES), f32),
        vmem((W, N, LANES), f32),
        vmem((W, N, LANES) if options.lse else (1, SUBLANES, LANES), f32),
    ] + [pltpu.SemaphoreType.DMA((U // W,))] * 5
    kernel = functools.partial(_kernel, num_rows=num_rows, chunks=chunks, sizes=sizes, packing=packing, options=options)
    return pl.pallas_call(
        kernel,
        name="paged_decode",
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, N, L), q.dtype),
            jax.ShapeDtypeStruct(lse_shape, f32),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ),
        in_specs=[pl.BlockSpec(memory_space=smem), hbm, hbm, pl.BlockSpec(memory_space=vmem), hbm, hbm],
        out_specs=(hbm, hbm, hbm),
        input_output_aliases={5: 2},
        scratch_shapes=scratch,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=56 << 20, disable_bounds_checks=True),
    )(rows, q, new, sinks, table, pages)
