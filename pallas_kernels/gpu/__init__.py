"""Kernels for NVIDIA Hopper GPUs in Mosaic GPU; README.md here has the reasons."""

from __future__ import annotations

from typing import Any

from pallas_kernels.gpu import attention
from pallas_kernels.gpu.attention import paged_attention

__all__ = ["paged_attention", "refusal"]


def refusal(op: str, **arguments: Any) -> str | None:
    """Why the kernels cannot run `op`, in one sentence, or None if they can."""
    del op
    return attention.refusal(**arguments)
