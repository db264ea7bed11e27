"""Attention kernels of other libraries, compiled for the lengths and shapes of a case with the block sizes they choose.

A library is needed only where its kernels are compiled: install it beside paged_jax in an environment of its own, with
the same jax and libtpu, and run `benchmarks.tpu_static` from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_static.cases import StaticCase

Words = dict[int, list[int]]
VERSIONS = {"v5e": 5, "v5p": 5, "v6e": 6, "v7x": 7}


class Call(NamedTuple):
    """A call to be compiled.

    Args:
        jitted, arguments: the function, and the shapes of its arguments.
        words: by the beginning of its kernels' names what their scalar half reads, operand index to words.
    """

    jitted: Any
    arguments: tuple
    words: dict[str, Words]


def rpa(case: StaticCase, chip: str) -> Call:
    """The third ragged paged attention kernel of tpu-inference, "RPA v3"."""
    _refuse(case, "bfloat16")
    kernel = _module("tpu_inference", "kernels.ragged_paged_attention.v3.kernel")
    kernel.get_tpu_version = lambda: VERSIONS[chip]  # it would ask the device
    scalars = _scalars(case)
    arguments = _arguments(case, kernel.get_kv_cache_shape, scalars)

    def attend(*arrays):
        scale = case.head_dim**-0.5
        return kernel.ragged_paged_attention(*arrays, sm_scale=scale, sliding_window=case.window)

    states = [np.zeros(3, np.int32), np.full(4, -1), np.full(6, -1)]  # that its kernels begin with
    return Call(jax.jit(attend, donate_argnums=3), arguments, {"RPA": _words([*scalars, *states])})


def tokamax(case: StaticCase, chip: str, **sizes: int) -> Call:
    """The ragged paged attention of tokamax: for decodes, prefills and mixed steps a kernel, and one that plans for it.

    A plan is a list of copies in HBM. Here JAX's interpreter makes it from the lengths of the case.

    Args:
        case, chip: what is compiled, and for which chip.
        sizes: fields of its configuration, instead of the one that it chooses.
    """
    _refuse(case, "bfloat16", "float8_e4m3fn")
    op, wrapper = (
        _module("tokamax", f"_src.ops.batched_rpa.{name}") for name in ("pallas_mosaic_tpu", "kernel.wrapper")
    )
    ragged_paged_attention = op.PallasTpuBatchedRpa(config=op.Config(**sizes) if sizes else None)
    cross_compile = _module("tokamax", "config").cross_compile
    lengths, ids, starts, modes = scalars = _scalars(case)
    arguments = _arguments(case, wrapper.get_kv_cache_shape, scalars)
    scale = None if case.dtype == "bfloat16" else 1.0
    options = {"sm_scale": case.head_dim**-0.5, "sliding_window": case.window, "k_scale": scale, "v_scale": scale}

    def attend(*arrays):
        with cross_compile(True):  # no device is asked what it supports
            return ragged_paged_attention(*arrays, **options)

    cached = lengths - np.diff(starts)
    planned = [starts, cached, cached, np.diff(starts)]  # first tokens; tokens in the pages, twice; new ones
    words = {"rpa_metadata_schedule": _words([*planned, modes])}
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(chip.replace("v7", "7")), 1)
    plan = wrapper.schedule.generate_rpa_metadata
    with (
        mock.patch.object(pltpu, "get_tpu_info", return_value=info),
        mock.patch.object(wrapper.schedule, "generate_rpa_metadata", wraps=plan) as calls,
    ):
        jax.eval_shape(attend, *arguments)
        for call in calls.call_args_list:
            *fields, waits, steps = jax.tree.leaves(plan(*planned, modes, **call.kwargs, interpret=True))
            # Of each array the part that is made: as many steps as there are, of all that it has room for.
            made = [x[: x.size // waits.size * int(steps[0])] for x in (*fields, waits)]
            words["RPA" + call.kwargs["cfgs"].mode.symbol] = _words([*planned, ids, *made, steps])
    return Call(jax.jit(attend, donate_argnums=3), arguments, words)


# The fewest cycles for 512 tokens on 4096, 32/8/128, v7x, of seven tried.
FOR_PREFILL = {
    "prefill_bq_sz": 256, "bkv_sz": 1024, "n_buffer": 2, "prefill_batch_size": 1, "decode_batch_size": 4,
}  # fmt: skip
PEERS: dict[str, Callable[[StaticCase, str], Call]] = {
    "rpa": rpa,
    "tokamax": tokamax,
    "tokamax_for_prefill": partial(tokamax, **FOR_PREFILL),
}


def _refuse(case: StaticCase, *dtypes: str) -> None:
    """Raises:
    NotImplementedError: a peer would measure something else than the case.
    """
    if case.dtype not in dtypes or case.sinks or case.levels:
        takes = f"pages of {' or '.join(dtypes)}, no sinks and no shared pages"
        raise NotImplementedError(f"{case.name!r}: this peer takes {takes}; choose another --case")


def _scalars(case: StaticCase) -> list[np.ndarray]:
    """Lengths, page ids, first tokens, and where decodes, prefills and all sequences end."""
    batch = len(case.lengths)
    ids = np.random.default_rng(0).permutation(batch * case.max_pages) + 1
    starts = np.concatenate([[0], np.cumsum(case.new_tokens)])
    decodes = next((i for i, count in enumerate(case.new_tokens) if count > 1), batch)
    return [np.asarray(x, np.int32) for x in (case.lengths, ids, starts, (decodes, decodes, batch))]


def _arguments(case: StaticCase, cache_shape: Callable, scalars: list[np.ndarray]) -> tuple:
    """Queries, keys, values, pages, scalars."""
    sizes = scalars[1].size + 1, case.page_size, case.heads[1], case.head_dim
    shape, dtype = jax.ShapeDtypeStruct, jnp.dtype(case.dtype)
    q = shape((case.num_tokens, case.heads[0], case.head_dim), jnp.bfloat16)
    k = shape((case.num_tokens, case.heads[1], case.head_dim), dtype)
    return q, k, k, shape(cache_shape(*sizes, dtype), dtype), *(shape(x.shape, x.dtype) for x in scalars)


def _words(arrays: list) -> Words:
    return {i: np.asarray(x).tolist() for i, x in enumerate(arrays)}


def _module(package: str, name: str) -> Any:
    """A module of an installed package, without the package's own `__init__`, which may import a whole server.

    Raises:
        ModuleNotFoundError: the package is not installed for this interpreter.
    """
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError(f"{package} is not installed for {sys.executable}: install it beside paged_jax")
        sys.modules[package] = importlib.util.module_from_spec(found)
    return importlib.import_module(f"{package}.{name}")
