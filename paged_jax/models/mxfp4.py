"""MXFP4 weights, as gpt-oss is published: 4-bit floats that share a power of two in runs of 32, unpacked while loading.

OCP Microscaling Formats (MX) Specification, version 1.0.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from paged_jax.models.safetensors_file import StoredTensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Of a nibble: three bits of magnitude below the sign.
VALUES = np.asarray([*MAGNITUDES, *(-m for m in MAGNITUDES)], np.float32)
EXPONENT_BIAS = 127


@dataclass(frozen=True)
class PackedTensor:
    """The weights [E, I, O] of E experts, stored as blocks [E, O, I // 32, 16] and scales [E, O, I // 32]."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        experts, num_out, runs, run_bytes = self.blocks.shape
        return experts, runs * run_bytes * 2, num_out

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some experts' weights in bfloat16, which holds every MXFP4 value of usual size exactly."""
        out = np.empty((stop - start, *self.shape[1:]), ml_dtypes.bfloat16)
        for i in range(start, stop):
            out[i - start] = unpack(self.blocks.rows(i, i + 1)[0], self.scales.rows(i, i + 1)[0]).T
        return out


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values of packed runs.

    Args:
        blocks: uint8 [O, I // 32, 16], two values a byte, the first in the lower bits.
        scales: uint8 [O, I // 32], exponents of two, biased by 127.

    Returns:
        float32 [O, I].
    """
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, -1)
    values = np.ldexp(VALUES[nibbles], scales.astype(np.int32)[..., None] - EXPONENT_BIAS)
    return values.reshape(len(blocks), -1)


def find_packed(stored: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint, with each pair of blocks and scales as one.

    Raises:
        ValueError: blocks without scales, or of dtypes or shapes that do not belong together.
    """
    found = dict(stored)
    for name in [name for name in stored if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, scales = found.pop(name), found.pop(f"{base}_scales", None)
        if not isinstance(blocks, StoredTensor) or not isinstance(scales, StoredTensor):
            raise ValueError(f"{folder} has {name} but no {base}_scales: download the checkpoint again.")
        if {blocks.dtype, scales.dtype} != {"U8"}:
            raise ValueError(
                f"{folder} has {name} of dtype {blocks.dtype} and {base}_scales of dtype {scales.dtype}, but MXFP4 is "
                "U8. Download the checkpoint again."
            )
        if len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape:
            raise ValueError(
                f"{folder} has {name} of shape {list(blocks.shape)} and {base}_scales of shape {list(scales.shape)}: "
                "the scales must have one entry for each run of the blocks' last axis. Download the checkpoint again."
            )
        found[base] = PackedTensor(blocks, scales)
    return found
