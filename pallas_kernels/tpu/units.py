"""Between tokens, as a model has them, and the units of prefill: queries on the way in, outputs on the way out.

A token's heads are rows `[heads, L]`; a unit has the rows of `heads_per_unit` query heads, one after another, for all
tokens of a task. Strided loads part the heads; they move 32-bit words, so two bfloat16 heads that share a word stay
side by side in a unit's rows, token by token (`interleave`), or are parted by shifts where a product has an odd number
of heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.pages import LANES, SUBLANES
from pallas_kernels.softmax import LOG2E
from pallas_kernels.tpu.tasks import PrefillSizes

UPPER_HALF = -65536  # of a word
WORDS_AT_ONCE = 256  # rows of 32-bit words that move between the layouts of a token and of a head


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of a task; all in VMEM.

    Args:
        sizes: of the kernel.
        num_heads: query heads of a task.
        tokens_in: the task's queries `[Q, padded heads, L]`.
        words: the 32-bit words of its queries or outputs, `[registers of a row, words, 128]`.
        q: the queries of each unit, `[units, R, L]`.
        m: of each unit the running maximum of the scores, in base 2, `[units + 1, R, 128]`.
        total: the sum of its weights, likewise.
        acc: the weighted sum of its values, `[units + 1, R, L]`.
        out: the task's outputs `[Q, padded heads, L]`.
        lse: float32 `[Q, ceil(num_heads / 128), 128]`.
    """

    sizes: PrefillSizes
    num_heads: int
    tokens_in: Any
    words: Any
    q: Any
    m: Any
    total: Any
    acc: Any
    out: Any
    lse: Any

    @property
    def lanes(self) -> int:
        return self.q.shape[2]

    @property
    def packed(self) -> int:
        """Heads in a word."""
        return 4 // self.q.dtype.itemsize

    @property
    def interleave(self) -> int:
        return self.sizes.interleave(self.q.dtype)

    @property
    def words_per_token(self) -> int:
        """Rows of words."""
        return self.tokens_in.shape[1] // self.packed

    def wide(self, x):
        """A value held in all 128 lanes, in L lanes."""
        return x if self.lanes == LANES else jnp.concatenate([x] * (self.lanes // LANES), axis=1)

    def load_queries(self, factor: float):
        """From `tokens_in` to `q`, times a factor."""
        Q = self.sizes.query_tokens
        self._for_words(self._take_words)
        for n in range(0, self.num_heads, self.interleave):
            unit, first = self._place_of_head(n)
            x = jnp.concatenate([self.words[c, self._words_of_head(n), :] for c in range(self.lanes // LANES)], axis=1)
            if self.interleave < self.packed:  # the head's half of each word is the upper half of a float32
                x = jnp.left_shift(x, 16) if n % self.packed == 0 else x & UPPER_HALF
                x = pltpu.bitcast(x, jnp.float32)
            else:
                x = pltpu.bitcast(x, self.q.dtype).astype(jnp.float32)
            self.q[unit, first : first + self.interleave * Q, :] = (x * factor).astype(self.q.dtype)

    def store_outputs(self):
        """From `acc` and `total` to `out`."""
        for n in range(0, self.num_heads, self.packed):
            if self.interleave == self.packed:
                x = pltpu.bitcast(self._output_of_head(n), jnp.int32)
            else:
                halves = [pltpu.bitcast(self._output_of_head(i).astype(jnp.float32), jnp.int32)
                          for i in range(n, min(n + self.packed, self.num_heads))]  # fmt: skip
                x = jnp.bitwise_or(lax.shift_right_logical(halves[0], 16), halves[-1] & UPPER_HALF)
            for c in range(0, self.lanes, LANES):
                self.words[c // LANES, self._words_of_head(n), :] = x[:, c : c + LANES]
        self._for_words(self._give_words)

    def store_lse(self):
        """Puts that of each head in a lane of `lse`."""
        Q, interleave = self.sizes.query_tokens, self.interleave
        lane = lax.broadcasted_iota(jnp.int32, (Q, LANES), 1)
        for first in range(0, self.num_heads, LANES):
            x = jnp.zeros((Q, LANES), jnp.float32)
            for n in range(first, min(first + LANES, self.num_heads)):
                unit, row = self._place_of_head(n - n % interleave)
                here = pl.ds(row + n % interleave, Q, stride=interleave) if interleave > 1 else pl.ds(row, Q)
                total = self.total[unit, here, :]
                log = (self.m[unit, here, :] + jnp.log2(jnp.where(total > 0, total, 1.0))) * (1 / LOG2E)
                x = jnp.where(lane == n - first, jnp.where(total > 0, log, -jnp.inf), x)
            self.lse[:, first // LANES, :] = x

    def _for_words(self, move):
        """Calls `move` for some tokens at a time: where they are in `tokens_in` and `out`, and in `words`."""
        most = max(1, WORDS_AT_ONCE // self.words_per_token)
        chunk = min(self.sizes.query_tokens, 1 << (most.bit_length() - 1))  # Q is a power of two, too
        size = chunk * self.words_per_token

        def body(i, _):
            move(pl.ds(i * chunk, chunk), pl.ds(pl.multiple_of(i * size, SUBLANES), size))
            return 0

        lax.fori_loop(0, self.sizes.query_tokens // chunk, body, 0)

    def _take_words(self, tokens, words):
        x = pltpu.bitcast(self.tokens_in[tokens], jnp.int32).reshape(words.size, self.lanes)
        for c in range(0, self.lanes, LANES):
            self.words[c // LANES, words, :] = x[:, c : c + LANES]

    def _give_words(self, tokens, words):
        x = jnp.concatenate([self.words[c, words, :] for c in range(self.lanes // LANES)], axis=1)
        self.out[tokens] = pltpu.bitcast(x.reshape(tokens.size, self.words_per_token, self.lanes), self.out.dtype)

    def _words_of_head(self, n: int):
        """One row a token: head n, and those that share its words."""
        return pl.ds(n // self.packed, self.sizes.query_tokens, stride=self.words_per_token)

    def _place_of_head(self, n: int) -> tuple[int, int]:
        """The unit of head n, and the first of its rows there."""
        unit, place = divmod(n, self.sizes.heads_per_unit)
        return unit, place * self.sizes.query_tokens

    def _output_of_head(self, n: int):
        unit, first = self._place_of_head(n)
        here = slice(first, first + self.interleave * self.sizes.query_tokens)
        total = self.total[unit, here]
        return (self.acc[unit, here] / self.wide(jnp.where(total > 0, total, 1.0))).astype(self.q.dtype)
