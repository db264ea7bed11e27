"""Prompts that are computed before anything follows them: a prefix of many prompts, whose pages handles keep."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from paged_jax.cache.config import pages_mapped
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.mesh import everywhere
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_tables import Handles, PageTables
from paged_jax.forward import Forward
from paged_jax.sampling.processors import log_probabilities


def prefill(
    forward: Forward,
    params: Any,
    tokens: Int32[Array | np.ndarray, " C"],
    num_tokens: Int32[Array, ""] | int,
    cache: KVCache,
    *,
    chunk: int = 256,
    prefix: Handles | None = None,
) -> tuple[Handles, KVCache]:
    """Compute the tokens with which many prompts begin, and keep their pages: handles for `rollout` and `score`.

    It is a pure function: call it inside your own jit, also in the same program as the rollout. The handles belong to
    the parameters with which they were computed. Give them up with `cache.tables.drop(handles)`, exactly once.

    Args:
        forward: the decoder.
        params: its parameters.
        tokens: token ids from the first column on; what follows `num_tokens` of them is ignored.
        num_tokens: tokens that are computed, 0 to C.
        cache: donate it at the jit boundary. Its rows must be empty; handles that you published keep their pages.
        chunk: the most tokens that a step computes; static.
        prefix: handles to the first of the tokens, which were computed before; ignored if they hold more than
            `num_tokens`. They stay yours.

    Returns:
        The handles, one for each group of layers, and the cache, with all rows empty. The handles hold no tokens, and
        so change nothing for those who get them, if `num_tokens` is out of range or too few pages are free.

    Raises:
        ValueError: at trace time, for arrays of other shapes, and sizes that do not fit in an empty cache.

    Examples:
        >>> @functools.partial(jax.jit, donate_argnums=1)
        ... def sample(params, cache, system, prompts, prompt_lens):
        ...     prefix, cache = prefill(forward, params, system, 2, cache, chunk=8)
        ...     drawn, cache = rollout(Stepper(forward, token_counts=(8,)), params, prompts, prompt_lens, cache,
        ...                            max_new_tokens=2, sampling=SamplingParams(temperature=0.1), prefix=prefix)
        ...     return drawn, dataclasses.replace(cache, tables=cache.tables.drop(prefix))
        >>> prompts = jnp.array([[1, 2, 3], [1, 2, 5]])  # they repeat the prefix
        >>> drawn, cache = sample(params, KVCache.create(config), jnp.array([1, 2]), prompts, jnp.array([3, 3]))
        >>> drawn.tokens[:, 0].tolist(), int(drawn.counters.computed_tokens)  # with the counting decoder of `Forward`
        ([[4, 5], [6, 7]], 4)
    """
    tokens, count = jnp.asarray(tokens, jnp.int32), jnp.asarray(num_tokens)
    if tokens.ndim != 1 or count.ndim or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"tokens {tokens.shape} and num_tokens {count.shape} of {count.dtype}: give one text [C], and one whole "
            "number"
        )
    _check_sizes(cache.tables, len(tokens), chunk, prefix is not None)
    nothing = jnp.zeros((1, 1), jnp.int32)
    end = count.astype(jnp.int32) + 1  # a text's last token is not computed
    text = Text(jnp.pad(tokens, (0, 1)), end, continuations=nothing, lengths=nothing[0])
    cache, handles, _, _ = compute_prompt(Steps(forward, params, text), cache, chunk, False, prefix)
    return handles, cache


class Text(NamedTuple):
    """The prompt and its continuations; number n stands for the prompt alone, n + 1 for nothing."""

    prompt: Int32[Array, " C"]
    prompt_len: Int32[Array, ""]
    continuations: Int32[Array, "n X"]
    lengths: Int32[Array, " n"]

    def at(self, number: Int32[Array, " T"], position: Int32[Array, " T"]) -> Int32[Array, " T"]:
        """The tokens at some positions of the prompt and the continuation of a number."""
        after = jnp.maximum(position - self.prompt_len, 0)
        continued = self.continuations.at[number, after].get(mode="clip")
        return jnp.where(position < self.prompt_len, self.prompt.at[position].get(mode="clip"), continued)


class Measured(NamedTuple):
    """What the T tokens of a step say about the tokens that follow them."""

    number: Int32[Array, " T"]
    position: Int32[Array, " T"]  # of the token that follows
    logprobs: Float32[Array, " T"]


class Steps(NamedTuple):
    """The decoder over a text."""

    forward: Forward
    params: Any
    text: Text

    def advance(
        self, cache: KVCache, number: Int32[Array, " R"], num_tokens: int, longest: int, measures: bool
    ) -> tuple[KVCache, Measured | None, Bool[Array, " R"]]:
        """The first R rows compute up to T = `num_tokens` of the tokens that they lack, the first rows first.

        The last token of a text is not computed: nothing follows it. `longest` is the most tokens that a row lacks.

        Returns:
            The cache, the log-probabilities of the tokens that follow, and which rows got what they asked for.
        """
        num_continuations = len(self.text.lengths)
        lengths = self.text.lengths.at[number].get(mode="fill", fill_value=0)
        lacks = jnp.maximum(self.text.prompt_len - 1 + lengths - cache.tables.lengths[: len(number)], 0)
        lacks = jnp.where(number <= num_continuations, lacks, 0)
        counts = jnp.clip(num_tokens - (jnp.cumsum(lacks, dtype=jnp.int32) - lacks), 0, lacks)
        cache, granted = cache.reserve(jnp.zeros(cache.tables.num_rows, jnp.int32).at[: len(number)].set(counts))
        granted = granted[: len(number)]
        counts = jnp.where(granted, counts, 0)
        token, row = (jnp.arange(n, dtype=jnp.int32) for n in (num_tokens, len(number)))
        longest = max(2, min(longest, num_tokens))  # 1 would promise that there are as many tokens as rows
        metadata = AttentionMetadata.ragged(cache.tables, counts, num_tokens, rows=row, max_query_len=longest)
        if measures:
            metadata = dataclasses.replace(metadata, logits_at=token)
        number = number.at[metadata.sequences].get(mode="fill", fill_value=num_continuations + 1)
        logits, pool = self.forward(self.params, self.text.at(number, metadata.positions), cache.pool, metadata)
        measured = None
        if measures:
            following = metadata.positions + 1
            target = self.text.at(number, following)[:, None]
            logprobs = jnp.take_along_axis(log_probabilities(logits.astype(jnp.float32)), target, axis=1)[:, 0]
            measured = Measured(number, following, logprobs)
        tables, measured, granted = everywhere((cache.tables, measured, granted), pool)
        return KVCache(tables, pool), measured, granted


def compute_prompt(
    steps: Steps, cache: KVCache, chunk: int, measures: bool, prefix: Handles | None
) -> tuple[KVCache, Handles, Float32[Array, " C"], Bool[Array, ""]]:
    """Compute the prompt in the first row, but for its last token, from which every continuation starts.

    Returns:
        The cache with empty rows, handles to the prompt, its log-probabilities, and whether it could be computed.
    """
    text, (longest,) = steps.text, steps.text.prompt.shape
    end = text.prompt_len - 1
    is_first = jnp.arange(cache.tables.num_rows) == 0
    if prefix is not None:
        tables = cache.tables.attach_each(is_first & (end >= prefix[0].num_tokens), prefix)
        cache = dataclasses.replace(cache, tables=tables)
    number = jnp.full(1, len(text.lengths), jnp.int32)

    def goes_on(carry: tuple[KVCache, Array, Array]) -> Array:
        cache, fits, _ = carry
        return fits & (cache.tables.lengths[0] < end)

    def compute(carry: tuple[KVCache, Array, Array]) -> tuple[KVCache, Array, Array]:
        cache, _, logprobs = carry
        cache, measured, granted = steps.advance(cache, number, min(chunk, max(longest - 1, 1)), longest, measures)
        if measured is not None:
            place = jnp.where(measured.number == number, measured.position, longest)
            logprobs = logprobs.at[place].set(measured.logprobs, mode="drop")
        return cache, granted[0], logprobs

    in_range = (end >= 0) & (end < longest)
    cache, fits, logprobs = lax.while_loop(goes_on, compute, (cache, in_range, jnp.zeros(longest, jnp.float32)))
    tables, handles = cache.tables.publish(0, jnp.where(fits, end, 0))
    return KVCache(tables.release(is_first), cache.pool), handles, logprobs, fits


def _check_sizes(tables: PageTables, num_tokens: int, chunk: int, has_prefix: bool) -> None:
    for name, value in (("tokens", num_tokens), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_tokens > tables.max_length:
        raise ValueError(
            f"{num_tokens} tokens, but rows hold {tables.max_length}: give fewer, or raise max_pages_per_sequence to "
            f"{-(-num_tokens // tables.groups[0].page_size)}"
        )
    check_pages(
        tables, num_tokens, chunk, [0] * len(tables.groups), has_prefix, f"{num_tokens} tokens", "give fewer tokens"
    )


def check_pages(
    tables: PageTables, num_tokens: int, chunk: int, own: list[int], has_prefix: bool, asked: str, otherwise: str
) -> None:
    """Refuse what would not fit in an empty cache.

    Args:
        tables: of the cache.
        num_tokens: that are computed in one row, `chunk` in each step; then another row shares them.
        chunk: the most tokens of a step.
        own: for each group, the pages that the other row has besides.
        has_prefix: whether the tokens go on from a prefix.
        asked: what needs the pages, for the sentence.
        otherwise: what to do besides more pages or a smaller chunk.
    """
    for table, group, own_pages in zip(tables.groups, tables.layout, own, strict=True):
        held, mapped = (pages_mapped(group.window, num_tokens, n, table.page_size) for n in (1, chunk))
        need = max(mapped, held + own_pages)
        if has_prefix:  # whose last page is copied; pages before a window stay with it
            need += 1 if group.window is None else held
        if need > table.num_pages - 1:
            whose, name = "the pool has", "num_pages"
            if group.window is not None:
                whose, name = f"layers with a window of {group.window} have", "window_pages"
            raise ValueError(
                f"{asked} in steps of {chunk} tokens need {need} pages, but {whose} {table.num_pages - 1}: raise "
                f"{name} to {need + 1}, {otherwise} or lower chunk"
            )
