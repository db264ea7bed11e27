"""Time on the device: many calls in one program, or many launches between two waits."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CALLS = 20  # in one program
ROUNDS = 5


def repeated(function: Callable[..., Any], first: jax.Array, *rest: Any) -> Callable[[], Any]:
    """`CALLS` calls of a function in one compiled program, each with a first argument that waits for the call before.

    What depends on the rest alone is computed once for all calls, as it is for the layers of a model.
    """

    def loop(first, rest):
        def call(_, carry):
            first = lax.optimization_barrier(carry)[0]
            return first, function(first, *rest)

        out = jax.eval_shape(function, first, *rest)
        return lax.fori_loop(0, CALLS, call, (first, jnp.zeros(out.shape, out.dtype)))[1]

    compiled = jax.jit(loop).lower(first, rest).compile()
    return lambda: compiled(first, rest)


def microseconds(run: Callable[[], Any], calls: int = CALLS) -> float:
    """The fastest of some rounds, in microseconds a call."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return 1e6 * best / calls


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a pass over 2 GiB."""
    x = jnp.zeros(2**30, jnp.bfloat16)
    run = jax.jit(lambda x: lax.fori_loop(0, CALLS, lambda _, x: x + jnp.ones((), x.dtype), x))
    return 2 * x.nbytes / microseconds(lambda: run(x)) * 1e6


def matrix_rate() -> float:
    """Operations a second of large bfloat16 matrix products on random data that keeps its scale."""
    size = 8192
    x, y = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    y = y * jnp.asarray(size**-0.5, y.dtype)
    run = jax.jit(lambda x, y: lax.fori_loop(0, CALLS, lambda _, x: x @ y, x))
    return 2 * size**3 / microseconds(lambda: run(x, y)) * 1e6
