"""What the kernels need to know about a Hopper GPU (compute capability 9.0)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

HOPPER = "9.0"  # compute capability
SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor
RESERVED_SHARED_MEMORY = 1024  # bytes that the system takes of it for every block
MULTIPROCESSORS = 132  # of an H100 or H200 SXM: what kernels compiled without a GPU are cut for
_interpreted: list[int] = []  # multiprocessors that the interpreter stands for, of each `interpreter` in force


def num_multiprocessors() -> int:
    """The multiprocessors of the default GPU, or of an H200 where there is none to ask."""
    if _interpreted:
        return _interpreted[-1]
    if jax.default_backend() != "gpu":
        return MULTIPROCESSORS
    return jax.devices()[0].core_count


def compute_capability() -> str:
    """That of the default GPU, or Hopper's where there is none to ask."""
    if jax.default_backend() != "gpu":
        return HOPPER
    return jax.devices()[0].compute_capability


def shared_memory_per_block(blocks: int) -> int:
    """The shared memory that each of this many blocks on one multiprocessor can have, in bytes."""
    return SHARED_MEMORY // blocks - RESERVED_SHARED_MEMORY


def is_interpreted() -> bool:
    """Whether kernels traced now are to run in the interpreter."""
    return bool(_interpreted)


@contextlib.contextmanager
def interpreter(multiprocessors: int = 2, detect_races: bool = True) -> Iterator[None]:
    """Kernels traced within run in Mosaic GPU's interpreter on a CPU, one block of the grid after the other.

    Args:
        multiprocessors: how many to cut the work for; each costs time here.
        detect_races: raise on an access to shared memory that no barrier orders.
    """
    _interpreted.append(multiprocessors)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _interpreted.pop()
