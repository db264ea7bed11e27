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
        words: by the beginning of its kernels' names what their scalar half reads, operand index to words.
    """

    jitted: Any
    arguments: tuple
    words: dict[str, Words]


def rpa(case: StaticCase, version: int) -> Call:
    """The third ragged paged attention kernel of tpu-inference, "RPA v3"."""
    kernel = _module("tpu_inference", "kernels.ragged_paged_attention.v3.kernel")
    kernel.get_tpu_version = lambda: version  # it would ask the device
    batch = len(case.lengths)
    num_pages = batch * case.max_pages
    ids = np.random.default_rng(0).permutation(num_pages) + 1
    starts = np.concatenate([[0], np.cumsum(case.new_tokens)])
    decodes = batch if set(case.new_tokens) == {1} else 0
    scalars = [np.asarray(x, np.int32) for x in (case.lengths, ids, starts, (decodes, decodes, batch))]
    sizes = num_pages + 1, case.page_size, case.heads[1], case.head_dim
    shape = jax.ShapeDtypeStruct
    q, k = (shape((case.num_tokens, heads, case.head_dim), jnp.bfloat16) for heads in case.heads)
    cache = shape(kernel.get_kv_cache_shape(*sizes, jnp.bfloat16), jnp.bfloat16)
    arguments = q, k, k, cache, *(shape(x.shape, x.dtype) for x in scalars)

    def attend(*arrays):
        scale = case.head_dim**-0.5
        return kernel.ragged_paged_attention(*arrays, sm_scale=scale, sliding_window=case.window)

    states = [np.zeros(3, np.int32), np.full(4, -1), np.full(6, -1)]  # that its kernels begin with
    words = {i: [int(x) for x in array] for i, array in enumerate([*scalars, *states])}
    return Call(jax.jit(attend, donate_argnums=3), arguments, {"RPA": words})


PEERS: dict[str, Callable[[StaticCase, int], Call]] = {"rpa": rpa}


def _module(package: str, name: str) -> Any:
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
