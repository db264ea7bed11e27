"""What drafts save: steps and CPU time of rollouts that verify several tokens of a row at once.

    python -m benchmarks.drafts [--json]

100 pieces of this project's own source are continued by the demo's model, which has learnt to write Python, greedily
and at temperature 1: with drafts looked up in the text itself; with what was drawn before as hints, as in a second
epoch over the same prompts; and with a draft model, which here is the model itself, so that all its drafts are right.
Then a random model of 30M parameters, whose text never repeats itself: with lookups that find nothing, and with drafts
that are always wrong. Each is compared with the same rollout without drafts, in interleaved runs.
"""

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.rollout.loads import make_checkpoint
from benchmarks.timing import compare
from paged_jax import DraftModel, Drafts, KVCache, Lookup, Rollout, SamplingParams, Stepper, models, rollout
from paged_jax.decoding.rows import NO_TOKEN, Rows
from paged_jax.decoding.stepper import token_counts_for

ROWS, PROMPT, NEW = 8, 24, 64
SOURCE = pathlib.Path(__file__).parent.parent / "paged_jax"


@dataclasses.dataclass(frozen=True)
class Wrong:
    """Drafts tokens that a row will not draw."""

    num_drafts: int = 4

    def propose(self, state: Any, rows: Rows, asks: jax.Array) -> tuple[Drafts, Any]:
        return Drafts(jnp.zeros((len(asks), self.num_drafts), jnp.int32), asks), state


def pieces_of_source(model: models.Model, count: int) -> np.ndarray:
    """The first tokens of lines of source, from as many places."""
    text = "".join(path.read_text() for path in sorted(SOURCE.glob("*/*.py")))
    starts = np.linspace(0, len(text) - 1000, count).astype(int)
    lines = [text[text.index("\n", start) + 1 :][:500] for start in starts]
    return np.array([model.tokenizer.encode(line)[:PROMPT] for line in lines], np.int32)


def runner(model: models.Model, prompts: np.ndarray, temperature: float, drafter: Any, hints: Any = None) -> Callable:
    """A function that runs the rollout."""
    num_drafts = drafter.num_drafts if drafter else 0
    stepper = Stepper(model.forward, token_counts_for(ROWS, 64, num_drafts=num_drafts), drafter=drafter)
    pages = -(-(PROMPT + NEW) // 16)
    config = model.cache_config(num_pages=ROWS * pages + 1, max_sequences=ROWS, max_pages_per_sequence=pages)
    hints = np.full((len(prompts), 0), NO_TOKEN, np.int32) if hints is None else hints

    @jax.jit
    def run(params, prompts, hints):
        state = None
        if isinstance(drafter, DraftModel):
            state = drafter.create(params, KVCache.create(config), PROMPT + NEW)
        sampling = SamplingParams(temperature=temperature, seed=1)
        lengths = jnp.full(len(prompts), PROMPT, jnp.int32)
        options = {"max_new_tokens": NEW, "sampling": sampling, "drafter_state": state}
        options |= {"hints": hints} if drafter else {}
        return rollout(stepper, params, prompts, lengths, KVCache.create(config), **options)[0]

    return lambda: run(model.params, prompts, hints)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    options = parser.parse_args()
    table = Report("drafts", f"rollouts of {NEW} tokens with drafts, {ROWS} rows, float32; ratios to those without")

    def measure(load: str, model: models.Model, prompts: np.ndarray, temperature: float, drafters: dict[str, Any]):
        plain = runner(model, prompts, temperature, None)
        expected = jax.device_get(plain())
        runs: dict[str, Callable[[], Rollout]] = {"none": plain}
        for name, drafter in drafters.items():
            hints = expected.tokens[:, 0] if name == "its last epoch" else None
            runs[name] = runner(model, prompts, temperature, drafter, hints)
        results = {name: jax.device_get(run()) for name, run in runs.items()}
        times = compare(runs, repeats=5)
        for name in drafters:
            drawn, counters = results[name], results[name].counters
            assert np.array_equal(drawn.tokens, expected.tokens), f"{load}: drafts by {name} changed the tokens"
            table.add(
                load=load,
                drafts=name,
                steps=int(np.sum(counters.steps)),
                fewer_steps=float(np.sum(expected.counters.steps) / np.sum(counters.steps)),
                drafted=int(counters.drafted_tokens),
                accepted=float(counters.accepted_tokens / max(counters.drafted_tokens, 1)),
                CPU_time=times[name].cpu / times["none"].cpu,
            )

    demo = models.load(models.DEMO, dtype="float32")
    prompts = pieces_of_source(demo, 100)
    looked_up = {
        "its own text": Lookup(),
        "its last epoch": Lookup(num_drafts=7),
        "a draft model": DraftModel(demo.forward),
    }
    measure("100 pieces of source, greedy", demo, prompts, 0.0, looked_up)
    measure("100 pieces of source, temperature 1", demo, prompts, 1.0, looked_up)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(pathlib.Path(folder))
        random = models.load(folder)
    prompts = np.random.default_rng(0).integers(0, random.config.vocab_size, (16, PROMPT)).astype(np.int32)
    measure("random model of 30M", random, prompts, 0.0, {"its own text": Lookup(), "always wrong": Wrong()})
    table.finish(options)


if __name__ == "__main__":
    main()
