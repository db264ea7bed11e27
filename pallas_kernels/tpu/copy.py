"""Copies whole pages inside HBM, in place."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tpu.memory import in_hbm

IN_FLIGHT = 64  # copies started before the first is waited for


def _kernel(source, target, conflict, *refs, num_arrays: int):
    arrays = refs[num_arrays : 2 * num_arrays]  # the inputs are the same memory
    stages = refs[2 * num_arrays : 3 * num_arrays]
    sem = refs[-1]
    num_pairs = source.shape[0]

    def for_all_pairs(copies_of):
        """Starts the copies of each pair, at most IN_FLIGHT pairs ahead of their waits."""

        def if_real(n, act):
            @pl.when((source[n] > 0) & (target[n] > 0))
            def _():
                for copy in copies_of(n):
                    act(copy)

        def body(n, _):
            pl.when(n >= IN_FLIGHT)(lambda: if_real(n - IN_FLIGHT, lambda copy: copy.wait()))
            pl.when(n < num_pairs)(lambda: if_real(n, lambda copy: copy.start()))
            return 0

        lax.fori_loop(0, num_pairs + IN_FLIGHT, body, 0)

    def copy(n, sources, targets):
        slot = sem.at[n & (IN_FLIGHT - 1)]
        return [pltpu.make_async_copy(s, t, slot) for s, t in zip(sources, targets, strict=True)]

    def from_page(n):
        return [x.at[source[n]] for x in arrays]

    def to_page(n):
        return [x.at[target[n]] for x in arrays]

    def stage(n):
        return [x.at[n] for x in stages]

    @pl.when(conflict[0] == 0)
    def _():
        for_all_pairs(lambda n: copy(n, from_page(n), to_page(n)))

    @pl.when(conflict[0] > 0)
    def _():
        for_all_pairs(lambda n: copy(n, from_page(n), stage(n)))
        for_all_pairs(lambda n: copy(n, stage(n), to_page(n)))


def copy_arrays(source: Array, target: Array, arrays: list[Array]) -> list[Array]:
    """Copies entries of arrays `[P, ...]`; all are read before any is written.

    Args:
        source: int32 `[C]`, ids below P; 0: nothing to copy.
        target: int32 `[C]`, likewise; distinct where they are not 0.
    """
    # A target that is another pair's source must be read first: only then do pages take a detour.
    real = (source > 0) & (target > 0)
    meets = (target[:, None] == source[None, :]) & real[:, None] & real[None, :]
    conflict = jnp.any(meets & ~jnp.eye(source.size, dtype=bool)).astype(jnp.int32)[None]
    scalars, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    arrays = [in_hbm(x) for x in arrays]
    num = len(arrays)
    results = pl.pallas_call(
        functools.partial(_kernel, num_arrays=num),
        name="paged_copy",
        out_shape=[pltpu.HBM(x.shape, x.dtype) for x in arrays]
        + [pltpu.HBM((source.size, *x.shape[1:]), x.dtype) for x in arrays],
        in_specs=[scalars] * 3 + [hbm] * num,
        out_specs=[hbm] * (2 * num),
        input_output_aliases={3 + i: i for i in range(num)},
        scratch_shapes=[pltpu.SemaphoreType.DMA((IN_FLIGHT,))],
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
    )(source, target, conflict, *arrays)
    return list(results[:num])
