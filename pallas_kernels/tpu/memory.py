"""Where arrays live, how page ids lie in them, and how values share a 32-bit word."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.pages import LANES, SUBLANES
from pallas_kernels.platform import target_platform

IDS = 128  # page ids in a chunk of the page table: one row of lanes
RESIDENT_BYTES = 256 << 10  # a page table up to this size lies in scalar memory, a larger one streams
WORD_PART = {1: -1, 2: 0xFFFF, 4: 0xFF}  # the first of so many values packed in a word


def in_hbm(x: Array) -> Array:
    """Keeps a kernel's operand in HBM.

    XLA would put small operands into VMEM, where a copy is a loop of loads and stores that breaks the kernel's
    basic blocks: the decode kernel then takes 1.8 times the cycles.
    """
    if target_platform() != "tpu":  # the interpreter on a CPU
        return x
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def is_streamed(table: Array) -> bool:
    """Whether page ids are copied to scalar memory as they are needed, not all of them before."""
    return table.size * table.dtype.itemsize > RESIDENT_BYTES


def tiled_as_in_hbm(shape: tuple[int, ...], dtype: Any) -> Any:
    """Scratch in VMEM for copies of rows that lie side by side in HBM; the kernel sees it through `by_rows`.

    Rows of 16 bits lie in tiles of 8 in HBM, of 16 in the VMEM of v7x. Where a row has several tiles, a copy between
    the two would be strided: it takes 15 cycles to start, and no load or store of a block passes it. The interpreter
    has no tiles, and does not reshape references.
    """
    *major, rows, lanes = shape
    if target_platform() == "tpu" and dtype.itemsize == 2 and lanes > LANES:
        assert rows % SUBLANES == 0, shape
        return pltpu.VMEM((*major, rows // SUBLANES, SUBLANES, lanes), dtype)
    return pltpu.VMEM(shape, dtype)


def by_rows(ref, num_dims: int):
    """A reference to scratch of `tiled_as_in_hbm`, in the shape that was asked for."""
    if len(ref.shape) == num_dims:
        return ref
    return ref.reshape(*ref.shape[: num_dims - 2], -1, ref.shape[-1])
