"""The servers that `benchmarks.serving` compares."""

import dataclasses
import gc
import json
import pathlib
import subprocess
from typing import Any

from benchmarks.rollout.loads import TOKEN_COUNTS
from benchmarks.serving.client import Arrival, Trace, serve
from paged_jax import Engine, SamplingParams, models
from paged_jax.decoding.stepper import token_counts_for
from paged_jax.engine import Statistics

ROWS, MAX_LENGTH, PAGE_SIZE, POOL_GIB = 64, 2048, 16, 2
VISIT_STEPS, PREFILL_PASSES = 2, 2  # a step takes long here, and a short prompt need not run the largest pass


def make_engine(
    model: models.Model, budget: int, num_pages: int | None = None, rows: int = ROWS, **options: Any
) -> Engine:
    """An empty engine; `num_pages` None: as many as `POOL_GIB` holds; `options` are other arguments of `Engine`."""
    columns = MAX_LENGTH // PAGE_SIZE
    config = model.cache_config(num_pages=2, max_sequences=rows, max_pages_per_sequence=columns, page_size=PAGE_SIZE)
    config = dataclasses.replace(config, num_pages=num_pages or POOL_GIB * 2**30 // config.page_bytes)
    decoding = {count for count in TOKEN_COUNTS if count <= rows}
    sizes = {"token_counts": tuple(sorted(decoding | {*token_counts_for(rows, budget, prefill_passes=PREFILL_PASSES)}))}
    options = sizes | {"prefill_passes": PREFILL_PASSES, "visit_steps": VISIT_STEPS, "num_logprobs": None} | options
    return Engine(model.forward, model.params, config, **options)


def serve_ours(model: models.Model, budget: int, prefix_cache: bool, loads: list[list[Arrival]]) -> list[Trace]:
    return [serve_warm(model, budget, prefix_cache, load)[0] for load in loads]


def serve_warm(model: models.Model, budget: int, prefix_cache: bool, load: list[Arrival]) -> tuple[Trace, Statistics]:
    """A load on an empty engine that need not compile."""
    while True:
        engine = make_engine(model, budget, prefix_cache=prefix_cache)
        engine.generate([[0]], SamplingParams(max_new_tokens=1))  # the pool is created by the first step
        gc.collect()  # the engine before this one holds its pool until then; giving it back takes half a second
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
