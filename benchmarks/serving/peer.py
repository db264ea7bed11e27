"""Serves loads with vllm, in the interpreter that runs this module; prints one line of JSON.

    PYTHON -m benchmarks.serving.peer FOLDER REQUEST.json

It imports nothing of this repository that needs a package. REQUEST.json holds loads, pool_gib, and options of vllm.
"""

import functools
import json
import sys

from benchmarks.rollout.peer import forget_prefixes, load_vllm
from benchmarks.serving.client import Arrival, serve


def main() -> None:
    folder, path = sys.argv[1:]
    with open(path) as file:
        request = json.load(file)
    llm, SamplingParams = load_vllm(folder, request["pool_gib"], **request["options"])
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]  the peer's own

    engine = llm.llm_engine

    def add(run: int, place: int, prompt: list[int], limit: int) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=limit, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        engine.add_request(f"{run}-{place}", {"prompt_token_ids": prompt}, params)

    def step() -> list[tuple[int, list[int]]]:
        outputs = engine.step()
        return [(int(x.request_id.split("-")[1]), list(x.outputs[0].token_ids)) for x in outputs]

    traces = []
    for load in request["loads"]:
        arrivals = [Arrival(*fields) for fields in load]
        for run in range(2):  # the first warms up
            trace = serve(arrivals, functools.partial(add, run), step)
            forget_prefixes(llm)
        traces.append(trace._asdict())
    print("RESULT " + json.dumps(traces))


if __name__ == "__main__":
    main()
