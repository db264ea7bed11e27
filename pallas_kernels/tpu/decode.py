"""Decode: one new token a sequence, appended to its page and attended in the same pass over the pages.

The kernel walks a flat sequence of *items*, a block of T tokens of one sequence each, so that short contexts are
just more items and the pipeline never drains between sequences. Items pass through these stages:

    plan     the walker names the next item; the page ids of its block are copied from HBM to scalar memory
    fetch    its pages are copied to a slot of the ring, `ahead` items before they are needed
    scores   q . K on the matrix unit              }
    softmax  `distance` items later                  } W items, a *group*, in one basic block
    values   p . V, twice as many items later        }

The stages of a basic block work on different items, so none waits for another. Every wait is a scheduling
barrier, hence a group waits once, at its top. The slots of the ring are separate references: a dynamic index
into one costs nine cycles a copy. Lists live in HBM and stream, so no table size overflows scalar memory.
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
from pallas_kernels.tpu.heads import HeadPacking
from pallas_kernels.tpu.memory import IDS, WORD_PART, by_rows, in_hbm, is_streamed, tiled_as_in_hbm
from pallas_kernels.tpu.products import Products
from pallas_kernels.tpu.walk import BROKEN, FIELDS, LAST_PAGE, LAST_SLOT, TOKEN, WORD_BITS, DecodeSizes, Walk


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """What a call asks for, apart from sizes."""

    scale: float
    bounded: bool  # keys before a row's FIRST_KEY are hidden
    soft_cap: float | None
    append: bool
    sinks: bool
    lse: bool
    quantised: bool
    name: str = "paged_decode"


def _kernel(rows, q_hbm, new_hbm, sink_vmem, table, pages_in, scales_in,
            out_hbm, lse_hbm, pages, scales, *scratch,
            num_rows: int, chunks: int, streams: bool, sizes: DecodeSizes, packing: HeadPacking,
            options: DecodeOptions):  # fmt: skip
    del pages_in, scales_in  # the same memory as `pages` and `scales`
    quantised = options.quantised
    S, NP, W, U = sizes.page_size, sizes.pages_per_item, sizes.items_per_group, sizes.items_in_ring
    T, ahead, plan_ahead = sizes.tokens, sizes.ahead, sizes.plan_ahead if streams else 0
    D, lag = sizes.distance, sizes.lag
    num_active, num_items = rows[FIELDS * num_rows], rows[FIELDS * num_rows + 1]
    num_groups_in_ring = U // W
    K, E, L = packing.num_kv_heads, packing.heads_per_pass, packing.lanes
    R, G, num_rows_q = packing.rows_per_pass, packing.padded_group, packing.rows
    planes = pages.shape[2] // S  # 2: value rows below key rows; 1: side by side in the lanes
    value_row = (planes - 1) * S
    packed = 4 // pages.dtype.itemsize  # values in a 32-bit word
    tile_rows = SUBLANES * packed  # what a copy can address
    # Keys and values have a tile each, unless a page of 8-bit values is so small that they share one.
    share_tile = planes == 2 and tile_rows == 2 * S
    products = Products(q_hbm.dtype, S, value_row, packing, sizes.transposed_passes)
    tiles_per_token = 1 if share_tile else planes
    ring, scratch = [by_rows(slot, 4) for slot in scratch[:U]], scratch[U:]  # with the spare pages of each slot
    slots = [slot.at[pl.ds(0, NP)] for slot in ring] if sizes.hides_copies else ring
    scale_slots, scratch = (scratch[:U], scratch[U:]) if quantised else ([], scratch)
    (pages_due, rows_due, dirty, outs_due, tiles_due, q, new, out, lse, tile, scale_tile,
     m_ref, l_ref, acc_ref, s_ref, p_ref, alpha_ref, d_ref, top_ref,
     page_sem, row_sem, out_sem, tile_sem, *walk_refs) = scratch  # fmt: skip
    q, out, tile = by_rows(q, 4), by_rows(out, 3), by_rows(tile, 5)
    walk = Walk(sizes, rows, table, num_rows, num_active, chunks, streams, options.bounded, *walk_refs)

    def add(values):
        return functools.reduce(lambda a, b: a + b, values)

    # ---- data movement -------------------------------------------------------------------------------------
    def row_copies(r):
        """The query of the item's sequence and, where it is appended, its new token."""
        sequence, row = walk.sequence_of[r], walk.field(TOKEN, walk.row_of[r])
        copies = [(q_hbm.at[row], q.at[sequence])]
        if options.append:
            copies.append((new_hbm.at[row], new.at[sequence]))
        return copies

    def start(copies, sem):
        for condition, source, target in copies:
            pl.when(condition)(pltpu.make_async_copy(source, target, sem).start)

    def fetch(item, slot):
        """Starts the copies of the item's pages."""
        r = walk.record(item)
        left, base = walk.left_of[r], walk.ids_of[r]
        for j in range(NP):
            wanted = left > j * S
            if options.bounded:
                wanted = wanted & (walk.low_of[r] < (j + 1) * S)
            page, sem = walk.ids[base + j], page_sem.at[slot // W]
            # One copy under a condition is a predicated descriptor, not a branch.
            pl.when(wanted)(pltpu.make_async_copy(pages.at[page], slots[slot].at[j], sem).start)
            if quantised:
                pl.when(wanted)(pltpu.make_async_copy(scales.at[page], scale_slots[slot].at[j], sem).start)

    def fetch_rows(first, at):
        """Copies the rows of a group and remembers what it will wait for, and how many items are to be cleaned."""
        records = [walk.record(first + w) for w in range(W)]
        for r in records:
            start([(walk.first_of[r] > 0, *copy) for copy in row_copies(r)], row_sem.at[at])
        pages_due[at] = add([walk.count_of[r] for r in records])
        rows_due[at] = add([walk.first_of[r] for r in records])
        dirty[at] = add([walk.dirty_of[r] for r in records])

    def wait(ref, count, sem):
        """Waits for the bytes of `count` leading elements of `ref`."""
        part = ref.at[pl.ds(0, count)]
        pl.when(count > 0)(pltpu.make_async_copy(part, part, sem).wait)

    def arrive(at):
        wait(pages, pages_due[at], page_sem.at[at])
        if quantised:
            wait(scales, pages_due[at], page_sem.at[at])
        wait(q_hbm, rows_due[at], row_sem.at[at])
        if options.append:
            wait(new_hbm, rows_due[at], row_sem.at[at])

    def leave(at):
        """Waits for what the group at this place of the ring sent to HBM a lap ago."""
        wait(out_hbm, outs_due[at], out_sem.at[at])
        if options.lse:
            wait(lse_hbm, outs_due[at], out_sem.at[at])
        if options.append:
            wait(tile, tiles_due[at], tile_sem.at[at])
        if options.append and quantised:
            wait(scale_tile, tiles_due[at], tile_sem.at[at])

    def send_output(r, at):
        sequence, row = walk.sequence_of[r], walk.field(TOKEN, walk.row_of[r])
        copies = [(walk.is_last(r), out.at[sequence], out_hbm.at[row])]
        if options.lse:
            copies.append((walk.is_last(r), lse.at[sequence], lse_hbm.at[row]))
        start(copies, out_sem.at[at])

    # ---- the pages of an item: what is new is put in, what does not exist becomes zero -----------------------
    def zero(slot, j, count=1):
        shape = (count, K, S, L)
        ring[slot][pl.ds(j, count), :, value_row : value_row + S, :] = jnp.zeros(shape, pages.dtype)

    def zero_from(slot, j):
        """Zeroes the values of the pages from j on, and of spare ones: a branch costs as much as a dozen stores."""
        several = 1 + sizes.spare_pages
        num = lax.div(NP - j + several - 1, several)
        lax.fori_loop(0, num, lambda i, _: zero(slot, j + i * several, several), None)

    def clean(r, slot):
        """Zeroes the values after the tile of the sequence's last token: 0 * NaN is NaN."""
        row, goes_on, tiles = walk.row_of[r], walk.left_of[r] > T, S // tile_rows
        last_page = walk.field(LAST_PAGE, row)
        last_tile = jnp.where(goes_on, tiles, lax.div(walk.field(LAST_SLOT, row), tile_rows))
        places = [pl.ds(value_row + t * tile_rows, tile_rows) for t in range(1, tiles)]
        values = [slots[slot][last_page, :, place, :] for place in places]
        for t, (place, x) in enumerate(zip(places, values, strict=True), 1):
            slots[slot][last_page, :, place, :] = jnp.where(t > last_tile, jnp.zeros_like(x), x)
        return jnp.where(goes_on, NP, last_page + 1)

    def mend(r, slot):
        """Zeroes the values of other pages that do not exist, and takes the bits of those that the row lacks."""

        def look(j, bits):
            is_hole = walk.page_id(r, j) == 0
            is_missing = is_hole | ((j + 1) * S <= walk.low_of[r]) if options.bounded else is_hole
            pl.when(is_missing)(lambda: zero(slot, j))
            own = jnp.left_shift(1, j & (WORD_BITS - 1))
            is_mine = [is_hole & (lax.div(j, WORD_BITS) == i) for i in range(len(bits))]
            return [jnp.where(mine, word & ~own, word) for mine, word in zip(is_mine, bits, strict=True)]

        @pl.when(walk.dirty_of[r] >= BROKEN)
        def _():
            walk.set_bits(r, lax.fori_loop(0, NP, look, walk.bits(r)))

    def put_new_token(r, slot):
        """Appends to the tile of the last token, as 32-bit words; other items keep theirs as it is.

        There is no branch, so that the work hides beside the matrix unit. Returns the copies to HBM that are due.
        """
        row, sequence, ends = walk.row_of[r], walk.sequence_of[r], walk.ends_here(r)
        j, at = walk.field(LAST_PAGE, row), walk.field(LAST_SLOT, row)
        sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, L), 0)

        def bits_at(row_in_tile):
            """Of the words of a tile: the bits of a row, and those that are not behind it."""
            part = (row_in_tile & (packed - 1)) * (32 // packed)
            word = lax.div(row_in_tile, packed)
            own = jnp.left_shift(jnp.int32(WORD_PART[packed]), part)
            kept = jnp.where(sublane == word, own | (jnp.left_shift(1, part) - 1), jnp.where(sublane > word, 0, -1))
            return jnp.where((sublane == word) & ends, own, 0), jnp.where(ends, kept, -1)

        if share_tile:
            by_tile = [[(0, at), (1, S + at)]]  # of each tile the planes in it and the token's row
        else:
            by_tile = [[(e, at & (tile_rows - 1))] for e in range(planes)]
        bits = [[(e, *bits_at(row_in_tile)) for e, row_in_tile in parts] for parts in by_tile]
        first_row = jnp.int32(0) if share_tile else at - (at & (tile_rows - 1))
        places = [pl.ds(pl.multiple_of(t * S + first_row, tile_rows), tile_rows) for t in range(tiles_per_token)]
        tiles = {(h, t): slots[slot][j, h, places[t], :] for h in range(K) for t in range(tiles_per_token)}
        for (h, t), x in tiles.items():  # after all loads: a load waits for a store that it might alias
            x = pltpu.bitcast(x, jnp.int32)
            if options.append:
                for e, own, _ in bits[t]:
                    x = x ^ ((x ^ new[sequence, h * planes + e : h * planes + e + 1, :]) & own)
                tile[sequence, h, t] = pltpu.bitcast(x, pages.dtype)
            if t == tiles_per_token - 1:
                x = x & bits[t][-1][2]
            slots[slot][j, h, places[t], :] = pltpu.bitcast(x, pages.dtype)
        if not options.append:
            return []
        page = walk.page_id(r, j)
        copies = [(ends, tile.at[sequence, :, t], pages.at[page, :, place, :]) for t, place in enumerate(places)]
        if quantised:
            x = scale_slots[slot][j]
            lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
            for e in range(2):
                is_new = (lane == e * S + at) & ends
                own = new[sequence, (planes + e) * K : (planes + e + 1) * K, :1]
                x = jnp.where(is_new, jnp.broadcast_to(pltpu.bitcast(own, jnp.float32), x.shape), x)
            scale_slots[slot][j] = x
            scale_tile[sequence] = x
            copies.append((ends, scale_tile.at[sequence], scales.at[page]))
        return copies

    # ---- the softmax between the products -------------------------------------------------------------------
    head_of_row = lax.broadcasted_iota(jnp.int32, (R, 1), 0)

    def scales_of_rows(slot, first, factor=1.0):
        """The scales of an item's keys or values, times a factor and spread over the query rows: `[rows, T]`."""
        x = jnp.concatenate([scale_slots[slot][j, :, first : first + S] for j in range(NP)], axis=1) * factor  # [K, T]
        passes = []
        for n in range(packing.num_passes):
            y = jnp.broadcast_to(x[n * E : n * E + 1], (R, T))
            for e in range(1, E):
                y = jnp.where(head_of_row >= e * G, x[n * E + e : n * E + e + 1], y)
            passes.append(y)
        return jnp.concatenate(passes, axis=0)

    column = lax.broadcasted_iota(jnp.int32, (1, T), 1)
    page_of_column = lax.convert_element_type((lax.convert_element_type(column, jnp.float32) + 0.5) / S, jnp.int32)

    def softmax(r, slot, s, m, total):
        factor = options.scale * LOG2E if options.soft_cap is None else options.scale / options.soft_cap
        s = s * (scales_of_rows(slot, 0, factor) if quantised else factor)
        if options.soft_cap is not None:
            s = jnp.tanh(s) * (options.soft_cap * LOG2E)
        exists = (column < walk.left_of[r]) & walk.has_page(r, page_of_column)
        if options.bounded:
            exists = exists & (column >= walk.low_of[r])
        s = jnp.where(exists, s, MASKED)
        is_first = walk.first_of[r] > 0
        m_before = jnp.where(is_first, sink_vmem[...] * LOG2E if options.sinks else FLOOR, m)
        l_before = jnp.where(is_first, 1.0 if options.sinks else 0.0, total)
        m = jnp.maximum(m_before, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp2(s - m[:, :1])
        alpha = jnp.exp2(m_before - m)
        total = l_before * alpha + jnp.sum(p, axis=1, keepdims=True)
        if quantised:  # the scale of a key that does not exist may be NaN
            p = jnp.where(exists, p * scales_of_rows(slot, S), 0.0)
        return p.astype(q.dtype), alpha, m, total

    def lanes(x):
        """A value held in all 128 lanes, `[rows, 128]`, in L lanes."""
        return x if L == LANES else jnp.broadcast_to(x[:, :1], (num_rows_q, L))

    def put_lse(sequence, x):
        """Puts that of each query row in a lane of its own."""
        shape = (num_rows_q, LANES)
        row_minus_lane = lax.broadcasted_iota(jnp.int32, shape, 0) - lax.broadcasted_iota(jnp.int32, shape, 1)
        for i in range(lse.shape[1]):
            own = jnp.where(row_minus_lane == i * LANES, x, -jnp.inf)
            lse[sequence, i : i + 1, :] = jnp.max(own, axis=0, keepdims=True)

    def after_copies(x, r, slot):
        """Packed queries as they are, which the scheduler can have only when the copies to the slot have started.

        Nothing else needs a copy that has just started, so the scheduler would put all of them behind the last product,
        where nothing hides them. This reads a spare page at an address that it does not know, and takes none of it.
        """
        spare = ring[slot][NP + jnp.minimum(walk.first_of[r], 0), 0, :tile_rows, :]
        spare = pltpu.bitcast(spare, x.dtype)[:SUBLANES]
        spare = jnp.concatenate([spare] * (x.shape[2] // spare.shape[1]), axis=1)
        spare = jnp.concatenate([spare] * (x.shape[1] // SUBLANES), axis=0)
        return jnp.where(walk.first_of[r] < 0, spare[None], x)

    # ---- the pipeline --------------------------------------------------------------------------------------
    def send(r, slot, p, alpha, d, top, acc, at):
        """Adds an item's values and writes the output, which counts where the item is its sequence's last."""
        acc = jnp.where(walk.first_of[r] > 0, 0.0, acc * lanes(alpha)) + products.values(p, slots[slot])
        out[walk.sequence_of[r]] = (acc / lanes(jnp.where(d > 0, d, 1.0))).astype(out.dtype)
        if options.lse:
            log = (top + jnp.log2(jnp.where(d > 0, d, 1.0))) * (1 / LOG2E)
            put_lse(walk.sequence_of[r], jnp.where(d > 0, log, -jnp.inf))
        return acc

    def group(first, u0, is_last_group=False):
        """The stages of W items; behind the last items only what is left to do for those before."""
        at = u0 // W
        steps = lag if is_last_group else W
        records = [walk.record(first + w) for w in range(steps)]
        leave(at)
        if not is_last_group:
            arrive(at)
            if streams:
                walk.ids_arrive(first + ahead)

            @pl.when(dirty[at] > 0)
            def _():
                first_gaps = [clean(r, u0 + w) for w, r in enumerate(records)]
                for w, first in enumerate(first_gaps):
                    zero_from(u0 + w, first)

            @pl.when(dirty[at] >= BROKEN)
            def _():
                for w, r in enumerate(records):
                    mend(r, u0 + w)

            for w, r in enumerate(records):
                start(put_new_token(r, u0 + w), tile_sem.at[at])
        scored = [s_ref[i] for i in range(D)]
        weighted = [(p_ref[i], alpha_ref[i], d_ref[i], top_ref[i]) for i in range(D)]
        m, total, acc = m_ref[...], l_ref[...], acc_ref[...]
        for w, r in enumerate(records):
            acc = send(walk.record(first + w - lag), (u0 + w - lag) % U, *weighted.pop(0), acc, at)
            if not is_last_group:
                products.prepare(slots[u0 + w])
                queries = q[walk.sequence_of[r]]
                if sizes.hides_copies and w:
                    queries = after_copies(queries, r, (u0 + w - 1 + ahead) % U)
                scored.append(products.scores(queries, slots[u0 + w]))
                walk.plan(first + w + ahead + plan_ahead)
                if sizes.hides_copies:
                    fetch(first + w + ahead, (u0 + w + ahead) % U)
            if scored:
                before, slot = walk.record(first + w - D), (u0 + w - D) % U
                p, alpha, m, total = softmax(before, slot, scored.pop(0), m, total)
                weighted.append((p, alpha, total, m))
        for r in records:
            send_output(walk.record(r - lag), at)
        outs_due[at] = add([jnp.where(walk.is_last(walk.record(r - lag)), 1, 0) for r in records])
        if is_last_group:
            tiles_due[at] = jnp.int32(0)
            return
        tiles_due[at] = add([jnp.where(walk.ends_here(r), 1, 0) for r in records])
        if not sizes.hides_copies:
            for w in range(W):
                fetch(first + w + ahead, (u0 + w + ahead) % U)
        fetch_rows(first + ahead, (u0 + ahead) % U // W)
        for i in range(D):
            s_ref[i] = scored[i]
            p_ref[i], alpha_ref[i], d_ref[i], top_ref[i] = weighted[i]
        m_ref[...], l_ref[...], acc_ref[...] = m, total, acc

    def run():
        walk.start()
        for at in range(num_groups_in_ring):
            outs_due[at] = tiles_due[at] = jnp.int32(0)
        for item in range(plan_ahead):
            walk.plan(jnp.int32(item))

        @pl.loop(0, ahead // W)
        def _(g):
            for w in range(W):
                walk.plan(g * W + (w + plan_ahead))
            if streams:
                walk.ids_arrive(g * W)
            fetch_rows(g * W, g)  # before all pages, behind which they would arrive

        for item in range(ahead):
            fetch(jnp.int32(item), item)
        # Scores, weights and sums hold anything yet: the first item of a sequence starts anew.
        num_groups = lax.div(num_items + (W - 1), W)

        def lap(g0):
            for u0 in range(0, U, W):
                g = g0 + u0 // W
                pl.when(g < num_groups)(functools.partial(group, g * W, u0))
                pl.when(g == num_groups)(functools.partial(group, g * W, u0, is_last_group=True))
            return g0 + num_groups_in_ring

        lax.while_loop(lambda g0: g0 <= num_groups, lap, jnp.int32(0))
        for at in range(num_groups_in_ring):
            leave(at)
        for g in range(plan_ahead // W):  # planned, never fetched
            walk.ids_arrive(num_groups * W + ahead + g * W)

    pl.when(num_items > 0)(run)


def decode(q: Array, new: Array | None, sinks: Array | None, rows: Array, table: Array,
           pages: Array, scales: Array | None, *, chunks: int, sizes: DecodeSizes, packing: HeadPacking,
           options: DecodeOptions) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Attends and appends.

    Args:
        q: packed queries `[T, passes, R, E * L]`.
        new: int32 `[T, K * planes, L]`, the new rows of a page, each value in all parts of its word; for 8-bit pages
            `[T, K * (planes + 2), L]`, followed by the bits of the scales of keys and values; or None.
        sinks: float32 `[rows, 128]`, or None.
        rows: int32 `[FIELDS * B + 2]`: the fields of each row that takes part, in order and field by field, then
            the number of such rows and of their items.
        table: int32 `[B * chunks * 128]`, the page ids, of each row in so many chunks; 0: no page.
        pages: `[P, K, planes * S, L]`.
        scales: float32 `[P, K, R]`, for 8-bit pages; or None.

    Returns:
        out `[T, rows, L]` in q's dtype, lse float32 `[T, ceil(rows / 128), 128]`, the pages and their scales. Tokens of
        rows that take no part are not written.
    """
    num_tokens, num_rows = q.shape[0], rows.shape[0] // FIELDS
    streams = is_streamed(table)
    W, U, D = sizes.items_per_group, sizes.items_in_ring, sizes.distance
    N, L = packing.rows, packing.lanes
    planes = pages.shape[2] // sizes.page_size
    tile_rows = SUBLANES * 4 // pages.dtype.itemsize
    f32, i32 = jnp.float32, jnp.int32
    ring = sizes.sequences + 1  # the last entry takes what nobody reads
    if new is None:
        new = jnp.zeros((1, SUBLANES, LANES), i32)
    if sinks is None:
        sinks = jnp.zeros((SUBLANES, LANES), f32)
    quantised = scales is not None
    if scales is None:
        scales = jnp.zeros((1, SUBLANES, LANES), f32)
    num_heads = pages.shape[1]
    share_tile = planes == 2 and tile_rows == 2 * sizes.page_size
    tile = (ring, num_heads, 1 if share_tile else planes, tile_rows, L)
    vmem, smem = pltpu.VMEM, pltpu.SMEM
    hbm, scalars = pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=smem)
    if streams:
        table = table.reshape(-1, 1, IDS)
    lse_rows = -(-N // LANES)
    lse_shape = (num_tokens, lse_rows, LANES) if options.lse else (1, SUBLANES, LANES)
    kept = (ring, lse_rows, LANES) if options.lse else (1, SUBLANES, LANES)
    slot = (sizes.pages_per_item + sizes.spare_pages, *pages.shape[1:])
    scratch = [tiled_as_in_hbm(slot, pages.dtype)] * U
    if quantised:
        scratch += [vmem((sizes.pages_per_item, *scales.shape[1:]), f32)] * U
    scratch += [smem((U // W,), i32)] * 5
    scratch += (
        [
            tiled_as_in_hbm((ring, *q.shape[1:]), q.dtype),
            vmem((ring, *new.shape[1:]), i32),
            tiled_as_in_hbm((ring, N, L), q.dtype),
            vmem(kept, f32),
            tiled_as_in_hbm(tile, pages.dtype),
            vmem((ring, *scales.shape[1:]), f32),
            vmem((N, LANES), f32),
            vmem((N, LANES), f32),
            vmem((N, L), f32),
            vmem((D, N, sizes.tokens), f32),
            vmem((D, N, sizes.tokens), q.dtype),
            vmem((D, N, LANES), f32),
            vmem((D, N, LANES), f32),
            vmem((D, N, LANES), f32),
        ]
        + [pltpu.SemaphoreType.DMA((U // W,))] * 4
        + Walk.scratch(sizes, streams)
    )
    q, new, pages, scales = (in_hbm(x) for x in (q, new, pages, scales))
    if streams:
        table = in_hbm(table)
    kernel = functools.partial(
        _kernel, num_rows=num_rows, chunks=chunks, streams=streams, sizes=sizes, packing=packing, options=options
    )
    return pl.pallas_call(
        kernel,
        name=options.name,
        out_shape=(
            pltpu.HBM((num_tokens, N, L), q.dtype),
            pltpu.HBM(lse_shape, f32),
            pltpu.HBM(pages.shape, pages.dtype),
            pltpu.HBM(scales.shape, f32),
        ),
        in_specs=[scalars, hbm, hbm, pl.BlockSpec(memory_space=vmem), hbm if streams else scalars, hbm, hbm],
        out_specs=(hbm, hbm, hbm, hbm),
        input_output_aliases={5: 2, 6: 3},
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=56 << 20, disable_bounds_checks=True),
    )(rows, q, new, sinks, table, pages, scales)
