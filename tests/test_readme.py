"""What the README and the documentation show is true: their code runs, their commands and links exist."""

import difflib
import pathlib
import re

import pytest

from paged_jax import models

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "how-to" / "models.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S), ids=lambda code: code.split("\n")[0])
def test_the_code_of_the_readme_runs(code, monkeypatch, shallow_demo, one_token_count):
    monkeypatch.setattr(models, "DEMO", shallow_demo)
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


def test_the_links_of_readme_and_documentation_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#:\s]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("path", ["README.md", "docs/numbers.md"])
def test_commands_name_modules_that_exist(path):
    modules = set(re.findall(r"python -m ((?:benchmarks|paged_jax)[\w.]*)", (ROOT / path).read_text()))
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
    shown = [line for line in re.findall(r"```diff\n(.*?)```", MODELS, re.S)[0].splitlines() if line]
    assert [line for line in shown if line[0] in "+-"] == [line for line in real if line[0] in "+-" and line[1:]]
    assert {line for line in shown if line[0] == " "} <= set(real)
    assert 0 < sum(line[0] in "+-" for line in real) <= 15
