"""Timing of functions against each other on a machine that does other things too."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """Milliseconds a call: of the wall clock (median and minimum), and of all this process's threads together."""

    wall: float
    fastest: float
    cpu: float


def compare(functions: dict[str, Callable[[], Any]], repeats: int = 15) -> dict[str, Timing]:
    """Times functions round by round, so that whatever else runs slows all of them alike.

    Each round has an order of its own: none always runs after the one that fills the caches or gives memory back.

    Args:
        functions: what to time, by name; each returns the arrays to wait for.
        repeats: rounds, after one that compiles.

    Returns:
        The timing of each.
    """
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    order = np.random.default_rng(0)
    for _ in range(repeats):
        for name in order.permutation(list(functions)).tolist():
            function = functions[name]
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {
        name: Timing(*(1e3 * float(x) for x in (np.median(wall[name]), min(wall[name]), np.median(cpu[name]))))
        for name in functions
    }
