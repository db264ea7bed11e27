"""Every public name is in the reference with an example, and the examples of all docstrings run."""

import dataclasses
import doctest
import functools
import importlib
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_jax
import pallas_kernels
from paged_jax import models, sampling

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC_MODULES = (
    "paged_jax",
    "paged_jax.attention",
    "paged_jax.engine",
    "paged_jax.flax.linen",
    "paged_jax.flax.nnx",
    "paged_jax.memory",
    "paged_jax.models",
    "paged_jax.planner",
    "paged_jax.plot",
    "paged_jax.prefix.policies",
    "paged_jax.sampling",
    "paged_jax.store",
    "pallas_kernels",
)
FINDER = doctest.DocTestFinder()


def public_names() -> dict[str, object]:
    """What has a page in the reference, by the name under which it is imported; each thing once."""
    found: dict[str, object] = {}
    for name in PUBLIC_MODULES:
        module = importlib.import_module(name)
        for member in module.__all__:
            value = getattr(module, member)
            if callable(value) and not any(value is other for other in found.values()):
                found[f"{name}.{member}"] = value
    return found


def has_example(value: object) -> bool:
    return any(test.examples for test in FINDER.find(value, "name"))


def is_shown(value: object, names: dict[str, object]) -> bool:
    """Whether a docstring has an example, or says first of all which public name returns this: that has one."""
    if has_example(value):
        return True
    first_paragraph = (value.__doc__ or "").split("\n\n")[0]
    named = {name.split(".")[0] for name in re.findall(r"`(\w[\w.]*)[^`]*`", first_paragraph)}
    return any(name.split(".")[-1] in named and has_example(other) for name, other in names.items() if other != value)


NAMES = public_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_or_names_what_returns_it(name):
    assert is_shown(NAMES[name], NAMES), f"{name} has no example"


def test_the_check_sees_a_missing_example():
    def plain():
        """Does something."""

    def shown():
        """What `other` returns."""

    def other():
        """Makes one.

        >>> 1
        1
        """

    names: dict[str, object] = {"m.plain": plain, "m.shown": shown, "m.other": other}
    assert [is_shown(value, names) for value in names.values()] == [False, True, True]


def test_every_public_name_has_an_entry_in_the_reference():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", text, re.M))
    for entry in entries:
        assert resolve(entry) is not None, entry
    whole = {entry for entry in entries if isinstance(resolve(entry), types.ModuleType)}
    for name, value in NAMES.items():
        listed = name in entries or name.rpartition(".")[0] in whole
        listed |= f"{getattr(value, '__module__', '')}.{name.split('.')[-1]}" in entries
        assert listed, f"{name} has no entry in docs/reference"


def resolve(entry: str) -> object:
    """A module, or a name in one."""
    try:
        return importlib.import_module(entry)
    except ModuleNotFoundError:
        module, _, name = entry.rpartition(".")
        return getattr(importlib.import_module(module), name)


def modules_with_examples() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("paged_jax", "pallas_kernels")
        for path in sorted((ROOT / package).glob("**/*.py"))
        if "\n        >>> " in path.read_text()
    ]


def counting(params, tokens, pool, metadata):
    """The decoder of `Forward`'s example."""
    return params[tokens[metadata.logits_at]], pool


@pytest.fixture(scope="module")
def engine():
    """That of `Engine`'s example."""
    return paged_jax.Engine.from_pretrained(models.DEMO, max_sequences=8, max_length=512, token_counts=(8, 64))


SLOW = (  # they compile
    "paged_jax.attention",
    "paged_jax.cache",
    "paged_jax.decoding",
    "paged_jax.engine",
    "paged_jax.flax",
    "paged_jax.memory",
    "paged_jax.models",
    "paged_jax.planner",
    "paged_jax.plot",
    "paged_jax.sampling",
    "pallas_kernels",
)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.docs] * x.startswith(SLOW)) for x in modules_with_examples()]
)
def test_the_examples_of_docstrings_run(name, request):
    """With the public names, and what the examples of CacheConfig, Forward and Engine make."""
    module = importlib.import_module(name)
    package = pallas_kernels if name.startswith("pallas_kernels") else paged_jax
    names = {name: getattr(package, name) for name in package.__all__} | {"draw": sampling.draw, "models": models}
    names |= {"jax": jax, "jnp": jnp, "np": np, "functools": functools, "dataclasses": dataclasses}
    names["config"] = paged_jax.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=8, num_pages=9, max_sequences=2, max_pages_per_sequence=4
    )
    names |= {"forward": counting, "params": 9 * jnp.roll(jnp.eye(8), 1, axis=1)}
    examples = [test for test in FINDER.find(module, globs=names | vars(module)) if test.examples]
    assert examples
    if any("engine." in example.source for test in examples for example in test.examples):
        for test in examples:
            test.globs.setdefault("engine", request.getfixturevalue("engine"))
    for test in examples:
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert runner.run(test).failed == 0, test.name
    if name.startswith("paged_jax.plot"):
        importlib.import_module("matplotlib.pyplot").close("all")
