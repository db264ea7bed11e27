"""The layers: each file imports only what stands below it."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [  # from the bottom; a package stands for all its files, longest name first where one contains another
    ["pallas_kernels"],
    ["paged_jax.cache", "paged_jax.memory"],
    ["paged_jax.attention"],
    ["paged_jax.forward"],
    ["paged_jax.models", "paged_jax.flax"],
    ["paged_jax.sampling"],
    ["paged_jax.decoding"],
    ["paged_jax.prefix"],
    ["paged_jax.store"],
    ["paged_jax.engine"],
    ["paged_jax.plot", "paged_jax.planner", "paged_jax.cli", "paged_jax.__main__", "paged_jax.demo"],
    ["paged_jax"],  # the package's own __init__: the public names
]
MAY_IMPORT_KERNELS = {
    "paged_jax.attention",
    "paged_jax.cache.config",
    "paged_jax.cache.contents",
    "paged_jax.cache.pool",
    "paged_jax",
}
NO_KERNEL = "pallas_kernels.platform"  # anybody may ask which platform a trace is for


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    for name in sorted((name for names in LAYERS for name in names), key=len, reverse=True):
        if module == name or (name != "paged_jax" and module.startswith(name + ".")):
            return next(i for i, names in enumerate(LAYERS) if name in names)
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS")


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if is_module(name) else node.module for name in names}
    return {name for name in found if name.split(".")[0] in ("paged_jax", "pallas_kernels")}


SOURCES = sorted([*ROOT.glob("paged_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_only_what_stands_below_it(path):
    module = module_name(path)
    for name in imports(path):
        assert layer(name) <= layer(module), f"{module} imports {name}, which stands above it"
        if name.startswith("pallas_kernels") and not module.startswith("pallas_kernels") and name != NO_KERNEL:
            assert module in MAY_IMPORT_KERNELS, f"{module} imports {name}: go through attention, pool or config"


def test_the_check_sees_an_arrow_that_points_up(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("from paged_jax.engine.engine import Engine\nimport jax\n")
    assert imports(path) == {"paged_jax.engine.engine"}
    assert layer("paged_jax.engine") > layer("paged_jax.cache.page_table")


def test_importing_the_library_imports_neither_flax_nor_a_tokenizer():
    code = "import sys, paged_jax; print([m for m in ('flax', 'tokenizers', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
