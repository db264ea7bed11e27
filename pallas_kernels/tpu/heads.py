"""How query heads are packed into the rows of a matrix pass.

A decode step multiplies a few query rows with many keys. The matrix unit is 256 lanes wide (128 on older chips)
and its results come in rows of eight, so several KV heads share a pass: their queries stand in a block-diagonal
operand `[R, E * L]`, their keys side by side in `[tokens, E * L]`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.pages import LANES, SUBLANES

MATRIX_LANES = 256


@dataclasses.dataclass(frozen=True)
class HeadPacking:
    """Static sizes of the packing.

    Args:
        num_kv_heads: K.
        group: G, query heads of a KV head.
        head_dim: H.
        lanes: L of a row in the pages: H, or 2H where key and value share it.
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
    def shares_lanes(self) -> bool:
        """Whether two heads' keys, and two heads' values, are put side by side in the lanes of one row."""
        return 2 * self.head_dim == self.lanes == LANES and self.num_kv_heads % 2 == 0

    @property
    def width(self) -> int:
        """Lanes of a head in a matrix pass."""
        return self.head_dim if self.shares_lanes else self.lanes

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

    def packing(heads: int) -> HeadPacking:
        padded_group = next(g for g in range(group, group + SUBLANES) if heads * g % SUBLANES == 0)
        return HeadPacking(num_kv_heads, group, head_dim, lanes, heads, padded_group)

    def cost(p: HeadPacking) -> tuple[int, bool, int]:
        return p.padded_group, p.heads_per_pass * p.width < MATRIX_LANES, p.heads_per_pass

    def lines_up(p: HeadPacking) -> bool:
        """Whether a pass is whole registers."""
        wide = p.heads_per_pass * p.width
        return wide % LANES == 0 and wide <= 8 * LANES

    packings = [packing(heads) for heads in range(1, num_kv_heads + 1) if num_kv_heads % heads == 0]
    return min([p for p in packings if lines_up(p)] or packings[:1], key=cost)


def pad_group(x: Array, packing: HeadPacking) -> Array:
    """`[T, N, ...]` to `[T, K, padded_group, ...]`, with zeros in the added rows."""
    grouped = x.reshape(x.shape[0], packing.num_kv_heads, packing.group, *x.shape[2:])
    added = packing.padded_group - packing.group
    return jnp.pad(grouped, [(0, 0), (0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2))


def pack_queries(q: Array, packing: HeadPacking) -> Array:
    """Queries `[T, N, H]` as the block-diagonal operands `[T, passes, R, E * width]`."""
    p = packing
    x = jnp.pad(q, [(0, 0), (0, 0), (0, p.width - p.head_dim)])
    x = pad_group(x, p).reshape(q.shape[0], p.num_passes, p.heads_per_pass, p.padded_group, 1, p.width)
    own = jnp.eye(p.heads_per_pass, dtype=bool)[None, None, :, None, :, None]
    diagonal = jnp.where(own, x, jnp.zeros((), q.dtype))
    return diagonal.reshape(q.shape[0], p.num_passes, p.rows_per_pass, p.heads_per_pass * p.width)


def unpack_rows(x: Array, packing: HeadPacking) -> Array:
    """The query heads `[T, N, ...]` of packed rows `[T, rows, ...]`."""
    grouped = x.reshape(x.shape[0], packing.num_kv_heads, packing.padded_group, *x.shape[2:])
    real = grouped[:, :, : packing.group]
    return real.reshape(x.shape[0], packing.num_kv_heads * packing.group, *x.shape[2:])


def unpack_outputs(x: Array, packing: HeadPacking) -> Array:
    """Outputs `[T, N, H]` of packed rows `[T, rows, L]`: the lanes where a head's values lie."""
    p = packing
    x = unpack_rows(x, p)
    if not p.shares_lanes:
        return x[..., p.lanes - p.head_dim :]
    by_parity = x.reshape(x.shape[0], p.num_kv_heads // 2, 2, p.group, 2, p.head_dim)
    own = [by_parity[:, :, e, :, e] for e in range(2)]
    return jnp.stack(own, axis=2).reshape(x.shape[0], p.num_kv_heads * p.group, p.head_dim)
