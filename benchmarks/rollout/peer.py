"""Serves a load with vllm or with transformers, in the interpreter that runs this file; prints one line of JSON.

    PYTHON benchmarks/rollout/peer.py vllm|transformers FOLDER LOAD.json

It imports nothing of this repository. LOAD.json holds prompts, limits, num_samples.
"""

import json
import os
import sys
import time


def load_vllm(folder: str, pool_gib: int = 1, **options):
    """vllm's `LLM` in this process, and its `SamplingParams`."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(pool_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]  the peer's own interpreter has it

    sizes = {"max_model_len": 2048, "max_num_seqs": 64}
    options = sizes | {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True} | options
    return LLM(folder, **options), SamplingParams


def forget_prefixes(llm) -> None:
    """Empty vllm's prefix cache, so that the next run computes its prompts."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("vllm did not empty its prefix cache: some request has not ended")


def serve_vllm(folder: str, prompts: list, limits: list, num_samples: int):
    llm, SamplingParams = load_vllm(folder)

    def run():
        forget_prefixes(llm)
        params = [
            SamplingParams(
                n=num_samples, temperature=0.0 if num_samples == 1 else 1.0, max_tokens=limit, ignore_eos=True,
                detokenize=False, seed=0 if num_samples == 1 else None,
            )
            for limit in limits
        ]  # fmt: skip
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [[list(sample.token_ids) for sample in result.outputs] for result in results]

    return run


def serve_transformers(folder: str, prompts: list, limits: list, num_samples: int):
    """A static batch of 8 sequences after the other, each padded to its longest and run until its longest has ended."""
    import torch  # pyright: ignore[reportMissingImports]  the peer's own interpreter has it
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]  likewise

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    todo = [(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True) for _ in range(num_samples)]

    def run():
        outputs = []
        for start in range(0, len(todo), 8):
            batch = todo[start : start + 8]
            longest = max(len(prompt) for prompt, _ in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(batch):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0} if num_samples > 1 else {"do_sample": False}
            most = max(limit for _, limit in batch)
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, pad_token_id=0, **sampled
                )
            for row, (_, limit) in enumerate(batch):
                outputs.append([out[row, longest : longest + limit].tolist()])
        return outputs

    return run


def main() -> None:
    name, folder, path = sys.argv[1:]
    with open(path) as file:
        load = json.load(file)
    serve = {"vllm": serve_vllm, "transformers": serve_transformers}[name]
    run = serve(folder, load["prompts"], load["limits"], load["num_samples"])
    outputs, best = run(), (float("inf"), float("inf"))
    for _ in range(load["repeats"]):
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = run()
        best = min(best, (time.process_time() - cpu, time.perf_counter() - wall))
    print("RESULT " + json.dumps({"cpu": best[0], "wall": best[1], "outputs": outputs}))


if __name__ == "__main__":
    main()
