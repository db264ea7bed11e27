"""Prefill: sequences with several new tokens each attend to their pages, which already hold those tokens.

A *task* is a block of Q tokens of one sequence; it keeps its queries, softmax state and output in VMEM while the
keys pass by, T tokens (a *block*) at a time, each block read once a task and fetched ahead across tasks. A block
is worked off in *units*: R query rows of one KV head against T keys. As in decode, a step of the loop holds three
stages of three different units, so that the matrix unit and the vector units work side by side:

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

from pallas_kernels.tpu.heads import LANES, SUBLANES
from pallas_kernels.tpu.memory import in_hbm
from pallas_kernels.tpu.products import dot, load_rows

MASKED = -1e30  # score of a key that is not visible
FLOOR = -1e20  # the running maximum before the first key: exp2(MASKED - FLOOR) is 0
LOG2E = 1.4426950408889634
NEVER = 1 << 30  # a position behind all others
UPPER_HALF = -65536  # of a word
IDS = 128  # page ids in a chunk of the page table: one row of lanes
FIELDS = 6  # of a row in `rows`
TABLE_ROW, LENGTH, TOKEN, NUM_TOKENS, HOLES, FIRST_POSITION = range(FIELDS)
WORDS_AT_ONCE = 256  # rows of 32-bit words that move between the layouts of a token and of a head


@dataclasses.dataclass(frozen=True)
class PrefillSizes:
    """Static sizes of one kernel.

    Args:
        page_size: S.
        pages_per_block: pages in a block of T keys; a power of two, at most 32.
        query_tokens: Q, tokens of a task; a power of two.
        heads_per_unit: query heads of a unit, a divisor of the group; R is Q times this.
        blocks_in_ring: blocks in VMEM, a power of two: two at work, the others on their way.
    """

    page_size: int
    pages_per_block: int
    query_tokens: int
    heads_per_unit: int
    blocks_in_ring: int = 4

    @property
    def tokens(self) -> int:
        return self.page_size * self.pages_per_block

    @property
    def rows_per_unit(self) -> int:
        return self.query_tokens * self.heads_per_unit

    def interleave(self, dtype) -> int:
        """Heads whose rows alternate in a unit: those that share 32-bit words, if they are of one KV head."""
        packed = 4 // dtype.itemsize
        return packed if self.heads_per_unit % packed == 0 else 1


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


def _kernel(rows, sinks, table, pages, scales, q_in_hbm, lse_in, out_hbm, lse_hbm, kv, kv_scales, task, due, ids,
            q_in, words, q, out, lse, m_ref, l_ref, alpha_ref, acc_ref, s_a, s_b, p_a, p_b,
            page_sem, id_sem, q_sem, out_sem, *, num_rows: int, chunks: int, num_heads: int,
            sizes: PrefillSizes, options: PrefillOptions):  # fmt: skip
    del q_in_hbm, lse_in  # the same memory as `out_hbm` and `lse_hbm`: a task's outputs replace its queries
    S, NP, T, Q, R = (sizes.page_size, sizes.pages_per_block, sizes.tokens, sizes.query_tokens, sizes.rows_per_unit)
    ring = sizes.blocks_in_ring
    K = pages.shape[1]
    units = q.shape[0]
    units_per_head = units // K
    steps = units + units % 2  # of a block
    L = pages.shape[3]
    planes = pages.shape[2] // S  # 2: value rows below key rows; 1: side by side in the lanes
    value_row = (planes - 1) * S
    shares_tile = S % (SUBLANES * 4 // pages.dtype.itemsize) != 0  # the keys and values of a page
    packed, interleave = 4 // q.dtype.itemsize, sizes.interleave(q.dtype)
    words_per_token = q_in.shape[1] // packed  # rows of words, each with `packed` heads
    num_active = rows[FIELDS * num_rows]

    def field(index, row):
        return rows[index * num_rows + jnp.minimum(row, num_active - 1)]

    # ---- the walk over tasks and blocks ------------------------------------------------------------------
    def first_position(row, nth):
        """Position of the task's first token."""
        return field(FIRST_POSITION, row) + nth * Q

    def end_of_keys(row, nth):
        """How many keys the task's last token sees."""
        return jnp.minimum(field(LENGTH, row), first_position(row, nth) + Q) if options.causal else field(LENGTH, row)

    def first_block(row, nth):
        if options.window is None:
            return jnp.int32(0)
        return lax.div(jnp.maximum(first_position(row, nth) - options.window + 1, 0), T)

    def num_blocks(row, nth):
        """At least one, so that a task without keys still writes zeros."""
        end = lax.div(jnp.maximum(end_of_keys(row, nth), 0) + (T - 1), T)
        return jnp.maximum(end - first_block(row, nth), 1)

    # The front of the walk runs ahead of the work: its task (row, nth), and the block in it.
    def advance():
        row, nth, block = task[0], task[1], task[2]
        more_blocks = block + 1 < num_blocks(row, nth)
        more_tasks = (nth + 1) * Q < field(NUM_TOKENS, row)
        task[2] = jnp.where(more_blocks, block + 1, 0)
        task[1] = jnp.where(more_blocks, nth, jnp.where(more_tasks, nth + 1, 0))
        task[0] = jnp.where(more_blocks | more_tasks, row, row + 1)

    def chunk_copy(row, block, slot):
        chunk = field(TABLE_ROW, row) * chunks + lax.div(block * NP, IDS)
        here = pl.ds(pl.multiple_of(slot * IDS, IDS), IDS)
        return pltpu.make_async_copy(table.at[chunk, 0], ids.at[here], id_sem.at[slot])

    def start_pages(slot, left, column, low):
        """Starts the copy of each page of the block that the task needs, and notes how many these are."""

        def body(j, count):
            page = ids[slot * IDS + column + j]
            wanted = (j * S < left) & ((j + 1) * S > low) & (page > 0)
            pl.when(wanted)(pltpu.make_async_copy(pages.at[page], kv.at[slot, j], page_sem.at[slot]).start)
            if options.quantised:
                copy = pltpu.make_async_copy(scales.at[page], kv_scales.at[slot, j], page_sem.at[slot])
                pl.when(wanted)(copy.start)
            return count + jnp.where(wanted, 1, 0)

        due[slot] = lax.fori_loop(0, NP, body, jnp.int32(0), unroll=min(NP, 8))

    def wait_for_pages(slot):
        for array in (pages, scales) if options.quantised else (pages,):
            part = array.at[pl.ds(0, due[slot])]
            pl.when(due[slot] > 0)(pltpu.make_async_copy(part, part, page_sem.at[slot]).wait)

    def geometry(row, nth, block):
        """Of the block: keys from its start to the last one visible, those before the first, its ids' column."""
        start = (first_block(row, nth) + block) * T
        left = end_of_keys(row, nth) - start
        low = first_position(row, nth) - options.window + 1 - start if options.window is not None else jnp.int32(0)
        return left, low, ((first_block(row, nth) + block) * NP) & (IDS - 1)

    def fetch(slot):
        """Starts the copies of the block at the front of the walk and moves the front on."""
        row, nth, block = task[0], task[1], task[2]

        @pl.when(row < num_active)
        def _():
            copy = chunk_copy(row, first_block(row, nth) + block, slot)
            copy.start()
            copy.wait()
            left, low, column = geometry(row, nth, block)
            start_pages(slot, left, column, low)
            advance()

    def tokens_of_task(row, nth):
        """Where its tokens are in out_hbm, their queries before and their outputs after, and how many."""
        count = jnp.minimum(field(NUM_TOKENS, row) - nth * Q, Q)
        return pl.ds(field(TOKEN, row) + nth * Q, count), pl.ds(0, count)

    def q_copy(row, nth):
        there, here = tokens_of_task(row, nth)
        return pltpu.make_async_copy(out_hbm.at[there], q_in.at[here], q_sem)

    def out_copies(row, nth):
        there, here = tokens_of_task(row, nth)
        copies = [pltpu.make_async_copy(out.at[here], out_hbm.at[there], out_sem)]
        if options.lse:
            copies.append(pltpu.make_async_copy(lse.at[here], lse_hbm.at[there], out_sem))
        return copies

    # ---- a block ---------------------------------------------------------------------------------------------
    def zero_unless(condition, x):
        """Also of 8 and 16 bits, which have no masks of their own on older chips."""
        if x.dtype.itemsize == 4:
            return jnp.where(condition, x, 0)
        wide = jnp.float32 if x.dtype == jnp.bfloat16 else jnp.int32
        return jnp.where(condition, x.astype(wide), 0).astype(x.dtype)

    def clean(slot, left, column, low):
        """Zeroes the values of keys that do not exist: 0 * NaN is NaN."""

        def page(j, _):
            exists = (ids[slot * IDS + column + j] > 0) & ((j + 1) * S > low)
            live = jnp.where(exists, left - j * S, 0)

            @pl.when(live < S)
            def _():
                first = 0 if shares_tile else value_row
                row = first + lax.broadcasted_iota(jnp.int32, (value_row + S - first, L), 0)
                for h in range(K):
                    here = kv[slot, j, h, first : value_row + S, :]
                    kv[slot, j, h, first : value_row + S, :] = zero_unless(row < value_row + live, here)
                if options.quantised:
                    lane = lax.broadcasted_iota(jnp.int32, kv_scales.shape[2:], 1)
                    kv_scales[slot, j] = jnp.where(lane < S + live, kv_scales[slot, j], 0.0)

            return 0

        lax.fori_loop(0, NP, page, 0)

    def page_bits(slot, column):
        def body(j, bits):
            return bits | jnp.where(ids[slot * IDS + column + j] > 0, jnp.left_shift(1, j), 0)

        return lax.fori_loop(0, NP, body, jnp.int32(0))

    # ---- the three stages of a unit ----------------------------------------------------------------------------
    def head_rows(slot, head, first_row):
        return load_rows(kv.at[slot, :, head], first_row, S, q.dtype)

    def scales_of_head(slot, head, first):
        """Of its keys or its values, `[1, T]`."""
        parts = [kv_scales[slot, j, pl.ds(head, 1), :][:, first : first + S] for j in range(NP)]
        return jnp.concatenate(parts, axis=1)

    key = lax.broadcasted_iota(jnp.int32, (1, T), 1)
    page_of_key = lax.convert_element_type((key.astype(jnp.float32) + 0.5) / S, jnp.int32)

    def scores(unit, slot, mask, position, left, bits):
        """Args:
        unit: `units` for none.
        mask: whether some of the block's keys may be hidden from some rows.
        position: of the task's first token, from the block's start.
        """
        real = jnp.minimum(unit, units - 1)
        head = lax.div(real, units_per_head)
        s = dot(q[real], head_rows(slot, head, 0), 1)  # [R, T]
        if options.quantised:
            s = s * scales_of_head(slot, head, 0)
        if options.soft_cap is not None:
            s = jnp.tanh(s) * (options.soft_cap * LOG2E)
        if mask:
            exists = (key < left) & ((jnp.right_shift(bits, page_of_key) & 1) > 0)
            token = jnp.right_shift(lax.broadcasted_iota(jnp.int32, (R, 1), 0), interleave // 2) & (Q - 1)
            last = position + token if options.causal else left
            visible = jnp.where(exists, key, NEVER) <= last
            if options.window is not None:
                visible = visible & (key > last - options.window)
            s = jnp.where(visible, s, MASKED)
        m_before = m_ref[unit]
        m = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))
        m_ref[unit], alpha_ref[unit] = m, jnp.exp2(m_before - m)
        return s

    def softmax(unit, slot, s):
        p = jnp.exp2(s - jnp.concatenate([m_ref[unit]] * (T // LANES), axis=1))
        l_ref[unit] = l_ref[unit] * alpha_ref[unit] + jnp.sum(p, axis=1, keepdims=True)
        if options.quantised:
            p = p * scales_of_head(slot, head_of_old(unit), S)
        return p.astype(q.dtype)

    def values(unit, slot, p):
        v = head_rows(slot, head_of_old(unit), value_row)
        acc_ref[unit] = acc_ref[unit] * wide(alpha_ref[unit]) + dot(p, v, 0)

    def head_of_old(unit):
        return jnp.minimum(lax.div(unit, units_per_head), K - 1)

    def wide(x):
        """A value held in all 128 lanes, in L lanes."""
        return x if L == LANES else jnp.concatenate([x] * (L // LANES), axis=1)

    def reset(unit, _):
        m_ref[unit] = sinks[unit] * LOG2E if options.sinks else jnp.full((R, LANES), FLOOR, jnp.float32)
        l_ref[unit] = jnp.full((R, LANES), 1.0 if options.sinks else 0.0, jnp.float32)
        acc_ref[unit] = jnp.zeros((R, L), jnp.float32)
        return 0

    # ---- a task ----------------------------------------------------------------------------------------------
    chunk = min(Q, WORDS_AT_ONCE // words_per_token)  # tokens

    def to_words():
        def body(i, _):
            x = pltpu.bitcast(q_in[pl.ds(i * chunk, chunk)], jnp.int32).reshape(chunk * words_per_token, L)
            here = pl.ds(pl.multiple_of(i * chunk * words_per_token, SUBLANES), chunk * words_per_token)
            for c in range(0, L, LANES):
                words[c // LANES, here, :] = x[:, c : c + LANES]
            return 0

        lax.fori_loop(0, Q // chunk, body, 0)

    def from_words():
        def body(i, _):
            here = pl.ds(pl.multiple_of(i * chunk * words_per_token, SUBLANES), chunk * words_per_token)
            x = jnp.concatenate([words[c, here, :] for c in range(L // LANES)], axis=1)
            out[pl.ds(i * chunk, chunk)] = pltpu.bitcast(x.reshape(chunk, words_per_token, L), out.dtype)
            return 0

        lax.fori_loop(0, Q // chunk, body, 0)

    def words_of_head(n):
        """One row a token: head n, and those that share its words."""
        return pl.ds(n // packed, Q, stride=words_per_token)

    def rows_of_head(n):
        """The unit of head n, and the first of its rows there."""
        head, rest = divmod(n, num_heads // K)
        part, place = divmod(rest, sizes.heads_per_unit)
        return head * units_per_head + part, place * Q

    def load_queries():
        to_words()
        for n in range(0, num_heads, interleave):
            unit, first = rows_of_head(n)
            x = jnp.concatenate([words[c, words_of_head(n), :] for c in range(L // LANES)], axis=1)
            if interleave < packed:  # the head's half of each word is the upper half of a float32
                x = jnp.left_shift(x, 16) if n % packed == 0 else x & UPPER_HALF
                x = pltpu.bitcast(x, jnp.float32)
            else:
                x = pltpu.bitcast(x, q.dtype).astype(jnp.float32)
            q[unit, first : first + interleave * Q, :] = (x * options.query_factor).astype(q.dtype)

    def output_of_head(n):
        unit, first = rows_of_head(n)
        here = slice(first, first + interleave * Q)
        total = l_ref[unit, here]
        return (acc_ref[unit, here] / wide(jnp.where(total > 0, total, 1.0))).astype(q.dtype)

    def store_outputs():
        for n in range(0, num_heads, packed):
            if interleave == packed:
                x = pltpu.bitcast(output_of_head(n), jnp.int32)
            else:
                halves = [pltpu.bitcast(output_of_head(i).astype(jnp.float32), jnp.int32)
                          for i in range(n, min(n + packed, num_heads))]  # fmt: skip
                x = jnp.bitwise_or(lax.shift_right_logical(halves[0], 16), halves[-1] & UPPER_HALF)
            for c in range(0, L, LANES):
                words[c // LANES, words_of_head(n), :] = x[:, c : c + LANES]
        from_words()

    def store_lse():
        """Puts each head's in a lane."""
        lane = lax.broadcasted_iota(jnp.int32, (Q, LANES), 1)
        for first in range(0, num_heads, LANES):
            x = jnp.zeros((Q, LANES), jnp.float32)
            for n in range(first, min(first + LANES, num_heads)):
                unit, row = rows_of_head(n - n % interleave)
                here = pl.ds(row + n % interleave, Q, stride=interleave) if interleave > 1 else pl.ds(row, Q)
                total = l_ref[unit, here, :]
                log = (m_ref[unit, here, :] + jnp.log2(jnp.where(total > 0, total, 1.0))) * (1 / LOG2E)
                x = jnp.where(lane == n - first, jnp.where(total > 0, log, -jnp.inf), x)
            lse[:, first // LANES, :] = x

    def run_task(row, nth, number, slot):
        """Args:
        number: of the task. slot: of its first block in the ring.
        """
        blocks = num_blocks(row, nth)
        lax.fori_loop(0, units + 1, reset, 0)
        q_copy(row, nth).wait()
        load_queries()
        more = (nth + 1) * Q < field(NUM_TOKENS, row)
        next_row, next_nth = jnp.where(more, row, row + 1), jnp.where(more, nth + 1, 0)
        pl.when(next_row < num_active)(lambda: q_copy(next_row, next_nth).start())

        def ring_slot(block):
            return (slot + block) & (ring - 1)

        def geometry_and_masks(block):
            """The scalars of a block, read by the stages of its units."""
            here = ring_slot(block)
            left, low, column = geometry(row, nth, block)
            position = first_position(row, nth) - (first_block(row, nth) + block) * T
            has_holes = field(HOLES, row) > 0
            is_edge = (left < T) | (low > 0) | has_holes
            is_masked = is_edge
            if options.causal:
                is_masked = is_masked | (position < T - 1)
            if options.window is not None:
                is_masked = is_masked | (position + Q - 1 >= options.window)
            wait_for_pages(here)
            pl.when(is_edge)(lambda: clean(here, left, column, low))
            bits = lax.cond(has_holes, lambda: page_bits(here, column), lambda: jnp.int32(-1))
            return here, left, position, bits, is_masked

        def run_block(block, last_slot):
            """Args:
            last_slot: of the block before, whose last units end here.
            """
            slot, left, position, bits, is_masked = geometry_and_masks(block)

            def unit_before(unit, by):
                """The unit `by` steps ago; `units` stands for nothing."""
                before = unit - by
                if not isinstance(unit, int):
                    before = jnp.where(unit >= by, before, jnp.where(block == 0, units, before + steps))
                return jnp.minimum(before, units)

            def soften(unit, s):
                return softmax(unit_before(unit, 1), jnp.where(unit < 1, last_slot, slot), s[...])

            def add_values(unit, p):
                values(unit_before(unit, 2), jnp.where(unit < 2, last_slot, slot), p[...])

            def step(unit, mask, s_new, s_old, p_new, p_old):
                """In this order the compiler spills least; but two units meet again before the first has ended."""
                p_new[...] = soften(unit, s_old)
                if units <= 2:
                    add_values(unit, p_old)
                s_new[...] = scores(jnp.minimum(unit, units), slot, mask, position, left, bits)
                if units > 2:
                    add_values(unit, p_old)

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
                p_b[...] = soften(steps, s_b)
                add_values(steps, p_a)
                add_values(steps + 1, p_b)

            fetch((slot + ring - 1) & (ring - 1))  # the slot of the block before, which has ended now
            return slot

        lax.fori_loop(0, blocks, run_block, slot)

        def wait_for_last():
            for copy in out_copies(task[4], task[5]):
                copy.wait()

        pl.when(number > 0)(wait_for_last)
        store_outputs()
        if options.lse:
            store_lse()
        for copy in out_copies(row, nth):
            copy.start()
        task[4], task[5] = row, nth
        return next_row, next_nth, number + 1, ring_slot(blocks)

    def run():
        for i in range(6):
            task[i] = jnp.int32(0)
        q_copy(jnp.int32(0), jnp.int32(0)).start()
        for slot in range(ring - 1):
            fetch(jnp.int32(slot))
        zero = jnp.int32(0)
        lax.while_loop(lambda state: state[0] < num_active, lambda state: run_task(*state), (zero, zero, zero, zero))
        for copy in out_copies(task[4], task[5]):
            copy.wait()

    pl.when(num_active > 0)(run)


def prefill(q: Array, lse: Array | None, sinks: Array | None, rows: Array, table: Array, pages: Array,
            scales: Array | None, *, chunks: int, num_heads: int, sizes: PrefillSizes, options: PrefillOptions,
            ) -> tuple[Array, Array]:  # fmt: skip
    """Attends; the pages hold the new tokens already.

    Args:
        q: `[T, padded_heads, L]` in the dtype of the products, the heads of a token padded to whole registers. The
            outputs take the place of the queries of rows that take part; other tokens may hold anything.
        lse: float32 `[T, ceil(N / 128), 128]`, a head a lane, likewise; or None.
        sinks: float32 `[units, R, 128]`, or None.
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
    units = num_heads * Q // R
    num_rows = rows.shape[0] // FIELDS
    f32, vmem, smem = jnp.float32, pltpu.VMEM, pltpu.SMEM
    hbm, scalars = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=smem)
    if sinks is None:
        sinks = jnp.zeros((1, SUBLANES, LANES), f32)
    else:
        sinks = jnp.concatenate([sinks, jnp.zeros((1, R, LANES), f32)])
    if lse is None:
        lse = jnp.zeros((1, 1, LANES), f32)
    if scales is None:
        scales = jnp.zeros((1, SUBLANES, LANES), f32)
    kv_scales = (sizes.blocks_in_ring, sizes.pages_per_block) if options.quantised else (1, 1)
    arrays = (table.reshape(-1, 1, IDS), pages, scales, q, lse)
    return pl.pallas_call(
        functools.partial(_kernel, num_rows=num_rows, chunks=chunks, num_heads=num_heads, sizes=sizes, options=options),
        name="paged_prefill",
        out_shape=(pltpu.HBM(q.shape, q.dtype), pltpu.HBM(lse.shape, f32)),
        in_specs=[scalars, pl.BlockSpec(memory_space=vmem)] + [hbm] * len(arrays),
        out_specs=(hbm, hbm),
        input_output_aliases={5: 0, 6: 1},
        scratch_shapes=[
            vmem((sizes.blocks_in_ring, sizes.pages_per_block, *pages.shape[1:]), pages.dtype),
            vmem((*kv_scales, *scales.shape[1:]), f32),
            smem((6,), jnp.int32),
            smem((sizes.blocks_in_ring,), jnp.int32),
            smem((sizes.blocks_in_ring * IDS,), jnp.int32),
            vmem((Q, *q.shape[1:]), q.dtype),
            vmem((L // LANES, Q * q.shape[1] * q.dtype.itemsize // 4, LANES), jnp.int32),
            vmem((units, R, L), q.dtype),
            vmem((Q, *q.shape[1:]), q.dtype),
            vmem((Q if options.lse else 1, *lse.shape[1:]), f32),
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
    )(rows, sinks, *(in_hbm(x) for x in arrays))
