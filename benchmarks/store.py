"""What a prefix costs that comes from a store or from host memory, beside computing it.

    taskset -c 0 python -m benchmarks.store [--json] [restart checks host]

The Qwen 3 of `benchmarks.rollout`: 30 million random weights in float32, pages of 16 tokens.

restart: another process computes a prompt of 2,048 tokens and stores its pages. This one, which has compiled its
programs, gives the first token with the store and without it, in turn.

checks: the same load, and the part of its time that goes into checksums and comparisons.

host: eight prompts of 512 tokens in turn, three times, beside a request that decodes all the time: with a pool that
holds all, and with a quarter of that and host memory for the rest. The longest gap is that between two pieces of the
request that decodes.

Times are seconds of the wall clock, and CPU seconds of all threads; each is a median over rounds in which both take
their turn.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.rollout.loads import VOCAB, make_checkpoint
from paged_jax import Engine, SamplingParams, models
from paged_jax.store import Store
from paged_jax.store.page_file import unpack

PROMPT, MAX_LENGTH, PAGE_SIZE = 2048, 2304, 16
PARAMS = SamplingParams(max_new_tokens=16)
ROUNDS = 7


class First(NamedTuple):
    """The first token of a request, and all tokens in the end."""

    seconds: float
    cpu: float
    tokens: list[int]


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, length).tolist()


def make_engine(model: models.Model, num_tokens: int, rows: int = 1, **options: Any) -> Engine:
    """An engine whose pool holds so many tokens."""
    sizes = {"max_sequences": rows, "max_pages_per_sequence": MAX_LENGTH // PAGE_SIZE, "page_size": PAGE_SIZE}
    config = model.cache_config(num_pages=1 + num_tokens // PAGE_SIZE, **sizes)
    return Engine(model.forward, model.params, config, num_logprobs=None, **options)


def first_token(engine: Engine, prompt: list[int]) -> First:
    """Of a prompt, after a short one for which the engine makes its pool."""
    engine.generate([[1, 2, 3]], dataclasses.replace(PARAMS, max_new_tokens=1))
    start, cpu = time.perf_counter(), time.process_time()
    request = engine.add_request(prompt, PARAMS)
    stream = engine.stream(request)
    pieces = [next(stream)]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    pieces += stream
    return First(seconds, cpu, [token for piece in pieces for token in piece.tokens])


def write(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """The process that computes the prompt: stores its pages and prints its tokens."""
    engine = make_engine(models.load(checkpoint), MAX_LENGTH, store=Store(folder))
    print(json.dumps(first_token(engine, prompt_of(0, PROMPT)).tokens))
    engine.flush()


def restart(model: models.Model, checkpoint: pathlib.Path, report: Report) -> pathlib.Path:
    """Cold and from the store, in turn; returns the folder of the store."""
    folder, prompt = checkpoint / "store", prompt_of(0, PROMPT)
    command = [sys.executable, "-m", "benchmarks.store", "--write", str(checkpoint), str(folder)]
    tokens = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ways: dict[str, Callable[[], dict]] = {"computed": dict, "from the store": lambda: {"store": Store(folder)}}
    firsts: dict[str, list[First]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, options in ways.items():
            first = first_token(make_engine(model, MAX_LENGTH, **options()), prompt)
            assert first.tokens == tokens, "tokens differ from those of the process that wrote the pages"
            if turn:  # the first compiles
                firsts[way].append(first)
    for way, all_of_it in firsts.items():
        pairs = zip(firsts["computed"], all_of_it, strict=True)
        report.add(
            what=f"first token of {PROMPT}, {way}",
            seconds=statistics.median(first.seconds for first in all_of_it),
            cpu_seconds=statistics.median(first.cpu for first in all_of_it),
            ratio=statistics.median(cold.cpu / first.cpu for cold, first in pairs),
        )
    return folder


def checks(model: models.Model, folder: pathlib.Path, report: Report) -> None:
    """Of the CPU time of a load, how much goes into checks."""
    paths = list((folder / "pages").iterdir())
    shares, loads = [], []
    for turn in range(ROUNDS + 1):
        engine = make_engine(model, MAX_LENGTH, store=Store(folder))
        load = first_token(engine, prompt_of(0, PROMPT)).cpu
        data = [path.read_bytes() for path in paths]
        start = time.process_time()
        for one in data:
            unpack(one)
        checking = time.process_time() - start
        if turn:
            shares.append(checking / load)
            loads.append(checking)
    report.add(
        what=f"checks of {len(paths)} pages, ratio to the load", seconds=0.0,
        cpu_seconds=statistics.median(loads), ratio=statistics.median(shares),
    )  # fmt: skip


def host(model: models.Model, report: Report) -> None:
    """A pool that holds all, and a quarter of it beside host memory."""
    prompts = [prompt_of(seed, 512) for seed in range(1, 9)]
    running = 1024  # tokens of the request that decodes
    working_set = 8 * (512 + PAGE_SIZE)
    ways: dict[str, tuple[int, dict]] = {
        "all in the pool": (working_set, {}),
        "a quarter in the pool": (working_set // 4, {"host_cache_bytes": 1 << 30}),
    }
    gaps: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    rates: dict[str, float] = {}
    for turn in range(5):
        for way, (size, options) in ways.items():
            engine = make_engine(model, size + running, rows=2, visit_steps=2, **options)
            gap, rates[way] = longest_gap(engine, prompts)
            if turn:
                gaps[way].append(gap)
    for way in ways:
        seconds, cpu = zip(*gaps[way], strict=True)
        pairs = zip(cpu, (cpu for _, cpu in gaps["all in the pool"]), strict=True)
        report.add(
            what=f"longest gap, {way}, hit rate {rates[way]:.3f}", seconds=statistics.median(seconds),
            cpu_seconds=statistics.median(cpu), ratio=statistics.median(a / b for a, b in pairs),
        )  # fmt: skip


def longest_gap(engine: Engine, prompts: list[list[int]]) -> tuple[tuple[float, float], float]:
    """Of the request that decodes, while the prompts come for the second and third time; and their hit rate."""
    short = dataclasses.replace(PARAMS, max_new_tokens=2)
    engine.generate([[1, 2, 3]], short)
    for prompt in prompts:
        engine.generate([prompt], short)
    before = engine.stats()
    engine.add_request(prompt_of(0, 8), dataclasses.replace(PARAMS, max_new_tokens=900), priority=-1)
    times, waiting, number = [], [*prompts, *prompts], None
    while waiting or number is not None:
        if number is None:
            number = engine.add_request(waiting.pop(0), short)
        for piece in engine.step():
            if piece.request == number and piece.finish_reason is not None:
                number = None
            elif piece.request != number:
                times.append((time.perf_counter(), time.process_time()))
    after = engine.stats()
    gaps = np.max(np.diff(times[2:], axis=0), axis=0)
    hits = after.cached_tokens - before.cached_tokens
    return (float(gaps[0]), float(gaps[1])), hits / (after.prompt_tokens - before.prompt_tokens - 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["restart", "checks", "host"])
    parser.add_argument("--write", nargs=2, type=pathlib.Path, help=argparse.SUPPRESS)
    add_json_option(parser)
    options = parser.parse_args()
    if options.write:
        write(*options.write)
        return
    report = Report("store", "prefixes from a store and from host memory; Qwen 3, 30M, float32")
    with tempfile.TemporaryDirectory() as name:
        checkpoint = pathlib.Path(name)
        make_checkpoint(checkpoint)
        model = models.load(checkpoint)
        if {"restart", "checks"} & set(options.what):
            folder = restart(model, checkpoint, report)
        if "checks" in options.what:
            checks(model, folder, report)
        if "host" in options.what:
            host(model, report)
    report.finish(options)


if __name__ == "__main__":
    main()
