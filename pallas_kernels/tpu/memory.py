"""Where arrays live, how page ids lie in them, and how values share a 32-bit word."""

from __future__ import annotations

from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.platform import target_platform

IDS = 128  # page ids in a chunk of the page table: one row of lanes
WORD_PART = {1: -1, 2: 0xFFFF, 4: 0xFF}  # the first of so many values packed in a word


def in_hbm(x: Array) -> Array:
    """Keeps a kernel's operand in HBM.

    XLA would put small operands into VMEM, where a copy is a loop of loads and stores that breaks the kernel's
    basic blocks: the decode kernel then takes 1.8 times the cycles.
    """
    if target_platform() != "tpu":  # the interpreter on a CPU
        return x
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)
