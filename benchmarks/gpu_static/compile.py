"""A kernel's machine code, compiled for an H200 and disassembled on any machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.gpu_static.target import compile_for_h200
from pallas_kernels import init_pages, paged_attention

MAX_PAGES = 256  # columns of the page table


class Case(NamedTuple):
    """Attention to pages of one kind: by the decode kernel where a sequence has one query, else by the rows kernel."""

    kernel: str
    dtype: str
    page_size: int
    heads: tuple[int, int, int] = (32, 8, 128)  # N, K, H

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.dtype} page {self.page_size} heads {'/'.join(map(str, self.heads))}"


def disassembler() -> Path | None:
    """The folder of NVIDIA's disassembler, as Mosaic GPU looks for it."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(x.locate())).parents[1] for x in files if x.name == "nvdisasm"), None)


def machine_code(case: Case) -> str:
    """The machine code of the case's kernel."""
    # A process of its own: JAX reads CUDA_ROOT on import, and a process dumps a kernel only when it first compiles it.
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            CUDA_ROOT=str(disassembler()),
            MOSAIC_GPU_DUMP_TO=folder,
            MOSAIC_GPU_DUMP_SASS_CTRL="1",
        )
        child = [sys.executable, "-m", "benchmarks.gpu_static.compile", json.dumps(case)]
        subprocess.run(child, env=environment, cwd=Path(__file__).parents[2], check=True)
        (path,) = Path(folder).glob(f"paged_{case.kernel}_[0-9]*.sass_ctrl")
        return path.read_text()


def main() -> None:
    case = Case(*json.loads(sys.argv[1]))
    num_heads, num_kv_heads, head_dim = case.heads
    pages = jax.eval_shape(partial(init_pages, 4096, num_kv_heads, case.page_size, head_dim, case.dtype))
    batch, tokens = (64, 64) if case.kernel == "decode" else (1, 4096)
    attend = partial(paged_attention, max_query_len=tokens // batch, implementation="pallas_gpu")

    def array(*shape: int, dtype: Any = jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    q = array(tokens, num_heads, head_dim, dtype=jnp.bfloat16)
    table = array(batch, MAX_PAGES)
    compile_for_h200(jax.jit(attend), q, None, None, pages, table, array(batch), array(batch + 1))


if __name__ == "__main__":
    main()
