"""Every notebook runs from top to bottom, and what is saved of it is what it shows."""

import ast
import importlib.util
import pathlib
import subprocess
import sys

import matplotlib
import pytest
from matplotlib import pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat", reason="the notebook extra is not installed")
MOST_BYTES = 500_000  # of a notebook with its pictures

matplotlib.use("Agg")


def read(path):
    return nbformat.read(path, as_version=4)


def run_cell(source: str, names: dict) -> None:
    """Runs a cell as Jupyter does: the value of its last line is shown."""
    *body, last = ast.parse(source).body or [ast.Pass()]
    is_shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module([*body, *([] if is_shown else [last])], []), "<cell>", "exec"), names)
    if is_shown:
        shown = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        getattr(shown, "_repr_html_", lambda: repr(shown))()


@pytest.mark.docs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")  # plt.show, where there is no screen
def test_a_notebook_runs(path, monkeypatch):
    """In this process: a Jupyter kernel costs seconds to start, and compiles again what others have compiled."""
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # a picture where there are no sliders
    names: dict = {"__name__": "__main__"}
    for cell in read(path).cells:
        if cell.cell_type == "code":
            run_cell(cell.source, names)
            plt.close("all")


@pytest.mark.long  # eight kernels, which start and compile for themselves
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_a_notebook_runs_in_a_kernel_of_its_own(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this library, whatever is installed
    nbclient = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    notebook = read(path)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert num_pictures(notebook) == num_pictures(read(path))


def num_pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_whole_with_its_pictures_and_without_errors(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "it was run from top to bottom"
    assert num_pictures(notebook) > 0 and path.stat().st_size < MOST_BYTES
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert notebook.cells[0].source.startswith("# ") and "find_spec" in code[0].source, "it can install the library"


def test_there_are_eight_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"0{i}" for i in range(1, 9)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_a_checkout_or_the_repository_that_is_filled_in(path, monkeypatch, tmp_path):
    (install, *_) = (cell.source for cell in read(path).cells if cell.cell_type == "code")
    commands = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command[-1]))
    monkeypatch.chdir(ROOT / "notebooks")
    exec(install, {})
    monkeypatch.chdir(tmp_path)
    exec(install.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/me/paged_jax"'), {})
    assert commands == ["..[notebook]", "paged_jax[notebook] @ git+https://example.org/me/paged_jax"]
    with pytest.raises(ValueError, match="fill in REPOSITORY"):
        exec(install, {})
