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

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tpu.heads import LANES, SUBLANES, HeadPacking
from pallas_kernels.tpu.memory import WORD_PART, in_hbm
from pallas_kernels.tpu.products import Products

MASKED = -1e30  # score of a key that does not exist
FLOOR = -1e20  # the running maximum before the first key: exp2(MASKED - FLOOR) is 0
LOG2E = 1.4426950408889634
IDS = 128  # page ids in a chunk of the page table: one row of lanes
ID_GROUPS = 16  # groups whose page ids can be under way; a power of two
FIELDS = 9  # of a row in `rows`
TABLE_ROW, LENGTH, TOKEN, FIRST_KEY, FIRST_BLOCK, FIRST_PAGE, LAST_PAGE, LAST_SLOT, HOLES = range(FIELDS)
RESIDENT_BYTES = 256 << 10  # a page table up to this size lies in scalar memory, a larger one streams


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Static sizes of one kernel.

    Args:
        page_size: S.
        pages_per_item: pages in a block of T tokens; a power of two, at most 32.
        items_per_group: W.
        items_in_ring: U, a multiple of W.
        distance: D, the items between an item's scores and its softmax, and between that and its values.
    """

    page_size: int
    pages_per_item: int
    items_per_group: int
    items_in_ring: int
    distance: int = 1

    @property
    def tokens(self) -> int:
        return self.page_size * self.pages_per_item

    @property
    def ahead(self) -> int:
        """Items between an item's fetch and its scores."""
        return self.items_in_ring - -(-self.lag // self.items_per_group) * self.items_per_group

    @property
    def lag(self) -> int:
        """Items between an item's scores and its values."""
        return 2 * self.distance

    @property
    def plan_ahead(self) -> int:
        """Items between an item's plan and its fetch, where the page table streams."""
        return 8 * self.items_per_group

    @property
    def records(self) -> int:
        """Items whose scalars are kept: from the plan to the values."""
        return pl.next_power_of_2(self.items_in_ring + self.plan_ahead + 3 * self.items_per_group)

    @property
    def sequences(self) -> int:
        """Sequences whose queries, new tokens and outputs are kept."""
        return pl.next_power_of_2(self.items_in_ring + 2 * self.items_per_group)


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


def _kernel(rows, q_hbm, new_hbm, new_scales_hbm, sink_vmem, table, pages_in, scales_in,
            out_hbm, lse_hbm, pages, scales, *scratch,
            num_rows: int, chunks: int, streams: bool, sizes: DecodeSizes, packing: HeadPacking,
            options: DecodeOptions):  # fmt: skip
    del pages_in, scales_in  # the same memory as `pages` and `scales`
    quantised = options.quantised
    S, NP, W, U = sizes.page_size, sizes.pages_per_item, sizes.items_per_group, sizes.items_in_ring
    T, ahead, plan_ahead = sizes.tokens, sizes.ahead, sizes.plan_ahead if streams else 0
    D, lag = sizes.distance, sizes.lag
    num_active, num_items = rows[FIELDS * num_rows], rows[FIELDS * num_rows + 1]
    num_groups_in_ring, last_record, last_sequence = U // W, sizes.records - 1, sizes.sequences - 1
    K, E, L = packing.num_kv_heads, packing.heads_per_pass, packing.lanes
    R, G, num_rows_q = packing.rows_per_pass, packing.padded_group, packing.rows
    all_pages = (1 << NP) - 1 if NP < 32 else -1  # a bit for each page of an item
    planes = pages.shape[2] // S  # 2: value rows below key rows; 1: side by side in the lanes
    value_row = (planes - 1) * S
    packed = 4 // pages.dtype.itemsize  # values in a 32-bit word
    tile_rows = SUBLANES * packed  # what a copy can address
    # Keys and values have a tile each, unless a page of 8-bit values is so small that they share one.
    share_tile = planes == 2 and tile_rows == 2 * S
    products = Products(q_hbm.dtype, S, value_row, packing)
    tiles_per_token = 1 if share_tile else planes
    slots, scratch = scratch[:U], scratch[U:]
    scale_slots, scratch = (scratch[:U], scratch[U:]) if quantised else ([], scratch)
    (cursor, row_of, left_of, low_of, bits_of, count_of, dirty_of, first_of, sequence_of, ids_of,
     pages_due, rows_due, outs_due, tiles_due,
     ids, q, new, new_scales, out, lse, tile, scale_tile,
     m_ref, l_ref, acc_ref, s_ref, p_ref, alpha_ref, d_ref, top_ref,
     page_sem, row_sem, id_sem, out_sem, tile_sem) = scratch  # fmt: skip
    ids = ids if streams else table

    def field(index, row):
        return rows[index * num_rows + row]

    # ---- the walk over items -------------------------------------------------------------------------------
    def plan(item):
        """Writes the item's record, starts the copy of its page ids and advances the walker."""
        nth, block = cursor[0], cursor[1]
        real = nth < num_active
        row = jnp.minimum(nth, num_active - 1)
        length = field(LENGTH, row)
        left = length - block * T
        first_page = block * NP
        first = block == field(FIRST_BLOCK, row)
        end = jnp.where(left > T, NP, field(LAST_PAGE, row) + 1)
        begin = jnp.where(first, field(FIRST_PAGE, row), 0) if options.bounded else 0
        chunk = field(TABLE_ROW, row) * chunks + jnp.right_shift(first_page, IDS.bit_length() - 1)
        r = item & last_record
        row_of[r] = row
        left_of[r] = jnp.where(real, left, 0)
        bits = jnp.left_shift(2, end - 1) - jnp.left_shift(1, begin)
        is_dirty = (bits != all_pages) | (left < T) | (field(HOLES, row) > 0)
        bits_of[r] = bits
        dirty_of[r] = jnp.where(real & is_dirty, 1, 0)
        count_of[r] = jnp.where(real, end - begin, 0)
        first_of[r] = jnp.where(real & first, 1, 0)
        # Items past the end leave their output where nobody looks.
        sequence_of[r] = jnp.where(real, nth & last_sequence, last_sequence + 1)
        ids_of[r] = (r if streams else chunk) * IDS + (first_page & (IDS - 1))
        if options.bounded:
            low_of[r] = jnp.where(real, field(FIRST_KEY, row) - block * T, T)
        if streams:
            here = pl.ds(pl.multiple_of(r * IDS, IDS), IDS)
            pltpu.make_async_copy(table.at[chunk, 0], ids.at[here], id_sem.at[id_group(item)]).start()
        finished = left <= T
        following = jnp.minimum(nth + 1, num_active - 1)
        cursor[0] = jnp.where(finished & real, nth + 1, nth)
        cursor[1] = jnp.where(finished, field(FIRST_BLOCK, following), block + 1)

    def id_group(item):
        return jnp.right_shift(item, W.bit_length() - 1) & (ID_GROUPS - 1)

    def page_id(r, j):
        return ids[ids_of[r] + j]

    def is_last(r):
        return (left_of[r] > 0) & (left_of[r] <= T)

    def ends_here(r):
        """Whether the item has the page of the newest token; it lacks it if that page is not mapped."""
        return is_last(r) & ((jnp.right_shift(bits_of[r], field(LAST_PAGE, row_of[r])) & 1) > 0)

    def add(values):
        return functools.reduce(lambda a, b: a + b, values)

    # ---- data movement -------------------------------------------------------------------------------------
    def row_copies(r):
        """The query of the item's sequence and, where it is appended, its new token."""
        sequence, row = sequence_of[r], field(TOKEN, row_of[r])
        copies = [(q_hbm.at[row], q.at[sequence])]
        if options.append:
            copies.append((new_hbm.at[row], new.at[sequence]))
        if options.append and quantised:
            copies.append((new_scales_hbm.at[row], new_scales.at[sequence]))
        return copies

    def fetch(item, slot):
        r = item & last_record
        left, base = left_of[r], ids_of[r]
        for j in range(NP):
            wanted = left > j * S
            if options.bounded:
                wanted = wanted & (low_of[r] < (j + 1) * S)
            page, sem = ids[base + j], page_sem.at[slot // W]
            # One copy under a condition is a predicated descriptor, not a branch.
            pl.when(wanted)(pltpu.make_async_copy(pages.at[page], slots[slot].at[j], sem).start)
            if quantised:
                pl.when(wanted)(pltpu.make_async_copy(scales.at[page], scale_slots[slot].at[j], sem).start)

        for source, target in row_copies(r):
            pl.when(first_of[r] > 0)(pltpu.make_async_copy(source, target, row_sem.at[slot // W]).start)

    def fetch_group(first, u0):
        """Fetches W items and remembers what the group will wait for."""
        for w in range(W):
            fetch(first + w, u0 + w)
        pages_due[u0 // W] = add([count_of[(first + w) & last_record] for w in range(W)])
        rows_due[u0 // W] = add([first_of[(first + w) & last_record] for w in range(W)])

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
        if options.append and quantised:
            wait(new_scales_hbm, rows_due[at], row_sem.at[at])

    def ids_arrive(item):
        part = ids.at[pl.ds(0, W * IDS)]
        pltpu.make_async_copy(part, part, id_sem.at[id_group(item)]).wait()

    def leave(at):
        """Waits for what the group at this place of the ring sent to HBM a lap ago."""
        wait(out_hbm, outs_due[at], out_sem.at[at])
        if options.lse:
            wait(lse_hbm, outs_due[at], out_sem.at[at])
        if options.append:
            wait(tile, tiles_due[at], tile_sem.at[at])
        if options.append and quantised:
            wait(scale_tile, tiles_due[at], tile_sem.at[at])

    def start(copies, sem):
        for condition, source, target in copies:
            pl.when(condition)(pltpu.make_async_copy(source, target, sem).start)

    def send_output(r, at):
        sequence, row = sequence_of[r], field(TOKEN, row_of[r])
        copies = [(is_last(r), out.at[sequence], out_hbm.at[row])]
        if options.lse:
            copies.append((is_last(r), lse.at[sequence], lse_hbm.at[row]))
        start(copies, out_sem.at[at])

    # ---- the pages of an item: what is new is put in, what does not exist becomes zero -----------------------
    def clean(r, slot):
        """Zeroes the values that do not exist, but for the tile of the last token: 0 * NaN is NaN."""
        left, row = left_of[r], row_of[r]
        has_holes = field(HOLES, row) > 0

        @pl.when(dirty_of[r] > 0)
        def _():
            def drop_hole(j, bits):
                return jnp.where(page_id(r, j) > 0, bits, bits & ~jnp.left_shift(1, j))

            @pl.when(has_holes)
            def _():
                bits_of[r] = lax.fori_loop(0, NP, drop_hole, bits_of[r])

            def page(j, _):
                @pl.when((jnp.right_shift(bits_of[r], j) & 1) == 0)
                def _():
                    slots[slot][j, :, value_row : value_row + S, :] = jnp.zeros((K, S, L), pages.dtype)

                return 0

            def behind(t, _):
                here = pl.ds(pl.multiple_of(value_row + t * tile_rows, tile_rows), tile_rows)
                j = field(LAST_PAGE, row)
                slots[slot][j, :, here, :] = jnp.zeros((K, tile_rows, L), pages.dtype)
                return 0

            lax.fori_loop(0, NP, page, 0)
            first_behind = lax.div(field(LAST_SLOT, row), tile_rows) + 1
            lax.fori_loop(jnp.where(left <= T, first_behind, S // tile_rows), S // tile_rows, behind, 0)

    def put_new_token(r, slot):
        """Appends to the tile of the last token, as 32-bit words; other items keep theirs as it is.

        There is no branch, so that the work hides beside the matrix unit. Returns the copies to HBM that are due.
        """
        row, sequence, ends = row_of[r], sequence_of[r], ends_here(r)
        j, at = field(LAST_PAGE, row), field(LAST_SLOT, row)
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
        page = page_id(r, j)
        copies = [(ends, tile.at[sequence, :, t], pages.at[page, :, place, :]) for t, place in enumerate(places)]
        if quantised:
            x = scale_slots[slot][j]
            lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
            for e in range(2):
                is_new = (lane == e * S + at) & ends
                x = jnp.where(is_new, jnp.broadcast_to(new_scales[sequence, e][:, :1], x.shape), x)
            scale_slots[slot][j] = x
            scale_tile[sequence] = x
            copies.append((ends, scale_tile.at[sequence], scales.at[page]))
        return copies

    # ---- the softmax between the products -------------------------------------------------------------------
    head_of_row = lax.broadcasted_iota(jnp.int32, (R, 1), 0)

    def scales_of_rows(slot, first):
        """The scales of an item's keys or values, spread over the query rows: `[rows, T]`."""
        x = jnp.concatenate([scale_slots[slot][j, :, first : first + S] for j in range(NP)], axis=1)  # [K, T]
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
        if quantised:
            s = s * scales_of_rows(slot, 0)
        if options.soft_cap is None:
            s = s * (options.scale * LOG2E)
        else:
            s = jnp.tanh(s * (options.scale / options.soft_cap)) * (options.soft_cap * LOG2E)
        exists = (column < left_of[r]) & ((jnp.right_shift(bits_of[r], page_of_column) & 1) > 0)
        if options.bounded:
            exists = exists & (column >= low_of[r])
        s = jnp.where(exists, s, MASKED)
        is_first = first_of[r] > 0
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

    # ---- the pipeline --------------------------------------------------------------------------------------
    def send(r, slot, p, alpha, d, top, acc, at):
        """Adds an item's values and writes the output, which counts where the item is its sequence's last."""
        acc = jnp.where(first_of[r] > 0, 0.0, acc * lanes(alpha)) + products.values(p, slots[slot])
        out[sequence_of[r]] = (acc / lanes(jnp.where(d > 0, d, 1.0))).astype(out.dtype)
        if options.lse:
            log = (top + jnp.log2(jnp.where(d > 0, d, 1.0))) * (1 / LOG2E)
            put_lse(sequence_of[r], jnp.where(d > 0, log, -jnp.inf))
        return acc

    def group(first, u0, is_last_group=False):
        """The stages of W items; behind the last items only what is left to do for those before."""
        at = u0 // W
        steps = lag if is_last_group else W
        records = [(first + w) & last_record for w in range(steps)]
        late = []
        leave(at)
        if not is_last_group:
            arrive(at)
            if streams:
                ids_arrive(first + ahead)

            @pl.when(add([dirty_of[r] for r in records]) > 0)
            def _():
                for w, r in enumerate(records):
                    clean(r, u0 + w)

            for w, r in enumerate(records):
                copies = put_new_token(r, u0 + w)
                if L > LANES:  # they are strided, and no load or store passes one
                    late += copies
                else:
                    start(copies, tile_sem.at[at])
        scored = [s_ref[i] for i in range(D)]
        weighted = [(p_ref[i], alpha_ref[i], d_ref[i], top_ref[i]) for i in range(D)]
        m, total, acc = m_ref[...], l_ref[...], acc_ref[...]
        for w, r in enumerate(records):
            acc = send((first + w - lag) & last_record, (u0 + w - lag) % U, *weighted.pop(0), acc, at)
            if not is_last_group:
                products.prepare(slots[u0 + w])
                scored.append(products.scores(q[sequence_of[r]], slots[u0 + w]))
                plan(first + w + ahead + plan_ahead)
            if scored:
                before, slot = (first + w - D) & last_record, (u0 + w - D) % U
                p, alpha, m, total = softmax(before, slot, scored.pop(0), m, total)
                weighted.append((p, alpha, total, m))
        for r in records:
            send_output((r - lag) & last_record, at)
        outs_due[at] = add([jnp.where(is_last((r - lag) & last_record), 1, 0) for r in records])
        if is_last_group:
            tiles_due[at] = jnp.int32(0)
            return
        start(late, tile_sem.at[at])
        tiles_due[at] = add([jnp.where(ends_here(r), 1, 0) for r in records])
        fetch_group(first + ahead, (u0 + ahead) % U)
        for i in range(D):
            s_ref[i] = scored[i]
            p_ref[i], alpha_ref[i], d_ref[i], top_ref[i] = weighted[i]
        m_ref[...], l_ref[...], acc_ref[...] = m, total, acc

    def run():
        cursor[0], cursor[1] = jnp.int32(0), field(FIRST_BLOCK, 0)
        for item in range(-lag, 0):  # nothing came before
            r = item & last_record
            row_of[r] = left_of[r] = first_of[r] = bits_of[r] = jnp.int32(0)
            sequence_of[r] = jnp.int32(last_sequence + 1)
            if options.bounded:
                low_of[r] = jnp.int32(0)
        for at in range(num_groups_in_ring):
            outs_due[at] = tiles_due[at] = jnp.int32(0)
        for item in range(plan_ahead):
            plan(jnp.int32(item))
        for first in range(0, ahead, W):
            for w in range(W):
                plan(jnp.int32(first + w + plan_ahead))
            if streams:
                ids_arrive(jnp.int32(first))
            fetch_group(jnp.int32(first), first)
        m_ref[...] = jnp.full_like(m_ref, FLOOR)
        for ref in (l_ref, acc_ref, s_ref, p_ref, alpha_ref, d_ref, top_ref):
            ref[...] = jnp.zeros_like(ref)

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
            ids_arrive(num_groups * W + ahead + g * W)

    pl.when(num_items > 0)(run)


def decode(q: Array, new: Array | None, new_scales: Array | None, sinks: Array | None, rows: Array, table: Array,
           pages: Array, scales: Array | None, *, chunks: int, sizes: DecodeSizes, packing: HeadPacking,
           options: DecodeOptions) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Attends and appends.

    Args:
        q: packed queries `[T, passes, R, E * L]`.
        new: int32 `[T, K * planes, L]`, the new rows of a page, each value in all parts of its word; or None.
        new_scales: float32 `[T, 2, K, 128]`, for 8-bit pages the scales of the new keys and values; or None.
        sinks: float32 `[rows, 128]`, or None.
        rows: int32 `[FIELDS * B + 2]`: the fields of each row that takes part, in order and field by field, then
            the number of such rows and of their items.
        table: int32 `[B * chunks * 128]`, the page ids, of each row in so many chunks; 0: no page.
        pages: `[P, K, planes * S, L]`.
        scales: float32 `[P, K, R]`, for 8-bit pages; or None.

    Returns:
        out `[T, rows, L]` in q's dtype, lse float32 `[T, ceil(rows / 128), 128]`, the pages and their scales. Tokens of
        rows that
        take no part are not written.
    """
    num_tokens, num_rows = q.shape[0], rows.shape[0] // FIELDS
    streams = table.size * 4 > RESIDENT_BYTES
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
    if new_scales is None:
        new_scales = jnp.zeros((1, SUBLANES, LANES), f32)
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
    scratch = [vmem((sizes.pages_per_item, *pages.shape[1:]), pages.dtype)] * U
    if quantised:
        scratch += [vmem((sizes.pages_per_item, *scales.shape[1:]), f32)] * U
    scratch += [smem((2,), i32)] + [smem((sizes.records,), i32)] * 9 + [smem((U // W,), i32)] * 4
    scratch += [
        smem((sizes.records * IDS if streams else IDS,), i32),
        vmem((ring, *q.shape[1:]), q.dtype),
        vmem((ring, *new.shape[1:]), i32),
        vmem((ring, *new_scales.shape[1:]), f32),
        vmem((ring, N, L), q.dtype),
        vmem(kept, f32),
        vmem(tile, pages.dtype),
        vmem((ring, *scales.shape[1:]), f32),
        vmem((N, LANES), f32),
        vmem((N, LANES), f32),
        vmem((N, L), f32),
        vmem((D, N, sizes.tokens), f32),
        vmem((D, N, sizes.tokens), q.dtype),
        vmem((D, N, LANES), f32),
        vmem((D, N, LANES), f32),
        vmem((D, N, LANES), f32),
    ] + [pltpu.SemaphoreType.DMA((n,)) for n in (U // W, U // W, ID_GROUPS, U // W, U // W)]
    q, new, new_scales, pages, scales = (in_hbm(x) for x in (q, new, new_scales, pages, scales))
    if streams:
        table = in_hbm(table)
    kernel = functools.partial(
        _kernel, num_rows=num_rows, chunks=chunks, streams=streams, sizes=sizes, packing=packing, options=options
    )
    return pl.pallas_call(
        kernel,
        name="paged_decode",
        out_shape=(
            pltpu.HBM((num_tokens, N, L), q.dtype),
            pltpu.HBM(lse_shape, f32),
            pltpu.HBM(pages.shape, pages.dtype),
            pltpu.HBM(scales.shape, f32),
        ),
        in_specs=[scalars, hbm, hbm, hbm, pl.BlockSpec(memory_space=vmem), hbm if streams else scalars, hbm, hbm],
        out_specs=(hbm, hbm, hbm, hbm),
        input_output_aliases={6: 2, 7: 3},
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=56 << 20, disable_bounds_checks=True),
    )(rows, q, new, new_scales, sinks, table, pages, scales)
