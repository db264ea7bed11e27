"""Where the memory goes: waste against contiguous caches, and what samples and beams of one prompt share.

    python -m benchmarks.memory [--json]

Lengths are drawn from lognormal distributions with the means that the PagedAttention paper gives for its two loads
(Kwon et al. 2023, figure 11): ShareGPT 161 prompt and 338 output tokens, Alpaca 19 and 58. The page table is the real
one, every step a `reserve` of one token a row; the beams are those that the demo model chooses, on prompts cut from
the standard library.

What sharing saves differs from the paper for two reasons. Its numbers are of the data sets, ours of distributions with
their means: samples share their prompt's full pages only, so the shape of the prompt lengths decides. And how long
beams share depends on which of them the model keeps.
"""

import argparse
import dataclasses
import functools
import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.progress import track

from benchmarks.report import Report, add_json_option
from paged_jax import AttentionMetadata, CacheConfig, KVCache, PageTables, models

PAGE_SIZES = (8, 16, 32, 64, 128)
MAX_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Load:
    """Prompt and output lengths: lognormal, by mean and standard deviation of the logarithm, at most 2048 in all."""

    name: str
    prompt_mean: float
    output_mean: float
    prompt_sigma: float
    output_sigma: float

    def draw(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)

        def lengths(mean, sigma, most):
            return np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).round(), 1, most).astype(np.int32)

        return (
            lengths(self.prompt_mean, self.prompt_sigma, MAX_LENGTH // 2),
            lengths(self.output_mean, self.output_sigma, MAX_LENGTH // 2),
        )


SHAREGPT = Load("ShareGPT-like", 161.31, 337.99, 1.2, 0.9)
ALPACA = Load("Alpaca-like", 19.31, 58.45, 0.5, 0.9)
PUBLISHED = {  # share of the pages saved by sharing on Alpaca, page 16 (Kwon et al. 2023, figure 15)
    "samples": {2: 0.061, 4: 0.085, 6: 0.098},
    "beams": {2: 0.376, 4: 0.531, 6: 0.552},
}


# ---- waste ---------------------------------------------------------------------------------------------------


def _config(page_size: int, num_rows: int) -> CacheConfig:
    columns = MAX_LENGTH // page_size
    return CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=128, num_pages=num_rows * columns + 1, max_sequences=num_rows,
        max_pages_per_sequence=columns, page_size=page_size,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=3)
def _serve(tables: PageTables, prompts: jax.Array, outputs: jax.Array, num_steps: int):
    """Serve requests in all rows, one token a step; sums over the steps of what each kind of cache holds."""

    def step(_, carry):
        tables, request, next_request, totals = carry
        idle = tables.lengths == 0
        request = jnp.where(idle, next_request + jnp.cumsum(idle) - 1, request) % len(prompts)
        next_request += jnp.sum(idle)
        tables, _ = tables.reserve(jnp.where(idle, prompts[request], 1))
        (table,) = tables.groups
        length = prompts[request] + outputs[request]
        power_of_two = jnp.exp2(jnp.ceil(jnp.log2(length.astype(jnp.float32))))
        held = (
            jnp.sum(table.lengths),
            (table.num_pages - 1 - table.num_free) * table.page_size,
            jnp.sum(length),
            jnp.sum(power_of_two),
            jnp.float32(MAX_LENGTH * len(request)),
        )
        totals = totals + jnp.stack([h.astype(jnp.float32) for h in held]) / num_steps
        return tables.release(tables.lengths >= length), request, next_request, totals

    rows = jnp.zeros(tables.num_rows, jnp.int32)
    return lax.fori_loop(0, num_steps, step, (tables, rows, jnp.int32(0), jnp.zeros(5)))[3]


def waste(load: Load, page_size: int, num_rows: int = 64, num_steps: int = 4000) -> dict[str, float]:
    """Share of the held slots that hold no token, for each kind of cache."""
    prompts, outputs = map(jnp.asarray, load.draw(10_000))
    tokens, *held = np.asarray(_serve(PageTables.create(_config(page_size, num_rows)), prompts, outputs, num_steps))
    names = ("paged", "contiguous, exact", "contiguous, power of two", "contiguous, 2048")
    return {name: float(1 - tokens / slots) for name, slots in zip(names, held, strict=True)}


# ---- sharing -------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(forward, params, cache, tokens, query_lens):
    cache, granted = cache.reserve(query_lens)
    metadata = AttentionMetadata.ragged(cache.tables, query_lens, len(tokens), active=granted)
    _, pool = forward(params, tokens, cache.pool, metadata)
    return KVCache(cache.tables, pool)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _search(forward, params, cache, feed, outputs, width: int):
    """Beam search of every request to its own length; pages mapped and pages in use, summed over the steps."""
    num_requests = len(outputs)
    first_row = jnp.arange(num_requests)[:, None] * width

    def step(carry):
        cache, feed, scores, count, mapped, used = carry
        active = jnp.repeat(count < outputs, width)
        cache, _ = cache.reserve(active.astype(jnp.int32))
        logits, pool = forward(params, feed, cache.pool, AttentionMetadata.decode(cache.tables, active))
        total = scores[..., None] + jax.nn.log_softmax(logits).reshape(num_requests, width, -1)
        scores, best = lax.top_k(total.reshape(num_requests, -1), width)
        parent, token = jnp.divmod(best, logits.shape[1])
        count = count + 1
        now = _mapped_and_used(cache.tables)
        own = jnp.arange(len(feed), dtype=jnp.int32)
        tables = cache.tables.permute(jnp.where(active, (first_row + parent).reshape(-1), own).astype(jnp.int32))
        tables = tables.release(active & jnp.repeat(count >= outputs, width))
        feed = token.reshape(-1).astype(jnp.int32)
        return KVCache(tables, pool), feed, scores, count, mapped + now[0], used + now[1]

    scores = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf) * jnp.ones((num_requests, 1))  # all start alike
    carry = (cache, feed, scores, jnp.zeros(num_requests, jnp.int32), jnp.int32(0), jnp.int32(0))
    carry = lax.while_loop(lambda carry: jnp.any(carry[3] < outputs), step, carry)
    return carry[4], carry[5]


