"""How often four consecutive pages of a sequence lie side by side in the pool, so that one copy could move them.

    python -m benchmarks.page_runs [--json]

64 rows of pages of 16 tokens: a row draws until its request is done and is released, then takes the next prompt. Of the
aligned fours of the page table that are mapped, `fours` is the share whose ids ascend one by one.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.report import Report, add_json_option
from paged_jax.cache.config import CacheConfig
from paged_jax.cache.page_table import PageTable

ROWS, PAGE_SIZE, MAX_PAGES, RUN = 64, 16, 128, 4
FEWEST_TOKENS, LONGEST_PROMPT, MOST_NEW_TOKENS = 16, 1400, 600
FULL = 0.8  # of the pool, roughly: `pool_used` says what it came to
STEPS = (1, 1000, 3000, 8000)


def serve(mean_prompt: int, mean_new: int, state: tuple[PageTable, jax.Array], key: jax.Array):
    """Release, admit, append; counts the requests that were admitted."""
    table, ends = state
    table = table.release((table.lengths > 0) & (table.lengths >= ends))
    is_empty = table.lengths == 0
    prompt, new = jax.random.exponential(key, (2, ROWS))
    prompt = jnp.clip(prompt * mean_prompt, FEWEST_TOKENS, LONGEST_PROMPT).astype(jnp.int32)
    new = jnp.clip(new * mean_new, FEWEST_TOKENS, MOST_NEW_TOKENS).astype(jnp.int32)
    table, reservation = table.reserve(jnp.where(is_empty, prompt, 1))
    is_admitted = is_empty & reservation.granted
    return (table, jnp.where(is_admitted, prompt + new, ends)), jnp.sum(is_admitted)


def share_of_runs(table: PageTable) -> float:
    fours = np.asarray(table.pages).reshape(-1, RUN)
    is_mapped = np.all(fours > 0, axis=1)
    is_run = np.all(np.diff(fours, axis=1) == 1, axis=1)
    return float(np.sum(is_run & is_mapped) / np.sum(is_mapped))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    options = parser.parse_args()
    report = Report("page_runs", f"fours of adjacent pages, {ROWS} rows, pages of {PAGE_SIZE}")
    for mean_prompt, mean_new in ((512, 256), (1000, 50)):
        num_pages = int(ROWS * (mean_prompt + mean_new / 2) / PAGE_SIZE / FULL)
        table = PageTable.create(CacheConfig(1, 1, 128, num_pages, ROWS, MAX_PAGES, PAGE_SIZE))
        state, key = (table, jnp.zeros(ROWS, jnp.int32)), jax.random.key(0)
        run = jax.jit(partial(lax.scan, partial(serve, mean_prompt, mean_new)))
        requests, before = 0, 0
        for steps in STEPS:
            key, own = jax.random.split(key)
            state, admitted = run(state, jax.random.split(own, steps - before))
            before, requests, table = steps, requests + int(admitted.sum()), state[0]
            used = 1 - int(table.num_free) / num_pages
            report.add(
                prompt=mean_prompt, new_tokens=mean_new, steps=steps, requests=requests,
                pool_used=used, fours=share_of_runs(table),
            )  # fmt: skip
    report.finish(options)


if __name__ == "__main__":
    main()
