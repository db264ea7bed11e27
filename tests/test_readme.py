"""What the README shows is true: its code runs, its commands exist."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S), ids=lambda code: code.split("\n")[0])
def test_the_code_of_the_readme_runs(code):
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  our own text


def test_the_commands_of_the_readme_name_modules_that_exist():
    modules = set(re.findall(r"python -m ((?:benchmarks|paged_jax)[\w.]*)", README))
    assert modules
    for module in modules:
        path = pathlib.Path(__file__).parent.parent / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
