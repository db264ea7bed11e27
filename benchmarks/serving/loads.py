"""Who comes when."""

import numpy as np

from benchmarks.rollout.loads import VOCAB, load_of
from benchmarks.serving.client import Arrival

ARRIVALS_PER_SECOND = 2.0
NUM_RUNNING = 8  # requests that decode when the long prompts come
LONG_PROMPT = 2000  # tokens


def arrivals_of(name: str, seed: int = 0) -> list[Arrival]:
    """The requests of a load, in the order in which they come.

    sharegpt, prefix: the 64 requests of `benchmarks.rollout.loads`, all at once. poisson: 40 of sharegpt, in a Poisson
    process of 2 a second. long: 8 requests, and when they have about 16 tokens each, 4 long prompts at once.
    """
    rng = np.random.default_rng(seed)
    if name == "long":
        running = [Arrival(_prompt(rng, 32), 160) for _ in range(NUM_RUNNING)]
        return running + [Arrival(_prompt(rng, LONG_PROMPT), 16, after=16 * NUM_RUNNING) for _ in range(4)]
    load = load_of("sharegpt" if name == "poisson" else name, seed)
    arrivals = [Arrival(prompt, limit) for prompt, limit in zip(load.prompts, load.limits.tolist(), strict=True)]
    if name != "poisson":
        return arrivals
    gaps = rng.exponential(1 / ARRIVALS_PER_SECOND, 39)
    seconds = [0.0, *np.cumsum(gaps).tolist()]
    return [arrival._replace(seconds=at) for arrival, at in zip(arrivals, seconds, strict=False)]


def one_long_prompt(seed: int = 0) -> list[Arrival]:
    """A long prompt on an idle server, and its first token."""
    return [Arrival(_prompt(np.random.default_rng(seed), LONG_PROMPT), 1)]


def _prompt(rng: np.random.Generator, num_tokens: int) -> list[int]:
    return rng.integers(0, VOCAB, num_tokens).tolist()
