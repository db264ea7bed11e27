"""The GPU kernels: every one against the reference, then timed beside the others.

    python -m benchmarks.gpu [--json] [--minutes 7.5]

On a machine with a Hopper GPU it checks and times; elsewhere it checks in Mosaic GPU's interpreter and times nothing.
Times are microseconds a call, the fastest of 5 rounds of 20 calls in one program. Decode is judged by the bytes of the
keys and values against those that a copy on the device moves, prefill by its operations against those of a large
bfloat16 matrix product. It ends within the minutes it is given: what does not fit is reported as not run.
"""

import argparse
import os
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others allocate as well

import jax
import jax.numpy as jnp

from benchmarks.gpu import checks, peers, timing
from benchmarks.gpu.problems import HEAD_DIM, NUM_HEADS, Problem, make_problem
from benchmarks.report import Report, add_json_option

PEER_BYTES = 8 * 2**30  # of keys and values: beyond, only our kernel runs (the others need a second copy)
# batch, context, page size, dtype of the pages; the telling ones first
DECODE = [(64, 4096, 64, "bfloat16"), (64, 4096, 16, "bfloat16"), (64, 4096, 64, "int8"), (1, 32768, 64, "bfloat16")]
DECODE += [
    problem
    for page_size in (64, 16, 128)
    for dtype in ("bfloat16", "int8")
    for context in (4096, 32768, 1024)
    for batch in (64, 8, 256, 1)
    if (problem := (batch, context, page_size, dtype)) not in DECODE
]


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def is_over(self) -> bool:
        return time.monotonic() > self.end


def run_peer(prepare, problem: Problem, clock: Clock) -> float | str:
    """Microseconds a call, or why there are none."""
    if clock.is_over():
        return "not run: out of time"
    try:
        runner = prepare(problem)
        if runner is None:
            return "-"
        run, calls = runner
        return timing.microseconds(run, calls)
    except Exception as error:  # of whatever kind: another library's failure is a line of the report
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}" if str(error) else type(error).__name__


def time_decode(report: Report, bandwidth: float, clock: Clock) -> None:
    for batch, context, page_size, dtype in DECODE:
        where = dict(what="decode", batch=batch, context=context, page=page_size, dtype=dtype)
        if clock.is_over():
            report.add(**where, by="all", us="not run: out of time", percent=0.0, of="copy bandwidth")
            continue
        problem = make_problem(batch, context, page_size, dtype)
        for name, prepare in peers.DECODE.items():
            if name != "pallas_gpu" and (problem.kv_bytes > PEER_BYTES or dtype == "int8"):
                continue
            us = run_peer(prepare, problem, clock)
            percent = 100 * problem.kv_bytes / (us * 1e-6) / bandwidth if isinstance(us, float) else 0.0
            if us != "-":
                report.add(**where, by=name, us=us, percent=percent, of="copy bandwidth")


def time_prefill(report: Report, rate: float, clock: Clock) -> None:
    for context in (4096, 32768):
        problem = make_problem(1, context, 64, "bfloat16", queries=context)
        operations = 2 * 2 * NUM_HEADS * HEAD_DIM * context * (context + 1) / 2
        for name, prepare in peers.PREFILL.items():
            us = run_peer(prepare, problem, clock)
            percent = 100 * operations / (us * 1e-6) / rate if isinstance(us, float) else 0.0
            if us != "-":
                report.add(what="prefill", batch=1, context=context, page=64, dtype="bfloat16", by=name, us=us,
                           percent=percent, of="matrix rate")  # fmt: skip


def time_shared_prefix(report: Report, bandwidth: float, clock: Clock) -> None:
    prefix, suffix = 4096, 128
    problem = make_problem(64, prefix + suffix, 64, "bfloat16", prefix=prefix)
    for name, options in (("plain", {}), ("shared", dict(shared_prefix=jnp.int32(prefix)))):
        us = run_peer(lambda p, options=options: peers.ours(p, max_query_len=1, **options), problem, clock)
        percent = 100 * problem.kv_bytes / (us * 1e-6) / bandwidth if isinstance(us, float) else 0.0
        report.add(what="shared prefix 4096", batch=64, context=prefix + suffix, page=64, dtype="bfloat16",
                   by=name, us=us, percent=percent, of="copy bandwidth")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5)
    add_json_option(parser)
    options = parser.parse_args()
    clock = Clock(options.minutes)
    on_gpu = jax.default_backend() == "gpu"
    place = "on the GPU" if on_gpu else "in the interpreter: no GPU here, so nothing is timed"
    report = Report("gpu_checks", f"GPU kernels against the reference, {place}")
    for row in checks.run_checks():
        report.add(**row)
    report.finish(options)
    if not on_gpu:
        return
    bandwidth, rate = timing.copy_bandwidth(), timing.matrix_rate()
    title = f"copy {bandwidth / 1e12:.2f} TB/s, bfloat16 product {rate / 1e12:.0f} TFLOP/s"
    report = Report("gpu", f"{jax.devices()[0].device_kind}: {title}")
    time_prefill(report, rate, clock)
    time_shared_prefix(report, bandwidth, clock)
    time_decode(report, bandwidth, clock)
    report.finish(options)


if __name__ == "__main__":
    main()
