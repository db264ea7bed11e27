"""The memory and the bandwidth of accelerators, and of the device at hand."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from paged_jax.cache.sizes import free_bytes, read_bytes

GIB = 1024**3
LEAST_BYTES = 2**20  # a number below was meant in another unit


class Chip(NamedTuple):
    """What JAX sees as one device.

    Examples:
        >>> CHIPS["v5e"].memory_bytes / 2**30, CHIPS["v5e"].bytes_per_second / 1e9
        (16.0, 819.0)
    """

    name: str
    memory_bytes: int
    bytes_per_second: float  # of its memory; 0: not known
    platform: str


# Memory as the devices report it, bandwidth as their vendors do. A v7x chip is two devices.
CHIPS = {
    "v5e": Chip("v5e", 16 * GIB, 819e9, "tpu"),
    "v5p": Chip("v5p", 95 * GIB, 2765e9, "tpu"),
    "v6e": Chip("v6e", 32 * GIB, 1640e9, "tpu"),
    "v7x": Chip("v7x", 96 * GIB, 3690e9, "tpu"),
    "h100": Chip("H100", 81559 * 1024**2, 3350e9, "gpu"),
    "h200": Chip("H200", 143771 * 1024**2, 4800e9, "gpu"),
}


def find_chip(memory: Chip | str | int | float) -> Chip:
    """A chip by its name, the device that JAX runs on ("here"), or one that is a size and nothing else.

    Raises:
        ValueError: it is neither.

    Examples:
        >>> find_chip("H100").name, find_chip("16GiB").memory_bytes, find_chip(4e9).memory_bytes
        ('H100', 17179869184, 4000000000)
    """
    if isinstance(memory, Chip):
        return memory
    name = str(memory).lower()
    if name in CHIPS:
        return CHIPS[name]
    if name == "here":
        device = jax.devices()[0]
        return Chip(device.device_kind, free_bytes(device), 0.0, device.platform)
    try:
        size = read_bytes(memory)
        if isinstance(memory, str) and size < LEAST_BYTES:
            raise ValueError(f"{size} bytes hold no model: give a unit, as in {size or 16}GiB")
        return Chip("a device", size, 0.0, jax.default_backend())
    except ValueError as error:
        raise ValueError(f"memory={memory!r}: {error}; or name one of {', '.join(CHIPS)}, here") from None


def measure_bandwidth(num_bytes: int = 2**28) -> float:
    """Bytes a second that the default device reads, measured by adding up an array.

    Examples:
        >>> gigabytes_a_second = measure_bandwidth(num_bytes=2**20) / 1e9
    """
    x = jnp.ones(num_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds)
