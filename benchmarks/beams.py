"""Beams: what they hold, what a step's table work costs, and what a trie's mask costs.

    python -m benchmarks.beams [--json] [--widths 32 128]

The demo model continues a prompt of real Python by 64 tokens. "Dense" is what one does without pages: each beam has a
cache of its own, and all of them are gathered in every step; its decoder, attention and choice of beams are the same.
Table work (permute, reserve, copies) is replayed by itself, with the parents that the search chose. Then a decoder of
33 million random weights and 32,768 tokens searches a trie of 100,000 sequences of 4 tokens. CPU milliseconds, the best
of some rounds in turns; pin it with `taskset -c 0`.
"""

import argparse
import dataclasses
import functools
import inspect
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.report import Report, add_json_option
from benchmarks.rollout.loads import HF_CONFIG
from paged_jax import AttentionMetadata, Automaton, Beams, KVCache, Stepper, beam_search, models
from paged_jax.decoding.hypotheses import NOTHING, Candidates, find_candidates, go_on, num_candidates, rank
from paged_jax.decoding.plan import first_come_first_served
from paged_jax.decoding.room import reserve
from paged_jax.decoding.rows import DecodeState
from paged_jax.decoding.step import Logits
from paged_jax.models import checkpoint

PAGE_SIZE, PROMPT, NEW_TOKENS = 16, 200, 64
COLUMNS = -(-(PROMPT + NEW_TOKENS) // PAGE_SIZE)
TRIE_WIDTH, TRIE_VOCAB, TRIE_SIZE, TRIE_LENGTH, END = 64, 32768, 100_000, 4, 0
ROUNDS = 20


def best_of(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """CPU milliseconds of the best call of each, in turns, after one that compiles."""
    best = {name: float("inf") for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def cache_of(model: models.Model, width: int, num_pages: int) -> KVCache:
    sizes = dict(num_pages=num_pages, max_sequences=width, max_pages_per_sequence=COLUMNS, page_size=PAGE_SIZE)
    return KVCache.create(model.cache_config(**sizes))


# ---- the search, and what it held ------------------------------------------------------------------------------------


class Watch:
    """A plan that shows the host the batch before each step; only for looking, never while anything is timed."""

    def __init__(self):
        self.steps: list[dict[str, np.ndarray]] = []

    def __call__(self, state: DecodeState, budget: int):
        rows, tables = state.rows, state.cache.tables
        seen = dict(tokens=rows.tokens, active=rows.active, known=rows.num_known, cached=tables.lengths)
        jax.debug.callback(lambda seen: self.steps.append(jax.tree.map(np.array, seen)), seen, ordered=True)
        return first_come_first_served(state, budget)

    def page_trees(self) -> list[tuple[int, int]]:
        """For each step in which beams draw: the distinct pages that their tokens need, and the distinct tokens."""
        trees = []
        for seen in self.drawing():
            rows = [seen["tokens"][b, : seen["known"][b]].tobytes() for b in np.flatnonzero(seen["active"])]
            pages, tokens = set(), set()
            for row in rows:
                pages |= {row[: min(start + 4 * PAGE_SIZE, len(row))] for start in range(0, len(row), 4 * PAGE_SIZE)}
                tokens |= {row[: start + 4] for start in range(0, len(row), 4)}
            trees.append((len(pages), len(tokens)))
        return trees

    def drawing(self) -> list[dict[str, np.ndarray]]:
        return [seen for seen in self.steps if np.all((seen["known"] - seen["cached"])[seen["active"]] == 1)]

    def parents(self) -> np.ndarray:
        """[steps, W]: the row that each row continued in each step in which all beams drew."""
        seen, width = self.drawing(), len(self.steps[0]["active"])
        chosen = []
        for before, after in zip(seen, seen[1:], strict=False):
            known = [before["tokens"][b, : before["known"][b]].tobytes() for b in range(width)]
            number = {row: b for b, row in enumerate(known)}
            chosen.append([number[after["tokens"][b, : before["known"][b]].tobytes()] for b in range(width)])
        return np.array(chosen, np.int32)


def make_search(model: models.Model, width: int, plan=first_come_first_served):
    budget = max(width, 64)
    stepper = Stepper(model.forward, token_counts=(budget,) if width == budget else (width, budget), plan=plan)

    def search(params, prompt, limit, cache):
        prompts, lens = prompt[None], jnp.array([PROMPT], jnp.int32)
        return beam_search(
            stepper, params, prompts, lens, cache, width=width, max_new_tokens=NEW_TOKENS, limits=limit[None]
        )

    return jax.jit(search, donate_argnums=3)


def make_replay(model: models.Model, width: int, parents: np.ndarray, num_pages: int):
    """The table work of a search without anything else: one program, as the search is."""
    cache = cache_of(model, width, num_pages)
    state = DecodeState.create(model.cache_config(
        num_pages=2, max_sequences=width, max_pages_per_sequence=COLUMNS, page_size=PAGE_SIZE
    ), 8, (width,))  # fmt: skip
    rows = dataclasses.replace(state.rows, active=jnp.ones(width, bool), age=jnp.arange(width, dtype=jnp.int32))

    @functools.partial(jax.jit, donate_argnums=0)
    def replay(cache, parents):
        cache, _ = cache.reserve(jnp.where(jnp.arange(width) == 0, PROMPT, 0).astype(jnp.int32))
        begun = KVCache(cache.tables.permute(jnp.zeros(width, jnp.int32)), cache.pool)

        def step(i, state):
            state, _ = reserve(state, jnp.ones(width, jnp.int32))
            tables = state.cache.tables.permute(parents[i])
            return state.with_tables(tables)

        state_now = lax.fori_loop(0, len(parents), step, dataclasses.replace(state, cache=begun, rows=rows))
        return KVCache(state_now.cache.tables.release(jnp.ones(width, bool)), state_now.cache.pool)

    def run():
        nonlocal cache
        cache = replay(cache, parents)
        return cache

    return run


def make_dense(model: models.Model, width: int, prompt: jax.Array):
    """Beams with a cache each, all of which are gathered in every step: scores of the best, and the search's time."""
    own = 1 + np.arange(width * COLUMNS, dtype=np.int32).reshape(width, COLUMNS)
    pool = cache_of(model, width, width * COLUMNS + 1).pool
    stepper, none = Stepper(model.forward), jnp.full((1, 0), -1, jnp.int32)
    layers = len(pool.groups[0].layers)

    def metadata(lengths, starts, positions, at, longest):
        return AttentionMetadata((jnp.asarray(own),), lengths, starts, positions, at, longest)

    def choose(logits, scores):
        rows: Any = None  # which only a processor reads, and there is none
        of_rows = Logits(logits, None, jnp.zeros(len(logits), jnp.int32))
        found: Candidates = find_candidates(num_candidates(width, 0))(stepper, of_rows, rows, jnp.ones(width, bool))
        chosen = go_on(rank(found, scores, none, jnp.zeros(1, bool)), width, jnp.array([width], jnp.int32))
        return chosen.tokens[0], chosen.parents[0], chosen.totals

    def gather(pool, parents):
        rows = jnp.asarray(own)[parents].reshape(-1)
        index = jnp.concatenate([jnp.zeros(1, jnp.int32), rows])
        place = (jnp.arange(layers, dtype=jnp.int32)[:, None] * len(index) + index[None]).reshape(-1)
        return pool.replace(0, jax.tree.map(lambda x: x[place], pool.arrays[0]))

    @functools.partial(jax.jit, donate_argnums=1)
    def search(params, pool, prompt, limit):
        row = jnp.arange(width, dtype=jnp.int32)
        starts = jnp.where(jnp.arange(width + 1) == 0, 0, PROMPT).astype(jnp.int32)
        begun = metadata(
            jnp.where(row == 0, PROMPT, 0), starts, jnp.arange(PROMPT, dtype=jnp.int32),
            jnp.full(width, PROMPT - 1, jnp.int32), PROMPT,
        )  # fmt: skip
        logits, pool = model.forward(params, prompt, pool, begun)
        scores = jnp.where(row == 0, 0.0, NOTHING).astype(jnp.float32)[None]
        tokens, parents, scores = choose(logits, scores)

        def step(i, carry):
            pool, tokens, parents, scores = carry
            pool = gather(pool, parents)
            lengths = jnp.full(width, PROMPT, jnp.int32) + i
            now = metadata(lengths, jnp.arange(width + 1, dtype=jnp.int32), lengths - 1, row, 1)
            logits, pool = model.forward(params, tokens, pool, now)
            return pool, *choose(logits, scores)

        pool, _, _, scores = lax.fori_loop(1, limit, step, (pool, tokens, parents, scores))
        return scores[0], pool

    def run(limit: int):
        nonlocal pool
        scores, pool = search(model.params, pool, prompt, jnp.int32(limit))
        return scores

    return run, pool.num_bytes


def search_once(model: models.Model, width: int, prompt: jax.Array) -> tuple[Beams, Watch]:
    watch = Watch()
    cache = cache_of(model, width, width * COLUMNS + 1)
    found, _ = make_search(model, width, watch)(model.params, prompt, jnp.int32(NEW_TOKENS), cache)
    jax.block_until_ready(found)
    jax.effects_barrier()
    return found, watch


def measure(model: models.Model, width: int, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a search holds, and what its steps cost."""
    text = model.tokenizer.encode(inspect.getsource(textwrap))[:PROMPT]
    prompt = jnp.array(text, jnp.int32)
    found, watch = search_once(model, width, prompt)
    trees = watch.page_trees()
    pages, tokens = max(trees)
    peak = int(found.peak_pages[0])
    dense_pages = width * COLUMNS
    held = dict(
        width=width, peak_pages=peak, pages_of_the_tree=pages, ratio=peak / pages, tokens_of_the_tree=tokens,
        dense_pages=dense_pages, of_dense=peak / dense_pages,
    )  # fmt: skip

    # A pool of what is needed, and no more, so that the dense caches are compared with that.
    search, cache = make_search(model, width), cache_of(model, width, peak + 1)
    dense, dense_bytes = make_dense(model, width, prompt)

    def ours(limit: int):
        nonlocal cache
        out, cache = search(model.params, prompt, jnp.int32(limit), cache)
        return out.scores

    totals = np.asarray(ours(NEW_TOKENS)[0]) * NEW_TOKENS
    assert np.allclose(totals, dense(NEW_TOKENS), atol=1e-2), f"other beams: {totals[:4]}, {dense(NEW_TOKENS)[:4]}"
    pool_bytes = cache.pool.num_bytes
    table_work = make_replay(model, width, watch.parents(), peak + 1)
    assert table_work().tables.fault == 0, "the replay needs other pages than the search"
    runs = {
        "long": lambda: ours(NEW_TOKENS), "short": lambda: ours(2),
        "dense long": lambda: dense(NEW_TOKENS), "dense short": lambda: dense(2),
        "table": table_work,
    }  # fmt: skip
    best = best_of(runs, repeats)
    steps, table = NEW_TOKENS - 2, best["table"] / len(watch.parents())
    step, dense_step = ((best[f"{x}long"] - best[f"{x}short"]) / steps for x in ("", "dense "))
    cost = dict(
        width=width, step_ms=step, table_ms=table, table_share=table / step, dense_step_ms=dense_step,
        MiB=pool_bytes / 2**20, dense_MiB=dense_bytes / 2**20,
    )  # fmt: skip
    return held, cost


# ---- a trie ----------------------------------------------------------------------------------------------------------


def measure_trie(repeats: int) -> dict[str, Any]:
    """A search under a trie: that all is legal, and what its mask costs of a step."""
    hf_config = HF_CONFIG | {"vocab_size": TRIE_VOCAB, "num_hidden_layers": 4}
    params = nnx.state(models.Decoder(checkpoint.decoder_config(hf_config), rngs=nnx.Rngs(0)))
    with tempfile.TemporaryDirectory() as folder:
        models.save(Path(folder), hf_config, params)
        model = models.load(folder)
    rng = np.random.default_rng(0)
    sequences = rng.integers(1, TRIE_VOCAB, (TRIE_SIZE, TRIE_LENGTH))
    start = time.process_time()
    trie = Automaton.of_sequences(sequences, END, TRIE_VOCAB)
    build = time.process_time() - start
    prompt = jnp.asarray(rng.integers(1, TRIE_VOCAB, PROMPT), jnp.int32)
    cache = cache_of(model, TRIE_WIDTH, TRIE_WIDTH * COLUMNS)

    @functools.partial(jax.jit, donate_argnums=4)
    def search(params, trie, prompt, limit, cache):
        stepper, lens = Stepper(model.forward, (TRIE_WIDTH,), processor=trie), jnp.array([PROMPT], jnp.int32)
        return beam_search(
            stepper, params, prompt[None], lens, cache, width=TRIE_WIDTH, max_new_tokens=TRIE_LENGTH + 1,
            stop_tokens=(END,), limits=limit[None], processor_state=trie.start(1),
        )  # fmt: skip

    def run(limit: int) -> Beams:
        nonlocal cache
        found, cache = search(model.params, trie, prompt, jnp.int32(limit), cache)
        return found

    found = run(TRIE_LENGTH + 1)
    legal = {(*sequence, END) for sequence in sequences.tolist()}
    drawn = [tuple(row[:n]) for row, n in zip(found.tokens[0].tolist(), found.lengths[0].tolist(), strict=True)]
    assert len(set(drawn)) == TRIE_WIDTH and set(drawn) <= legal, "a token that the trie does not allow"
    logits = jnp.asarray(rng.normal(size=(TRIE_WIDTH, TRIE_VOCAB)), jnp.float32)
    deep = jnp.asarray(rng.integers(1, TRIE_SIZE, (ROUNDS, TRIE_WIDTH)), jnp.int32)  # nodes of the first levels
    tokens, every = jnp.ones(TRIE_WIDTH, jnp.int32), jnp.ones(TRIE_WIDTH, bool)

    @jax.jit
    def mask(trie, states):
        """In a loop, as in a search, where the masked logits are memory that is there already."""

        def step(i, carry):
            return trie.process(states[i], logits, None, None), trie.advance(states[i], tokens, every)

        return lax.fori_loop(0, ROUNDS, step, (logits, states[0]))

    best = best_of(
        {
            "long": lambda: run(TRIE_LENGTH),
            "short": lambda: run(1),
            "mask": lambda: mask(trie, deep),
            "root": lambda: mask(trie, jnp.zeros_like(deep)),
        },
        repeats,
    )
    masks = {name: best[name] / ROUNDS for name in ("mask", "root")}
    step = (best["long"] - best["short"]) / (TRIE_LENGTH - 1)
    return dict(
        width=TRIE_WIDTH, sequences=TRIE_SIZE, build_s=build, nodes=len(trie.bitmap), step_ms=step,
        mask_ms=masks["mask"], mask_share=masks["mask"] / step, all_at_the_root_ms=masks["root"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = models.load(models.DEMO, "float32")
    kept = Report("beams_memory", f"pages at the fullest moment, {PROMPT} tokens continued by {NEW_TOKENS}, page 16")
    cost = Report("beams", "CPU ms a step, the demo model; table: permute, reserve and copies; MiB: the whole pool")
    for width in options.widths:
        held, spent = measure(model, width, options.repeats)
        kept.add(**held)
        cost.add(**spent)
        kept.show()
        cost.show()
    trie = Report("beams_trie", "beams under a trie of sequences of 4 tokens, 33M decoder, 32,768 tokens; CPU ms")
    trie.add(**measure_trie(options.repeats))
    for report in (kept, cost, trie):
        report.finish(options)


if __name__ == "__main__":
    main()
