"""The walk of prefill over its tasks: which block of keys comes next, and what a task sees of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

FIELDS = 6  # of a row in `rows`
TABLE_ROW, LENGTH, TOKEN, NUM_TOKENS, HOLES, FIRST = range(FIELDS)
# FIRST: with causal attention the position of the task's first token; else the first key that all tokens see.


@dataclasses.dataclass(frozen=True)
class PrefillSizes:
    """Static sizes of one kernel.

    Args:
        page_size: S.
        pages_per_block: pages in a block of T keys; a power of two, at most 32.
        query_tokens: Q, tokens of a task; a power of two.
        heads_per_product: query heads of a product, a divisor of the group.
        products_per_unit: products of a unit, of heads side by side; R is Q times heads_per_product times this.
        head_blocks: into how many blocks the heads are divided, each of whole tiles; a task has those of one.
        blocks_in_ring: blocks in VMEM, a power of two: two at work, the others on their way.
    """

    page_size: int
    pages_per_block: int
    query_tokens: int
    heads_per_product: int
    products_per_unit: int = 1
    head_blocks: int = 1
    blocks_in_ring: int = 4

    @property
    def tokens(self) -> int:
        return self.page_size * self.pages_per_block

    @property
    def rows_per_product(self) -> int:
        return self.query_tokens * self.heads_per_product

    @property
    def heads_per_unit(self) -> int:
        return self.heads_per_product * self.products_per_unit

    @property
    def rows_per_unit(self) -> int:
        return self.query_tokens * self.heads_per_unit

    def interleave(self, dtype) -> int:
        """Heads whose rows alternate in a unit: those that share 32-bit words, if a product has all of them."""
        packed = 4 // dtype.itemsize
        return packed if self.heads_per_product % packed == 0 else 1


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The walk over tasks. A task is Q new tokens of a row and one block of its heads; `nth` counts a row's tasks,
    heads fastest. Blocks of keys count from the first that it sees.

    Args:
        sizes: of the kernel.
        causal: whether a token sees no key after its own.
        window: the keys up to itself that a token sees; None: all.
        rows: the fields of each row that takes part, field by field; in scalar memory.
        num_rows: B.
        num_active: the rows that take part.
        front: the next block to fetch: its active row, the task in that, the block; in scalar memory.
    """

    sizes: PrefillSizes
    causal: bool
    window: int | None
    rows: Any
    num_rows: int
    num_active: Any
    front: Any

    def field(self, index: int, row):
        return self.rows[index * self.num_rows + jnp.minimum(row, self.num_active - 1)]

    def head_block(self, nth):
        return lax.rem(nth, self.sizes.head_blocks)

    def first_token(self, nth):
        """The first of its row's new tokens that a task has."""
        return lax.div(nth, self.sizes.head_blocks) * self.sizes.query_tokens

    def first_position(self, row, nth):
        """Position of the task's first token, if tokens have one."""
        return self.field(FIRST, row) + self.first_token(nth)

    def first_key(self, row, nth):
        """The first key that the task's first token sees; may be below 0."""
        if not self.causal:
            return self.field(FIRST, row)
        return jnp.int32(0) if self.window is None else self.first_position(row, nth) - self.window + 1

    def end_of_keys(self, row, nth):
        """How many keys the task's last token sees."""
        length = self.field(LENGTH, row)
        return jnp.minimum(length, self.first_position(row, nth) + self.sizes.query_tokens) if self.causal else length

    def first_block(self, row, nth):
        if self.causal and self.window is None:
            return jnp.int32(0)
        return lax.div(jnp.maximum(self.first_key(row, nth), 0), self.sizes.tokens)

    def num_blocks(self, row, nth):
        """At least one, so that a task without keys still writes zeros."""
        end = lax.div(jnp.maximum(self.end_of_keys(row, nth), 0) + (self.sizes.tokens - 1), self.sizes.tokens)
        return jnp.maximum(end - self.first_block(row, nth), 1)

    def has_more(self, row, nth):
        """Whether the row has another task."""
        return self.first_token(nth + 1) < self.field(NUM_TOKENS, row)

    def advance(self):
        """Moves the front on by a block."""
        row, nth, block = self.front[0], self.front[1], self.front[2]
        more_blocks = block + 1 < self.num_blocks(row, nth)
        more_tasks = self.has_more(row, nth)
        self.front[2] = jnp.where(more_blocks, block + 1, 0)
        self.front[1] = jnp.where(more_blocks, nth, jnp.where(more_tasks, nth + 1, 0))
        self.front[0] = jnp.where(more_blocks | more_tasks, row, row + 1)

    def geometry(self, row, nth, block):
        """Of the block: keys from its start to the last visible one, those before the first, its pages' column."""
        place = self.first_block(row, nth) + block
        start = place * self.sizes.tokens
        left = self.end_of_keys(row, nth) - start
        low = jnp.int32(0) if self.causal and self.window is None else self.first_key(row, nth) - start
        return left, low, place * self.sizes.pages_per_block
