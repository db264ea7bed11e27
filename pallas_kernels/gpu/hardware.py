"""What the kernels need to know about a Hopper GPU (compute capability 9.0)."""

from __future__ import annotations

import jax

SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor
RESERVED_SHARED_MEMORY = 1024  # bytes that the system takes of it for every block
MULTIPROCESSORS = 132  # of an H100 or H200 SXM: what kernels compiled without a GPU are cut for


def num_multiprocessors() -> int:
    """The multiprocessors of the default GPU, or of an H200 where there is none to ask."""
    if jax.default_backend() != "gpu":
        return MULTIPROCESSORS
    return jax.devices()[0].core_count


def shared_memory_per_block(blocks: int) -> int:
    """The shared memory each of so many blocks on one multiprocessor can have, in bytes."""
    return SHARED_MEMORY // blocks - RESERVED_SHARED_MEMORY
