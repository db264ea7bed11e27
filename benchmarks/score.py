"""Scores of 16 continuations of a 1024-token prompt, against 16 prefills of prompt and continuation.

    python -m benchmarks.score [--json] [--continuation 16] [--quick]

Both give the log-probabilities of the same continuations, from the demo model in float32: `score` of all of them, and
for each a prefill of the whole text in one step, with logits after the prompt only.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.timing import compare
from paged_jax import AttentionMetadata, KVCache, models, score

PROMPT, NUM = 1024, 16
PAGE_SIZE = 16


def contestants(width: int):
    """Functions without arguments that return the log-probabilities [16, width]."""
    model = models.load(models.DEMO, "float32")
    max_pages = -(-(PROMPT + width) // PAGE_SIZE)
    sizes = {"max_sequences": NUM, "max_pages_per_sequence": max_pages, "page_size": PAGE_SIZE}
    config = model.cache_config(num_pages=1 + max_pages + NUM * (-(-width // PAGE_SIZE) + 1), **sizes)
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(1, model.config.vocab_size, PROMPT), jnp.int32)
    continuations = jnp.asarray(rng.integers(1, model.config.vocab_size, (NUM, width)), jnp.int32)
    lengths = jnp.full(NUM, width, jnp.int32)
    cache = KVCache.create(config)

    @functools.partial(jax.jit, donate_argnums=1)
    def score_all(params, cache, continuations, lengths):
        result, cache = score(model.forward, params, prompt, PROMPT, continuations, lengths, cache)
        return result.logprobs, cache

    @functools.partial(jax.jit, donate_argnums=1)
    def prefill(params, cache, continuation):
        text = jnp.concatenate([prompt, continuation])
        row = jnp.arange(NUM) == 0
        num_tokens = len(text) - 1
        cache, _ = cache.reserve(jnp.where(row, num_tokens, 0))
        metadata = AttentionMetadata.ragged(cache.tables, jnp.array([num_tokens], jnp.int32), num_tokens,
                                            rows=jnp.zeros(1, jnp.int32))  # fmt: skip
        metadata = dataclasses.replace(metadata, logits_at=jnp.arange(PROMPT - 1, num_tokens, dtype=jnp.int32))
        logits, pool = model.forward(params, text[:-1], cache.pool, metadata)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), continuation[:, None], axis=1)[:, 0]
        return logprobs, KVCache(cache.tables.release(row), pool)

    def run_all():
        nonlocal cache
        logprobs, cache = score_all(model.params, cache, continuations, lengths)
        return logprobs

    def run_prefills():
        nonlocal cache
        each = []
        for continuation in continuations:
            logprobs, cache = prefill(model.params, cache, continuation)
            each.append(logprobs)
        return jnp.stack(each)

    return {"score": run_all, "prefill of each": run_prefills}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--continuation", type=int, default=16, help="tokens of a continuation")
    parser.add_argument("--quick", action="store_true", help="2 rounds only")
    add_json_option(parser)
    options = parser.parse_args()
    functions = contestants(options.continuation)
    results = {name: np.asarray(function()) for name, function in functions.items()}
    timings = compare(functions, 2 if options.quick else 7)
    report = Report("score", f"{NUM} continuations of {options.continuation} tokens, a prompt of {PROMPT} tokens")
    for name, timing in timings.items():
        difference = float(np.abs(results[name] - results["prefill of each"]).max())
        report.add(
            program=name, ms=timing.wall, fastest_ms=timing.fastest, cpu_ms=timing.cpu, differs_by=f"{difference:.1e}",
            score_is=f"{timing.cpu / timings['score'].cpu:.1f}x faster",
        )  # fmt: skip
    report.finish(options)


if __name__ == "__main__":
    main()
