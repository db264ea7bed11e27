"""The walk of decode over its items: which block of which sequence comes next, and what its stages have to know."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.memory import IDS

ID_GROUPS = 16  # groups whose page ids can be under way; a power of two
WORD_BITS = 32
BROKEN = 1 << 8  # in `dirty_of`, whose sum over the items of a group counts them
FIELDS = 9  # of a row in `rows`
TABLE_ROW, LENGTH, TOKEN, FIRST_KEY, FIRST_BLOCK, FIRST_PAGE, LAST_PAGE, LAST_SLOT, HOLES = range(FIELDS)


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Static sizes of one kernel.

    Args:
        page_size: S.
        pages_per_item: pages in a block of T tokens, whose ids lie in one chunk of IDS: a divisor of IDS, or a row has
            one chunk, which holds those of all its items.
        items_per_group: W.
        items_in_ring: U, a multiple of W.
        distance: D, the items between an item's scores and its softmax, and between that and its values.
        hides_copies: start the copies of later items beside the products of a group, not behind them.
        transposed_passes: of the passes of the scores, how many take keys that the cross-lane unit transposes.
    """

    page_size: int
    pages_per_item: int
    items_per_group: int
    items_in_ring: int
    distance: int = 1
    hides_copies: bool = False
    transposed_passes: int = 0

    @property
    def tokens(self) -> int:
        return self.page_size * self.pages_per_item

    @property
    def spare_pages(self) -> int:
        """Pages of a slot after those of its item, whose content nobody uses.

        With n of them, n + 1 pages after a sequence's end can be cleared at a time.
        """
        if not self.hides_copies:
            return 0
        return 3 if self.pages_per_item >= 16 else 1

    @property
    def words(self) -> int:
        """Words with a bit for each page of an item."""
        return -(-self.pages_per_item // WORD_BITS)

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
class Walk:
    """The walker, and its records of the items between their plan and their values; all in scalar memory.

    Args:
        rows: the fields of each row that takes part, field by field, then the number of such rows and of their items.
        table: the page ids in chunks; in HBM where they stream.
        num_rows: B.
        num_active: the rows that take part.
        chunks: of a row of the page table.
        streams: whether an item's page ids are copied when it is planned.
        bounded: whether keys before a row's FIRST_KEY are hidden.
        cursor: the active row and the block of the next item.
        row_of: of each item, its active row.
        left_of: the tokens from its start to its sequence's end; 0 or less behind the last item.
        low_of: the tokens from its start to the first key that is seen.
        bits_of: in `words` words a bit for each page, 0 where the row lacks it.
        count_of: the pages that are copied.
        dirty_of: 1 where its last tokens do not exist, plus BROKEN where others do not.
        first_of: 1 where it is its sequence's first.
        sequence_of: the place of its sequence's query and output.
        ids_of: the place of its first page id in `ids`.
        streamed: page ids as they stream, IDS to an item.
        id_sem: of their copies.
    """

    sizes: DecodeSizes
    rows: Any
    table: Any
    num_rows: int
    num_active: Any
    chunks: int
    streams: bool
    bounded: bool
    cursor: Any
    row_of: Any
    left_of: Any
    low_of: Any
    bits_of: Any
    count_of: Any
    dirty_of: Any
    first_of: Any
    sequence_of: Any
    ids_of: Any
    streamed: Any
    id_sem: Any

    @staticmethod
    def scratch(sizes: DecodeSizes, streams: bool) -> list:
        """The memory of the last fields, from `cursor` on."""
        smem = pltpu.SMEM
        record = smem((sizes.records,), jnp.int32)
        bits = smem((sizes.records * sizes.words,), jnp.int32)
        ids = smem((sizes.records * IDS if streams else IDS,), jnp.int32)
        return [smem((2,), jnp.int32), *[record] * 3, bits, *[record] * 5, ids, pltpu.SemaphoreType.DMA((ID_GROUPS,))]

    @property
    def nowhere(self) -> int:
        """The place in the queries and outputs that nobody looks at."""
        return self.sizes.sequences

    @property
    def ids(self):
        return self.streamed if self.streams else self.table

    def record(self, item):
        return item & (self.sizes.records - 1)

    def field(self, index: int, row):
        return self.rows[index * self.num_rows + row]

    def first_block(self, row):
        return self.field(FIRST_BLOCK, row) if self.bounded else 0

    def start(self):
        """Puts the walker at the first item, behind items that never were."""
        self.cursor[0], self.cursor[1] = jnp.int32(0), jnp.int32(self.first_block(0))
        for item in range(-self.sizes.lag, 0):
            r = self.record(item)
            self.row_of[r] = self.left_of[r] = self.first_of[r] = jnp.int32(0)
            self.set_bits(r, [jnp.int32(0)] * self.sizes.words)
            self.sequence_of[r] = jnp.int32(self.nowhere)
            if self.bounded:
                self.low_of[r] = jnp.int32(0)

    def plan(self, item):
        """Writes the item's record, starts the copy of its page ids and advances the walker."""
        T, NP = self.sizes.tokens, self.sizes.pages_per_item
        nth, block = self.cursor[0], self.cursor[1]
        real = nth < self.num_active
        row = jnp.minimum(nth, self.num_active - 1)
        length = self.field(LENGTH, row)
        left = length - block * T
        first_page = block * NP
        first = block == self.first_block(row)
        end = jnp.where(left > T, NP, self.field(LAST_PAGE, row) + 1)
        begin = jnp.where(first, self.field(FIRST_PAGE, row), 0) if self.bounded else 0
        chunk = self.field(TABLE_ROW, row) * self.chunks + jnp.right_shift(first_page, IDS.bit_length() - 1)
        r = self.record(item)
        self.row_of[r] = row
        self.left_of[r] = jnp.where(real, left, 0)
        self.set_bits(r, [jnp.int32(-1)] * self.sizes.words)
        is_broken = self.field(HOLES, row) > 0
        if self.bounded:
            is_broken = is_broken | (begin > 0)
        dirty = jnp.where(left < T, 1, 0) + jnp.where(is_broken, BROKEN, 0)
        self.dirty_of[r] = jnp.where(real, dirty, 0)
        self.count_of[r] = jnp.where(real, end - begin, 0)
        self.first_of[r] = jnp.where(real & first, 1, 0)
        # Items past the end leave their output where nobody looks.
        self.sequence_of[r] = jnp.where(real, nth & (self.nowhere - 1), self.nowhere)
        self.ids_of[r] = (r if self.streams else chunk) * IDS + (first_page & (IDS - 1))
        if self.bounded:
            self.low_of[r] = jnp.where(real, self.field(FIRST_KEY, row) - block * T, T)
        if self.streams:
            here = pl.ds(pl.multiple_of(r * IDS, IDS), IDS)
            sem = self.id_sem.at[self.id_group(item)]
            pltpu.make_async_copy(self.table.at[chunk, 0], self.ids.at[here], sem).start()
        finished = left <= T
        self.cursor[0] = jnp.where(finished & real, nth + 1, nth)
        self.cursor[1] = jnp.where(finished, self.first_block(jnp.minimum(nth + 1, self.num_active - 1)), block + 1)

    def id_group(self, item):
        return jnp.right_shift(item, self.sizes.items_per_group.bit_length() - 1) & (ID_GROUPS - 1)

    def bits(self, r) -> list:
        """The words of an item's bits."""
        return [self.bits_of[r * self.sizes.words + i] for i in range(self.sizes.words)]

    def set_bits(self, r, words: list):
        for i, word in enumerate(words):
            self.bits_of[r * self.sizes.words + i] = word

    def has_page(self, r, page):
        """Whether the row has pages of the item: a number, or an array of them."""
        word, *more = self.bits(r)
        for i, other in enumerate(more, 1):
            word = jnp.where(page >= i * WORD_BITS, other, word)
        return (jnp.right_shift(word, page & (WORD_BITS - 1) if more else page) & 1) > 0

    def page_id(self, r, j):
        return self.ids[self.ids_of[r] + j]

    def is_last(self, r):
        return (self.left_of[r] > 0) & (self.left_of[r] <= self.sizes.tokens)

    def ends_here(self, r):
        """Whether the item has the page of the newest token; it lacks it if that page is not mapped."""
        return self.is_last(r) & self.has_page(r, self.field(LAST_PAGE, self.row_of[r]))

    def ids_arrive(self, item):
        """Waits for the page ids of the group that starts with the item."""
        part = self.ids.at[pl.ds(0, self.sizes.items_per_group * IDS)]
        pltpu.make_async_copy(part, part, self.id_sem.at[self.id_group(item)]).wait()
