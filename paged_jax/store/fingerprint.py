"""What the pages of a prefix depend on besides its tokens, as a digest that is the same in every process."""

import dataclasses
import os
import re
from hashlib import blake2b
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.forward import Forward
from paged_jax.prefix.digests import DIGEST_BYTES
from paged_jax.store.page_file import VERSION

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def fingerprint(forward: Forward, params: Any, config: CacheConfig) -> bytes:
    """A digest of a model and of how it keeps its pages.

    It covers the weights, byte for byte; the program that computes keys and values (architecture, RoPE, windows), as it
    is traced for one token; the dtype and the sizes of a page; which layers share a page table; the platform; and the
    version of the layout of a stored page. The sizes of the pool and of the batch are not in it.

    Args:
        forward: the decoder.
        params: its parameters.
        config: sizes of the cache.

    Returns:
        32 bytes.
    """
    hashed = blake2b(digest_size=DIGEST_BYTES, person=b"model")
    groups = [(group.layers, group.window) for group in config.groups]
    sizes = config.num_layers, config.num_kv_heads, config.head_dim, config.page_size, config.dtype
    for part in (VERSION, jax.default_backend(), sizes, groups, _program(forward, params, config)):
        _add(hashed, repr(part).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _add_array(hashed, jax.tree_util.keystr(path), leaf)
    return hashed.digest()


def _program(forward: Forward, params: Any, config: CacheConfig) -> str:
    """What the decoder computes of one token, whatever the sizes of the pool and of the batch."""
    longest = max((window for window in config.windows if window is not None), default=0)
    sizes = {"num_pages": 2, "window_pages": None, "max_sequences": 1}
    config = dataclasses.replace(config, **sizes, max_pages_per_sequence=longest // config.page_size + 2)

    def compute(params: Any) -> Any:
        cache = KVCache.create(config)
        metadata = AttentionMetadata.decode(cache.tables, active=jnp.ones(1, bool))
        return forward(params, jnp.zeros(1, jnp.int32), cache.pool, metadata)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    traced = jax.make_jaxpr(compute)(shapes)
    hashed = blake2b(digest_size=DIGEST_BYTES)
    _add_constants(hashed, traced)
    return _ADDRESS.sub("", str(traced)) + hashed.hexdigest()


def _add_constants(hashed: blake2b, part: Any) -> None:
    """All arrays in a program, also in those inside it, which its text leaves out.

    A call back to Python may do anything, so a program that has one is like no other, not even like itself.
    """
    if hasattr(part, "eqns"):  # a program, with its arrays or without
        _add_constants(hashed, getattr(part, "consts", ()))
        for equation in part.eqns:
            if "callback" in equation.primitive.name:
                _add(hashed, os.urandom(DIGEST_BYTES))
            _add_constants(hashed, (equation.invars, equation.params))
    elif isinstance(part, Literal):
        _add_constants(hashed, part.val)
    elif isinstance(part, dict):
        _add_constants(hashed, [part[key] for key in sorted(part, key=str)])
    elif isinstance(part, list | tuple):
        for one in part:
            _add_constants(hashed, one)
    elif isinstance(part, np.ndarray | np.generic | jax.Array):
        _add_array(hashed, "", part)


def _add_array(hashed: blake2b, name: str, array: Any) -> None:
    host = np.asarray(jax.device_get(array))
    _add(hashed, f"{name} {host.dtype} {host.shape}".encode())
    _add(hashed, np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)


def _add(hashed: blake2b, part: Any) -> None:
    hashed.update(len(part).to_bytes(8, "big"))
    hashed.update(part)
