"""The two products of an item of decode, on the matrix unit: queries with its keys, weights with its values.

Scales of quantised pages are applied to scores and to weights, never to keys or values. float8 pages enter the matrix
unit as they are, beside bfloat16 queries and weights; int8 pages are widened to the queries' dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.pages import FP8, LANES, SUBLANES, numbers
from pallas_kernels.tpu.heads import HeadPacking


def dot(a: Array, b: Array, contract_b: int) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def swap_halves(a: Array, b: Array) -> tuple[Array, Array]:
    """Rows of a key and its value, of two heads, as rows of two keys and rows of two values; `[T, 128]`."""
    words = [pltpu.bitcast(x, jnp.int32) for x in (a, b)]
    is_left = lax.broadcasted_iota(jnp.int32, words[0].shape, 1) < LANES // 2
    turned = pltpu.roll(jnp.where(is_left, words[1], words[0]), LANES // 2, 1)  # value of a, key of b
    keys, values = jnp.where(is_left, words[0], turned), jnp.where(is_left, turned, words[1])
    return pltpu.bitcast(keys, a.dtype), pltpu.bitcast(values, a.dtype)


def load_rows(pages, first: int, size: int) -> Array:
    """The rows `first : first + size` of each page of one head, `[pages * size, L]`, as narrow as they are stored.

    Args:
        pages: a reference to `[pages, rows, L]`.
    """
    packed = 4 // pages.dtype.itemsize  # rows in a row of 32-bit words
    lanes = pages.shape[2]
    if size % (SUBLANES * packed) == 0:
        x = pages[:, first : first + size, :].reshape(-1, lanes)
    else:  # keys and values share a tile: the halves of two pages make a new one
        words = pltpu.bitcast(pages[...].reshape(-1, lanes), jnp.int32).reshape(-1, SUBLANES, lanes)
        half = words[:, first // packed : (first + size) // packed]
        x = pltpu.bitcast(half.reshape(-1, lanes), pages.dtype)
    return numbers(x)


@dataclasses.dataclass(frozen=True)
class Products:
    """Static sizes of the products.

    Args:
        dtype: of queries and weights.
        page_size: S.
        value_row: of a page, the first row of values.
        transposed_passes: how many of the passes, the last ones, take keys that the cross-lane unit transposes.
    """

    dtype: Any
    page_size: int
    value_row: int
    packing: HeadPacking
    transposed_passes: int = 0

    def prepare(self, slot) -> None:
        """Puts the keys of two heads side by side in the first's rows, their values in the second's, where H is 64."""
        for head in range(0, self.packing.num_kv_heads if self.packing.shares_lanes else 0, 2):
            rows = [slot[:, e].reshape(-1, LANES) for e in (head, head + 1)]
            for e, x in enumerate(swap_halves(*rows)):
                slot[:, head + e] = x.reshape(-1, self.page_size, LANES)

    def _rows(self, slot, n: int, is_value: bool) -> list[Array]:
        """The keys or values of each head of pass n, or of each two heads that share lanes, as stored: `[T, L]`."""
        E = self.packing.heads_per_pass
        heads = range(n * E, (n + 1) * E)
        if self.packing.shares_lanes:
            heads = heads[is_value::2]
        first = self.value_row if is_value else 0
        return [load_rows(slot.at[:, head], first, self.page_size) for head in heads]

    def _operand_dtype(self, stored) -> Any:
        """bfloat16 and float8 meet in the matrix unit; all else is widened to the queries' dtype."""
        return stored if stored == FP8 and self.dtype == jnp.bfloat16 else self.dtype

    def _operand(self, slot, n: int, is_value: bool) -> Array:
        """The keys or values of the heads of pass n, side by side: `[T, E * width]`."""
        rows = self._rows(slot, n, is_value)
        return jnp.concatenate([x.astype(self._operand_dtype(x.dtype)) for x in rows], axis=1)

    def _transposed_keys(self, slot, n: int) -> Array:
        """The keys of the heads of pass n, below each other: `[E * width, T]`; transposed while they are narrow."""
        keys = jnp.concatenate([x.T for x in self._rows(slot, n, is_value=False)], axis=0)
        return keys.astype(self._operand_dtype(keys.dtype))

    def scores(self, q: Array, slot) -> Array:
        """Packed queries `[passes, R, E * width]` with the keys of an item: `[rows, T]`."""
        straight = self.packing.num_passes - self.transposed_passes
        outs = [dot(q[n], self._operand(slot, n, False), 1) for n in range(straight)]
        outs += [dot(q[n], self._transposed_keys(slot, n), 0) for n in range(straight, self.packing.num_passes)]
        return jnp.concatenate(outs, axis=0)

    def values(self, p: Array, slot) -> Array:
        """Weights `[rows, T]` with the values of an item: `[rows, L]`, of each row the register of its head."""
        packing = self.packing
        R, G, L = packing.rows_per_pass, packing.padded_group, packing.lanes
        head = lax.broadcasted_iota(jnp.int32, (R, 1), 0)
        outs = []
        for n in range(packing.num_passes):
            wide = dot(p[n * R : (n + 1) * R], self._operand(slot, n, True), 0)  # [R, E * width]
            out = wide[:, :L]
            for first in range(L, wide.shape[1], L):
                out = jnp.where(head >= first // packing.width * G, wide[:, first : first + L], out)
            outs.append(out)
        return jnp.concatenate(outs, axis=0)
