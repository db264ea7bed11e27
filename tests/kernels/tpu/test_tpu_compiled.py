"""The kernels compiled for real chips on a machine without one: they fit, alias the pages and copy none of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tpu_compile
ROOT = Path(__file__).parents[3]
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# A process of its own: libtpu reads its environment once, and the tests run on fake CPU devices.
PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from benchmarks.tpu_static.cases import StaticCase, arguments, abstract_pages, step
from benchmarks.tpu_static.target import compile_for
from pallas_kernels import copy_pages

for case in (
    StaticCase("decode", (2048,) * 32),
    StaticCase("decode", (1024,) * 16, heads=(8, 1), page_size=64),
    StaticCase("decode", (1024,) * 16, head_dim=64, page_size=128),
    StaticCase("mixed", (2048,) * 7 + (4096,), (1,) * 7 + (512,), head_dim=80),
    StaticCase("decode", (1024,) * 16, dtype="float8_e4m3fn", page_size=64),
    StaticCase("decode", (1024,) * 16, dtype="int8", page_size=64),
    StaticCase("mixed", (131072,) * 1024, (1,) * 1023 + (512,), pool_bytes=2 << 30),  # the page table streams
    StaticCase("decode", (300,) * 16, dtype="int8", page_size=16),  # items of 20 pages
    StaticCase("groups", (2048,) * 64, levels=((64, 512), (8, 1536))),
    StaticCase("prefill", (4096,), (512,), heads=(16, 16), head_dim=256),  # tasks of half of the heads
    StaticCase("mixed", (2048,) * 7 + (4096,), (1,) * 7 + (512,)),
    StaticCase("mixed", (2048,) * 7 + (4096,), (1,) * 7 + (512,), dtype="int8", page_size=16),
)[int(sys.argv[2]) :: int(sys.argv[3])]:
    compiled = compile_for(sys.argv[1], step, *arguments(case), case=case)
    memory, pool = compiled.memory_analysis(), abstract_pages(case).num_bytes
    assert memory.alias_size_in_bytes >= pool, (case, memory)
    tokens = case.num_tokens * case.heads[0] * case.head_dim
    assert memory.temp_size_in_bytes < 32 * tokens + 0.02 * pool, (case, memory)
pages = abstract_pages(StaticCase("copy", (2048,) * 32))
pairs = jax.ShapeDtypeStruct((32,), jnp.int32)
copy = jax.jit(lambda *a: copy_pages(*a, implementation="pallas_tpu"), donate_argnums=0)
memory = compile_for(sys.argv[1], copy, pages, pairs, pairs).memory_analysis()
assert memory.alias_size_in_bytes >= pages.num_bytes
assert memory.temp_size_in_bytes < 0.02 * pages.num_bytes
"""


# Each of three chips takes another third of the cases; in the long form each takes all.
THIRDS = [("v6e", 0, 3), ("v5e", 1, 3), ("tpu7x", 2, 3)]


@pytest.mark.parametrize(
    ("chip", "first", "every"), THIRDS + [pytest.param(chip, 0, 1, marks=pytest.mark.long) for chip in TOPOLOGIES]
)
def test_compiles_and_copies_no_pages(chip, first, every):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        PYTHONPATH=str(ROOT),
    )
    command = [sys.executable, "-c", PROGRAM, TOPOLOGIES[chip], str(first), str(every)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
