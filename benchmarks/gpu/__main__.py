"""The GPU kernels: every one against the reference, then timed beside the others.

    python -m benchmarks.gpu [--json] [--minutes 7.5]

On a machine with a Hopper GPU it checks and times; elsewhere it checks in Mosaic GPU's interpreter and times nothing.
Times are microseconds a call, the fastest of 5 rounds of 20 calls in one program. Decode is judged by the bytes of the
keys and values against those that a copy on the device moves, prefill by its operations against those of a large
bfloat16 matrix product. It ends within the minutes it is given: what does not fit is reported as not run, as is what
another library is not installed for or does not do.
"""

import argparse
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterator

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others allocate as well
# The interpreter blocks a thread of the CPU backend for every warpgroup that waits; more devices give it more threads.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

from benchmarks.gpu import checks, peers, timing
from benchmarks.gpu.problems import HEAD_DIM, NUM_HEADS, Problem, make_problem
from benchmarks.report import Report, add_json_option
from pallas_kernels import Sharing

PEER_SECONDS = 45  # for one way to run one problem, what it compiles included
DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
# batch, context, page size, dtype of the pages; the telling ones first
TELLING = [(64, 4096, 64, "bfloat16"), (64, 4096, 16, "bfloat16"), (64, 4096, 64, "float8_e4m3fn")]
TELLING += [(64, 4096, 64, "int8"), (1, 32768, 64, "bfloat16"), (256, 1024, 64, "bfloat16")]
GRID = itertools.product((64, 8, 256, 1), (4096, 32768, 1024), (64, 16, 128), DTYPES)
DECODE = TELLING + [problem for problem in GRID if problem not in TELLING]


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def seconds(self) -> float:
        return self.end - time.monotonic()


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what runs longer: another library may build for minutes."""

    def stop(*_):
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_peer(prepare, problem: Problem, clock: Clock) -> float | str:
    """Microseconds a call, or why there are none."""
    if clock.seconds() <= 0:
        return "not run: out of time"
    try:
        with at_most(min(PEER_SECONDS, clock.seconds())):
            runner = prepare(problem)
            return runner if isinstance(runner, str) else timing.microseconds(*runner)
    except Exception as error:  # of whatever kind: another library's failure is a line of the report
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}" if str(error) else type(error).__name__


def time_decode(report: Report, bandwidth: float, clock: Clock) -> None:
    for batch, context, page_size, dtype in DECODE:
        where = dict(what="decode", batch=batch, context=context, page=page_size, dtype=dtype)
        if clock.seconds() <= 0:
            report.add(**where, by="all", us="not run: out of time", percent=0.0, of="copy bandwidth")
            continue
        problem = make_problem(batch, context, page_size, dtype)
        for name, prepare in peers.DECODE.items():
            us = run_peer(prepare, problem, clock)
            percent = 100 * problem.kv_bytes / (us * 1e-6) / bandwidth if isinstance(us, float) else 0.0
            report.add(**where, by=name, us=us, percent=percent, of="copy bandwidth")


def time_prefill(report: Report, rate: float, clock: Clock) -> None:
    for context in (4096, 32768):
        problem = make_problem(1, context, 64, "bfloat16", queries=context)
        operations = 2 * 2 * NUM_HEADS * HEAD_DIM * context * (context + 1) / 2
        for name, prepare in peers.PREFILL.items():
            us = run_peer(prepare, problem, clock)
            percent = 100 * operations / (us * 1e-6) / rate if isinstance(us, float) else 0.0
            report.add(what="prefill", batch=1, context=context, page=64, dtype="bfloat16", by=name, us=us,
                       percent=percent, of="matrix rate")  # fmt: skip


def time_shared_prefix(report: Report, bandwidth: float, clock: Clock) -> None:
    prefix, suffix = 4096, 128
    problem = make_problem(64, prefix + suffix, 64, "bfloat16", prefix=prefix)
    sharing = Sharing.of_all(problem.lengths, prefix)
    for name, options in (("plain", {}), ("shared", dict(sharing=sharing))):
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
    for what, us, of in (
        ("device copy of 2 GiB", 2 * 2**31 / bandwidth * 1e6, "copy bandwidth"),
        ("bfloat16 product of 8192", 2 * 8192**3 / rate * 1e6, "matrix rate"),
    ):
        report.add(what=what, batch=1, context=0, page=0, dtype="bfloat16", by="xla", us=us, percent=100.0, of=of)
    time_prefill(report, rate, clock)
    time_shared_prefix(report, bandwidth, clock)
    time_decode(report, bandwidth, clock)
    report.finish(options)


if __name__ == "__main__":
    main()
