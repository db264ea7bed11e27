"""How query heads are packed into the rows of a matrix pass.

A decode step multiplies a few query rows with many keys. The matrix unit is 256 lanes wide (128 on older chips)
and its results come in rows of eight, so several KV heads share a pass: their queries stand in a block-diagonal
operand `[R, E * L]`, their keys side by side in `[tokens, E * L]`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

SUBLANES = 8  # float32 rows of a register
LANES = 128
MATRIX_LANES = 256


@dataclasses.dataclass(frozen=True)
class HeadPacking:
    """Static sizes of the packing.

    Args:
        num_kv_heads: K.
        group: G, query heads of a KV head.
        head_dim: H.
        lanes: of a row in the pages: H, or 2H where key and value share it.
        heads_per_pass: E, KV heads that share a matrix pass.
        padded_group: query rows that a KV head takes, at least G.
    """

    num_kv_heads: int
    group: int
    head_dim: int
    lanes: int
    heads_per_pass: int
    padded_group: int

    @property
    def num_passes(self) -> int:
        return self.num_kv_heads // self.heads_per_pass

    @property
    def rows_per_pass(self) -> int:
        return self.heads_per_pass * self.padded_group

    @property
    def rows(self) -> int:
        return self.num_kv_heads * self.padded_group


def pack_heads(num_heads: int, num_kv_heads: int, head_dim: int, lanes: int) -> HeadPacking:
    """The packing that pads the fewest query rows, then fills the matrix unit, then is the narrowest."""
    group = num_heads // num_kv_heads

    def padded_group(heads: int) -> int:
        return next(g for g in range(group, group + SUBLANES) if heads * g % SUBLANES == 0)

    def cost(heads: int) -> tuple[int, bool, int]:
        return padded_group(heads), heads * lanes < MATRIX_LANES, heads

    divisors = [h for h in range(1, num_kv_heads + 1) if num_kv_heads % h == 0 and h * lanes <= 8 * LANES]
    if lanes % LANES or not divisors:
        divisors = [1]  # registers of neighbouring heads would not line up
    heads = min(divisors, key=cost)
    return HeadPacking(num_kv_heads, group, head_dim, lanes, heads, padded_group(heads))


def pad_group(x: Array, packing: HeadPacking) -> Array:
    """`[T, N, ...]` to `[T, K, padded_group, ...]`, with zeros in the added rows."""
    grouped = x.reshape(x.shape[0], packing.num_kv_heads, packing.group, *x.shape[2:])
    added = packing.padded_group - packing.group
    return jnp.pad(grouped, [(0, 0), (0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2))


def pack_queries(q: Array, packing: HeadPacking) -> Array:
    """Queries `[T, N, H]` as the block-diagonal operands `[T, passes, R, E * lanes]`."""
    p = packing
    x = jnp.pad(q, [(0, 0), (0, 0), (0, p.lanes - p.head_dim)])
    x = pad_group(x, p).reshape(q.shape[0], p.num_passes, p.heads_per_pass, p.padded_group, 1, p.lanes)
    own = jnp.eye(p.heads_per_pass, dtype=bool)[None, None, :, None, :, None]
    diagonal = jnp.where(own, x, jnp.zeros((), q.dtype))
    return diagonal.reshape(q.shape[0], p.num_passes, p.rows_per_pass, p.heads_per_pass * p.lanes)


def unpack_rows(x: Array, packing: HeadPacking) -> Array:
    """The query heads `[T, N, ...]` of packed rows `[T, rows, ...]`."""
    grouped = x.reshape(x.shape[0], packing.num_kv_heads, packing.padded_group, *x.shape[2:])
    real = grouped[:, :, : packing.group]
    return real.reshape(x.shape[0], packing.num_kv_heads * packing.group, *x.shape[2:])
