"""What the TPU kernels cost on paper.

    python -m benchmarks.tpu_static [--models [NAME]] [--chip v6e] [--case TEXT] [--gate] [--write | --check | --peer P]

For each case and chip: compiles `paged_attention` ahead of time with libtpu, executes the scalar half of the
scheduled program with real lengths and page tables, and reports for each kernel

    cycles       bundles issued, one a cycle; memory stalls are not in it
    us           cycles at the chip's clock; `floor_us`: its bytes at the chip's HBM bandwidth
    ceiling      floor_us / max(floor_us, us): 1.00 means that the schedule keeps up with HBM
    model_us     time under a simple model of the copies (bandwidth, 700 ns latency)
    matrix       share of the cycles in which the matrix unit is busy
    temp_bytes   of the whole compiled function: a copy of the pages would show

`--models` takes the shapes of models that people run instead of those that the kernels were made with: all of them, or
those of the models with NAME in their names. `--peer` compiles another library's kernels for the cases instead of ours
(`peers.py`), and adds them up. In windowed layers the floor is of the pages that the window touches.
`--write` keeps the numbers in benchmarks/results/tpu_static.json; `--check` compares with them and fails where
cycles or `model_us` grew by more than 2 % or bytes at all. `--gate` takes only the cells that CI checks, some of each
kind of kernel and pages. Another libtpu schedules otherwise: the file says which one its numbers come from.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
import tempfile
from pathlib import Path

from benchmarks.tpu_static.cases import GATE, StaticCase, kernel_cases, operands
from benchmarks.tpu_static.compile import compile_in_child, scheduled_programs
from benchmarks.tpu_static.models import model_cases
from benchmarks.tpu_static.peers import PEERS
from benchmarks.tpu_static.program import parse
from benchmarks.tpu_static.simulate import CHIPS, Chip, Result, run

RESULTS = Path(__file__).parents[1] / "results" / "tpu_static.json"
MORE_TIME = 1.02


def matrix_share(dump: Path, kernel: str, result: Result) -> float:
    """Share of the issued cycles in which the matrix unit is busy, from the compiler's own count a bundle."""
    (path,) = dump.glob(f"*{kernel}*pre-delay_hlo-static-per-bundle-utilization.txt")
    lines = path.read_text().splitlines()
    column = [name.strip() for name in lines[1].split(",")].index("MXU")
    capacity = int(lines[2].split()[column])
    busy = [int(line.split()[column]) for line in lines[4:] if line.strip()]
    total = sum(n * count for n, count in zip(result.executions, busy, strict=True))
    return total / capacity / result.cycles


def summary(results: list[Result], chip: Chip) -> dict:
    """Of kernels that run one after the other."""
    cycles, read, written = (sum(getattr(x, name) for x in results) for name in ("cycles", "read_bytes", "write_bytes"))
    us = cycles / chip.clock_ghz / 1e3
    floor = (read + written) / chip.hbm_gbs / 1e3
    return {
        "cycles": cycles,
        "us": round(us, 2),
        "floor_us": round(floor, 2),
        "ceiling": round(floor / max(floor, us), 3),
        "model_us": round(sum(x.model_cycles for x in results) / chip.clock_ghz / 1e3, 2),
        "read_bytes": read,
        "write_bytes": written,
        "descriptors": sum(x.descriptors for x in results),
        "empty": round(sum(x.empty_cycles for x in results) / cycles, 2),
    }


def measure_peer(case: StaticCase, chip_name: str, peer: str) -> dict:
    """The kernels of another library, each and all together."""
    chip = CHIPS[chip_name]
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        row = compile_in_child(case.name, chip_name, dump, peer)
        all_words, results = row.pop("words", None) or {}, {}
        for kernel, words in all_words.items():
            operands = {int(index): x for index, x in words.items()}
            for path in scheduled_programs(dump, kernel):
                name = path.name.split("-", 1)[1].rpartition("-packed")[0][:-3]
                results[name] = run(parse(path.read_text()), chip, operands)
    if not results:
        return {"error": f"no program is named like {list(all_words)}"} | row
    row |= {name: summary([result], chip) for name, result in results.items()}
    row[f"all {len(results)} kernels"] = summary(list(results.values()), chip)
    return row


def measure(case: StaticCase, chip_name: str) -> dict:
    chip: Chip = CHIPS[chip_name]
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        row = compile_in_child(case.name, chip_name, dump)
        if "error" in row:
            return row
        del row["words"]
        for kernel, words in operands(case, chip.device_kind).items():
            (path,) = scheduled_programs(dump, kernel)
            result = run(parse(path.read_text()), chip, words)
            row[kernel] = summary([result], chip) | {"matrix": round(matrix_share(dump, kernel, result), 3)}
    return row


def show(case: str, chip: str, row: dict) -> None:
    if "error" in row:
        print(f"{case:60s} {chip:4s} ERROR {row['error']}", flush=True)
    for kernel, x in row.items():
        if isinstance(x, dict):
            print(
                f"{case:60s} {chip:4s} {kernel:14s} cycles {x['cycles']:>8} us {x['us']:>7} floor {x['floor_us']:>7} "
                f"ceiling {x['ceiling']:.2f} model {x['model_us']:>7} MB {x['read_bytes'] / 1e6:7.1f} + "
                f"{x['write_bytes'] / 1e6:.1f} matrix {x.get('matrix', math.nan):.2f} "
                f"temp {row['temp_bytes'] / 1e6:.1f} MB",
                flush=True,
            )


def compare(kept: dict, row: dict) -> list[str]:
    """What got worse."""
    worse = [] if "error" not in row else [row["error"]]
    for kernel, old in kept.items():
        if not isinstance(old, dict) or "error" in row:
            continue
        new = row[kernel]
        for name in ("cycles", "model_us"):
            if new[name] > old[name] * MORE_TIME:
                worse.append(f"{kernel}: {new[name]} {name}, were {old[name]}")
        for name in ("read_bytes", "write_bytes"):
            if new[name] > old[name]:
                worse.append(f"{kernel}: {new[name]} {name}, were {old[name]}")
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="?", const="", metavar="NAME", help="the shapes of these models")
    parser.add_argument("--chip", action="append", choices=CHIPS)
    parser.add_argument("--case", default="", help="only cases with this text in their name")
    parser.add_argument("--peer", choices=PEERS, help="the kernels of another library, all that it calls")
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.peer and (options.write or options.check):
        parser.error("only our own numbers are kept: leave out --write and --check with --peer")
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cases = kernel_cases() if options.models is None else model_cases(options.models)
    if options.gate:
        cases = kernel_cases() | model_cases()
    cells = [(chip, name) for chip in options.chip or ["v5e", "v6e", "v7x"] for name in cases]
    libtpu = importlib.metadata.version("libtpu")
    worse = []
    for chip, name in cells:
        key = f"{name} | {chip}"
        if options.case not in name or (options.gate and key not in GATE) or (options.check and key not in kept):
            continue
        row = measure_peer(cases[name], chip, options.peer) if options.peer else measure(cases[name], chip)
        row["libtpu"] = libtpu
        show(name, chip, row)
        if options.write and "error" not in row:
            kept[key] = row
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        if options.check:
            now = "" if kept[key].get("libtpu") == libtpu else f" (libtpu {kept[key].get('libtpu')}, now {libtpu})"
            worse += [f"{key}: {line}{now}" for line in compare(kept[key], row)]
    if worse:
        sys.exit("\n".join(worse))


if __name__ == "__main__":
    main()
