"""What the GPU kernels cost on paper.

    python -m benchmarks.gpu_static [--case TEXT] [--json]

Compiles each kernel for an H200 on any machine, disassembles it and follows one warp of each role through its loop, a
tile of keys at a time (`sass.py` says with which latencies). Cycles, of one multiprocessor:

    compute, move    what a tile takes the warps that compute and those that move it, each alone
    issue            what a tile takes a scheduler to issue, for all roles
    bound            what the hardware needs for a tile: its bytes from memory (decode), its products (rows)
    share            of the hardware that the schedule can use: bound / the slowest of all (two blocks of the decode
                     kernel take turns, which halves its cycles); late copies and the ends of the work are not in it

It needs `pip install 'paged_jax[compile]'`, no GPU and no driver.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks.gpu_static.compile import MAX_PAGES, Case, disassembler, machine_code
from benchmarks.gpu_static.sass import Loop, find_loop, scheduler_cycles
from benchmarks.report import Report, add_json_option
from pallas_kernels.gpu.decode import decode_tile
from pallas_kernels.gpu.hardware import MULTIPROCESSORS
from pallas_kernels.gpu.rows import row_tile

CLOCK = 1.98e9  # an H200's highest
MEMORY_BYTES = 4.8e12 / CLOCK / MULTIPROCESSORS  # a cycle and multiprocessor
PAGE_COPIES = r"UTMALDG\.[45]D"

CASES = [
    Case(kernel, dtype, page_size, heads)
    for kernel in ("decode", "rows")
    for heads, page_sizes in (
        ((32, 8, 128), (16, 64, 128)),
        ((16, 1, 128), (64,)),
        ((64, 8, 64), (64,)),
        ((16, 8, 256), (64,)),
    )
    for dtype in ("bfloat16", "int8", "float8_e4m3fn")
    for page_size in page_sizes
]


def measure(case: Case) -> dict[str, Any]:
    """A row of the table."""
    code = machine_code(case)
    compute, move = find_loop(code, "GMMA"), find_loop(code, PAGE_COPIES)
    cost = decode_cost if case.kernel == "decode" else rows_cost
    return {"case": case.name, **cost(case, compute, move)}


def decode_cost(case: Case, compute: Loop, move: Loop) -> dict[str, Any]:
    num_heads, num_kv_heads, head_dim = case.heads
    tile = decode_tile(num_heads // num_kv_heads, head_dim, case.page_size, MAX_PAGES, jnp.dtype(case.dtype))
    itemsize = jnp.dtype(case.dtype).itemsize
    num_bytes = 2 * tile.tokens * (head_dim * itemsize + (4 if itemsize == 1 else 0))
    issue = scheduler_cycles([compute, move])
    slowest = max(compute.cycles / tile.blocks, move.cycles / tile.blocks, issue, compute.products)
    return row(tile.tokens, compute, move, issue, num_bytes / MEMORY_BYTES, slowest)


def rows_cost(case: Case, compute: Loop, move: Loop) -> dict[str, Any]:
    tile = row_tile(case.heads[2], case.page_size, MAX_PAGES, jnp.dtype(case.dtype), 1)
    issue = scheduler_cycles([compute] * tile.warpgroups + [move])
    return row(
        tile.tokens, compute, move, issue, tile.warpgroups * compute.products, max(compute.cycles, move.cycles, issue)
    )


def row(tokens: int, compute: Loop, move: Loop, issue: int, bound: float, slowest: float) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "compute": compute.cycles,
        "move": move.cycles,
        "issue": issue,
        "bound": round(bound),
        "share": round(bound / max(bound, slowest), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases with this text in their name")
    add_json_option(parser)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing is run on a device
    if disassembler() is None:
        parser.exit(2, "NVIDIA's disassembler is not installed: pip install 'paged_jax[compile]'.\n")
    report = Report("gpu_static", "Cycles of a tile on an H200, from the compiled kernels")
    for case in track([case for case in CASES if options.case in case.name], "compiling"):
        report.add(**measure(case))
    report.finish(options)


if __name__ == "__main__":
    main()
