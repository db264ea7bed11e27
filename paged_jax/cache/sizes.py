"""Sizes in bytes: as people write them, and as devices report them."""

import math
import numbers
import os
import pathlib
import re
from typing import Any

import jax

UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {
    f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)
}  # fmt: skip


def read_bytes(size: int | float | str) -> int:
    """A number of bytes, from 4e9 or "16GiB" or "1.5 GB".

    Raises:
        ValueError: it is no whole number of bytes, or its unit is not known.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", size.lower())
        try:
            if match is None or match[2] not in UNITS:
                raise ValueError
            size = round(float(match[1]) * UNITS[match[2]])
        except (ValueError, OverflowError):
            raise ValueError(f"{size!r} is no size: write a number of bytes, or one with a unit, as in 16GiB") from None
    if isinstance(size, bool) or not isinstance(size, numbers.Real) or not math.isfinite(size) or size != int(size):
        raise ValueError(f"a size must be a whole number of bytes, got {size!r}")
    return int(size)


def write_bytes(size: int | float) -> str:
    """Bytes in the unit in which the number is short, such as "16.0 GiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.{0 if unit == 'bytes' else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def free_bytes(device: Any = None) -> int:
    """The memory that a device has left by its own report; of a CPU, what the system can still give.

    Args:
        device: whose; None: the default device.

    Raises:
        ValueError: the device reports nothing.
    """
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        return _free_on_host()
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ValueError(f"{device} does not report its memory: say how many bytes the pool may take (pool_bytes=...)")
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _free_on_host() -> int:
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        available = int(match[1]) * 1024 if match else _pages_on_host()
    else:
        available = _pages_on_host()
    limit, used = (pathlib.Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():  # a container's own limit
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _pages_on_host() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
