"""Attention kernels of other libraries, compiled for the lengths and shapes of a case with the block sizes they choose.

Pages of bfloat16. A library is needed only where its kernels are compiled: install it beside paged_jax in an
environment of its own, with the same jax and libtpu, and run `benchmarks.tpu_static` from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.tpu_static.cases import StaticCase

Words = dict[int, list[int]]
VERSIONS = {"v5e": 5, "v5p": 5, "v6e": 6, "v7x": 7}


class Call(NamedTuple):
    """A call to be compiled.

    Args:
        jitted, arguments: the function, and the shapes of its arguments.
        words: by the beginning of its kernels' names what their scalar half reads, operand index to words. To be called
            once the function has been traced.
    """

    jitted: Any
    arguments: tuple
    words: Callable[[], dict[str, Words]]


class _Operands(NamedTuple):
    """What both kernels take, as they name it."""

    kv_lens: np.ndarray
    page_indices: np.ndarray
    cu_q_lens: np.ndarray
    distribution: np.ndarray  # of the sequences, how many decode, decode or prefill, are there


def _operands(case: StaticCase) -> _Operands:
    batch = len(case.lengths)
    ids = np.random.default_rng(0).permutation(batch * case.max_pages) + 1
    decodes = batch if set(case.new_tokens) == {1} else 0
    starts = np.concatenate([[0], np.cumsum(case.new_tokens)])
    return _Operands(*(np.asarray(x, np.int32) for x in (case.lengths, ids, starts, (decodes, decodes, batch))))


def _arguments(case: StaticCase, cache_shape: tuple[int, ...], operands: _Operands) -> tuple:
    shape = jax.ShapeDtypeStruct
    q, k = (shape((case.num_tokens, heads, case.head_dim), jnp.bfloat16) for heads in case.heads)
    return q, k, k, shape(cache_shape, jnp.bfloat16), *(shape(x.shape, x.dtype) for x in operands)


def rpa(case: StaticCase, version: int) -> Call:
    """The third ragged paged attention kernel of tpu-inference, "RPA v3"."""
    kernel = _module("tpu_inference", "kernels.ragged_paged_attention.v3.kernel")
    kernel.get_tpu_version = lambda: version  # it would ask the device
    operands = _operands(case)
    sizes = len(operands.page_indices) + 1, case.page_size, case.heads[1], case.head_dim
    arguments = _arguments(case, kernel.get_kv_cache_shape(*sizes, jnp.bfloat16), operands)

    def attend(*arrays):
        scale = case.head_dim**-0.5
        return kernel.ragged_paged_attention(*arrays, sm_scale=scale, sliding_window=case.window)

    scalars = [*operands, np.zeros(3, np.int32), np.full(4, -1), np.full(6, -1)]
    return Call(jax.jit(attend, donate_argnums=3), arguments, lambda: {"RPA": _words(scalars)})


def tokamax(case: StaticCase, version: int) -> Call:
    """`ragged_paged_attention` of tokamax: kernels that list copies, and kernels that attend after these lists."""
    del version
    wrapper = _module("tokamax", "_src.ops.batched_rpa.kernel.wrapper")
    op = _module("tokamax", "_src.ops.batched_rpa.pallas_mosaic_tpu")
    operands = _operands(case)
    sizes = len(operands.page_indices) + 1, case.page_size, case.heads[1], case.head_dim
    arguments = _arguments(case, wrapper.get_kv_cache_shape(*sizes, jnp.bfloat16), operands)
    list_copies, traced = wrapper.schedule.generate_rpa_metadata, []

    def remember(*arrays, cfgs, **options):
        traced.append(cfgs)
        return list_copies(*arrays, cfgs=cfgs, **options)

    wrapper.schedule.generate_rpa_metadata = remember

    def attend(*arrays):
        out, _ = op.PallasTpuBatchedRpa()._fwd(
            *arrays, sm_scale=case.head_dim**-0.5, sliding_window=case.window, config=op.Config()
        )
        return out

    def words() -> dict[str, Words]:
        query_lens = np.diff(operands.cu_q_lens)
        cached = operands.kv_lens - query_lens
        scalars = [operands.cu_q_lens, cached, cached, query_lens]
        found = {"rpa_metadata_schedule": _words([*scalars, operands.distribution])}
        for cfgs in traced:
            lists = list_copies(*map(jnp.asarray, (*scalars, operands.distribution)), cfgs=cfgs, interpret=True)
            name = wrapper.kernel.get_kernel_name(cfgs)
            found[name] = _words([*scalars, operands.page_indices, *jax.tree.leaves(lists)])
        return found

    return Call(jax.jit(attend, donate_argnums=3), arguments, words)


PEERS: dict[str, Callable[[StaticCase, int], Call]] = {"rpa": rpa, "tokamax": tokamax}


def _words(arrays) -> Words:
    return {i: [int(x) for x in np.asarray(array)] for i, array in enumerate(arrays)}


def _module(package: str, name: str) -> types.ModuleType:
    """A module of an installed package, without the package's own `__init__`, which may import a whole server.

    Raises:
        ModuleNotFoundError: the package is not installed for this interpreter.
    """
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError(f"{package} is not installed for {sys.executable}: install it beside paged_jax")
        sys.modules[package] = empty = types.ModuleType(package)
        empty.__path__ = list(found.submodule_search_locations)
    return importlib.import_module(f"{package}.{name}")
