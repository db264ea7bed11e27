"""What the README and the documentation show is true: their code runs, their commands and links exist."""

import difflib
import doctest
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import paged_jax
from paged_jax import models, plot

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S), ids=lambda code: code.split("\n")[0])
def test_the_code_of_the_readme_runs(code):
    exec(compile(code, "README.md", "exec"), {})


HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))


@pytest.mark.docs
@pytest.mark.parametrize("path", HOW_TO, ids=lambda path: path.stem)
def test_the_code_of_a_how_to_runs_from_top_to_bottom(path, capsys):
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.S)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, path.name, "exec"), names)


def modules_with_examples() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "paged_jax").glob("**/*.py"))
        if "\n        >>> " in path.read_text()
        and path.name != "processors.py"  # tests/sampling/test_draw.py runs that
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_docstrings_run(name):
    """With the public names, the `config` of CacheConfig's example, and the `engine` of Engine's."""
    module = importlib.import_module(name)
    names = {name: getattr(paged_jax, name) for name in paged_jax.__all__} | {"models": models, "jax": jax, "jnp": jnp}
    names["config"] = paged_jax.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=8, num_pages=9, max_sequences=2, max_pages_per_sequence=4
    )
    if name.endswith("session"):
        sizes = {"max_sequences": 8, "max_length": 512, "token_counts": (8, 64)}
        names["engine"] = paged_jax.Engine.from_pretrained(models.DEMO, **sizes)
    examples = [test for test in doctest.DocTestFinder().find(module, globs=names | vars(module)) if test.examples]
    assert examples
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0, example.name


def test_every_public_name_has_an_entry_in_the_reference():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    entries = set(re.findall(r"^::: (\S+)$", text, re.M))
    names = {f"paged_jax.{name}" for name in paged_jax.__all__}
    names |= {f"paged_jax.models.{name}" for name in models.__all__ if name != "DEMO"}
    assert names <= entries
    for name in (*paged_jax.__all__, *plot.__all__):
        value = getattr(paged_jax, name, None) or getattr(plot, name)
        assert not callable(value) or value.__doc__, f"{name} has no docstring"


def test_the_links_of_readme_and_documentation_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_commands_of_the_readme_name_modules_that_exist():
    modules = set(re.findall(r"python -m ((?:benchmarks|paged_jax)[\w.]*)", README))
    assert modules
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_each_way_in_has_a_row_with_an_example_of_under_30_lines():
    rows = dict(re.findall(r"^\| .*\*\*(nnx|linen|pytree)\*\*.* \| \[.*\]\((\S+)\) \|$", README, re.M))
    assert rows.keys() == {"nnx", "linen", "pytree"}
    for name, path in rows.items():
        assert path == f"tests/flax/{name}_paged.py"  # which tests/flax/test_adapters.py runs
        assert len((ROOT / path).read_text().splitlines()) < 30


def test_the_diff_that_is_shown_makes_the_stock_decoder_paged():
    stock, paged = ((ROOT / f"tests/flax/nnx_{kind}.py").read_text().splitlines() for kind in ("stock", "paged"))
    real = [line for line in list(difflib.unified_diff(stock, paged, lineterm=""))[2:] if line[0] in "+- "]
    shown = [line for line in re.findall(r"```diff\n(.*?)```", README, re.S)[0].splitlines() if line]
    assert [line for line in shown if line[0] in "+-"] == [line for line in real if line[0] in "+-" and line[1:]]
    assert {line for line in shown if line[0] == " "} <= set(real)
    assert 0 < sum(line[0] in "+-" for line in real) <= 15
