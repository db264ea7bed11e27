"""Kernels for NVIDIA Hopper GPUs in Mosaic GPU; README.md here has the reasons."""

from __future__ import annotations

from typing import Any

from pallas_kernels.gpu import attention, hardware, moves
from pallas_kernels.gpu.attention import paged_attention
from pallas_kernels.gpu.moves import copy_pages, write_pages

__all__ = ["copy_pages", "paged_attention", "refusal", "write_pages"]


def refusal(op: str, **arguments: Any) -> str | None:
    """Why the kernels cannot run `op`, in one sentence, or None if they can."""
    if (capability := hardware.compute_capability()) != hardware.HOPPER:
        return f"the GPU kernels are for compute capability {hardware.HOPPER} (Hopper), got {capability}."
    if reason := moves.refusal(**arguments):
        return reason
    return attention.refusal(**arguments) if op == "paged_attention" else None
