"""What makes pages valid: other in any of it is another fingerprint; the same is the same in every process."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hash_decoder as decoder
from paged_jax import CacheConfig, models
from paged_jax.models.rope import Rope
from paged_jax.prefix.digests import Namespace, chain
from paged_jax.store import fingerprint as module
from paged_jax.store.fingerprint import fingerprint

TINY = models.DecoderConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    windows=(6, None),
)  # fmt: skip
SIZES = CacheConfig(
    num_layers=2, num_kv_heads=1, head_dim=8, num_pages=9, max_sequences=2, max_pages_per_sequence=8, page_size=4,
    dtype="float32", windows=(6, None),
)  # fmt: skip


@functools.cache
def split(config: models.DecoderConfig, seed: int):
    return nnx.split(models.Decoder(config, rngs=nnx.Rngs(seed)))


def make(config: models.DecoderConfig = TINY, seed: int = 0):
    graph, params = split(config, seed)
    return lambda params, *step: nnx.merge(graph, params)(*step), params


def of(config: models.DecoderConfig = TINY, seed: int = 0, sizes: CacheConfig = SIZES) -> str:
    return fingerprint(*make(config, seed), sizes).hex()


@pytest.fixture(scope="module")
def ours() -> str:
    return of()


def of_function(function) -> str:
    """Of a decoder that changes its tokens first."""
    config = dataclasses.replace(decoder.config(9), max_sequences=2)
    return fingerprint(lambda p, t, *step: decoder.forward(p, function(t), *step), jnp.int32(0), config).hex()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, lambda f: jax.jit(jax.jit(f))])
def test_arrays_inside_of_the_program_count_wherever_they_stand(wrap):
    tables = [jnp.asarray(np.random.default_rng(seed).permutation(97), jnp.int32) for seed in (0, 0, 1)]
    first, same, other = (of_function(wrap(lambda tokens, table=table: table[tokens])) for table in tables)
    assert first == same != other


def test_a_program_that_calls_back_to_python_is_like_no_other():
    def call_back(tokens):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), tokens)

    assert of_function(call_back) != of_function(call_back)


FIVE = (5, None)
CHANGES = {
    "weights": lambda: of(seed=1),
    "rope": lambda: of(dataclasses.replace(TINY, rope=Rope(theta=10_001.0))),
    "architecture": lambda: of(dataclasses.replace(TINY, qk_norm=True)),
    "a window": lambda: of(dataclasses.replace(TINY, windows=FIVE), sizes=dataclasses.replace(SIZES, windows=FIVE)),
    "dtype": lambda: of(sizes=dataclasses.replace(SIZES, dtype="int8")),
    "page size": lambda: of(sizes=dataclasses.replace(SIZES, page_size=8)),
    "which layers share a table": lambda: of(sizes=dataclasses.replace(SIZES, max_pages_per_sequence=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_pages_depend_on_is_in_it(name, ours):
    assert CHANGES[name]() != ours


def test_one_bit_of_the_weights_is_in_it(ours):
    forward, params = make()
    leaves, structure = jax.tree.flatten(params)
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].multiply(1 + 2**-23)
    assert fingerprint(forward, jax.tree.unflatten(structure, leaves), SIZES).hex() != ours


def test_the_version_of_the_layout_is_in_it(monkeypatch, ours):
    monkeypatch.setattr(module, "VERSION", 2)
    assert of() != ours


def test_what_pages_do_not_depend_on_is_not_in_it(ours):
    assert of() == ours
    assert of(sizes=dataclasses.replace(SIZES, num_pages=99, max_sequences=5, window_pages=50)) == ours
    assert of(sizes=dataclasses.replace(SIZES, max_pages_per_sequence=16)) == ours


def test_another_process_has_the_same(ours):
    here = Path(__file__).parent
    code = "import test_fingerprint as t; print(t.of())"
    paths = f"{here}:{here.parent}:{here.parent.parent}"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ours


def test_digests_of_prefixes_cover_all_that_names_them():
    def last(namespace: Namespace, tokens: bytes = bytes(64)) -> bytes:
        return list(chain(namespace, tokens, 32))[-1][1]

    spaces = [
        ("", "", 0),
        ("a", "", 0),
        ("", "a", 0),
        ("ab", "", 0),
        ("a", "b", 0),
        ("", "", 1),
        ("", "", "1"),
        ("", "", "0"),
    ]
    names = {last(Namespace(*space)) for space in spaces}
    assert len(names) == len(spaces), "salt, adapter and weights, each in its place"
    assert last(Namespace(), b"\1" + bytes(63)) not in names, "what a page continues"
    assert last(Namespace(), bytes(32)) not in names and last(Namespace(), bytes(63) + b"\1") not in names
    assert last(Namespace()) == last(Namespace())