@jax.jit
def _sample(tables: PageTables, outputs: jax.Array):
    """Every row draws to its own length; pages mapped and pages in use, summed over the steps."""

    def step(carry):
        tables, count, mapped, used = carry
        active = count < outputs
        tables, _ = tables.reserve(active.astype(jnp.int32))
        now = _mapped_and_used(tables)
        return tables.release(active & (count + 1 >= outputs)), count + 1, mapped + now[0], used + now[1]

    carry = (tables, jnp.int32(0), jnp.int32(0), jnp.int32(0))
    carry = lax.while_loop(lambda carry: jnp.any(carry[1] < outputs), step, carry)
    return carry[2], carry[3]


def _mapped_and_used(tables: PageTables) -> tuple[jax.Array, jax.Array]:
    """Pages counted once for each row that maps them, and once."""
    (table,) = tables.groups
    return jnp.sum(-(-table.lengths // table.page_size)), table.num_pages - 1 - table.num_free


def sharing_of_samples(load: Load, width: int, num_requests: int = 200, page_size: int = 16) -> float:
    """Share of the mapped pages that parallel samples of equal length need no memory for."""
    prompts, outputs = load.draw(num_requests)
    num_rows = num_requests * width
    tables = PageTables.create(_config(page_size, num_rows))
    tables = _fork_all(tables.reserve(_at_first_rows(prompts - 1, width))[0], width)
    mapped, used = _sample(tables, jnp.asarray(np.repeat(outputs, width)))
    return 1 - int(used) / int(mapped)


def sharing_of_beams(load: Load, width: int, num_requests: int = 24, page_size: int = 16) -> float:
    """Share of the mapped pages that beams need no memory for, with the demo model choosing them."""
    model = models.load(models.DEMO)
    prompts, outputs = load.draw(num_requests)
    outputs = np.minimum(outputs, 256)  # the longest decide how long the benchmark takes
    text = model.tokenizer.encode(inspect.getsource(textwrap))
    starts = np.random.default_rng(2).integers(0, len(text) - prompts.max(), num_requests)
    pieces = [text[start : start + n] for start, n in zip(starts, prompts, strict=True)]
    num_rows = num_requests * width
    config = model.cache_config(
        num_pages=num_rows * 24, max_sequences=num_rows, max_pages_per_sequence=64, page_size=page_size
    )
    tokens = np.concatenate([piece[:-1] for piece in pieces]).astype(np.int32)
    cache = KVCache.create(config)
    cache = _prefill(model.forward, model.params, cache, tokens, _at_first_rows(prompts - 1, width))
    feed = jnp.asarray(np.repeat([piece[-1] for piece in pieces], width), jnp.int32)
    cache = KVCache(_fork_all(cache.tables, width), cache.pool)
    mapped, used = _search(model.forward, model.params, cache, feed, jnp.asarray(outputs), width)
    return 1 - int(used) / int(mapped)


def _at_first_rows(values: np.ndarray, width: int) -> jax.Array:
    """[R] -> [R * width], each value at the first row of its request."""
    rows = np.zeros((len(values), width), np.int32)
    rows[:, 0] = values
    return jnp.asarray(rows.reshape(-1))


def _fork_all(tables: PageTables, width: int) -> PageTables:
    rows = np.arange(tables.num_rows, dtype=np.int32)
    first = rows // width * width
    parents, children = (np.where(rows == first, -1, x).astype(np.int32) for x in (first, rows))
    return jax.jit(lambda *arguments: PageTables.fork(*arguments)[0])(tables, parents, children)


# ---- report --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    options = parser.parse_args()

    wasted = Report("memory_waste", "share of the slots held that hold no token, 64 rows always busy")
    for load, page_size in track([(load, size) for load in (SHAREGPT, ALPACA) for size in PAGE_SIZES], "waste"):
        wasted.add(load=load.name, page=page_size, **{k: round(v, 4) for k, v in waste(load, page_size).items()})
    wasted.finish(options)

    saved = Report(
        "memory_sharing", "share of the mapped pages that sharing saves, page 16; published: PagedAttention, figure 15"
    )
    kinds = {"samples": sharing_of_samples, "beams": sharing_of_beams}
    for kind, width in track([(kind, width) for kind in kinds for width in (2, 4, 6)], "sharing"):
        ours = {load.name: round(kinds[kind](load, width), 4) for load in (ALPACA, SHAREGPT)}
        saved.add(kind=kind, n=width, **ours, published_Alpaca=PUBLISHED[kind][width])
    saved.finish(options)


if __name__ == "__main__":
    main()
