"""Log-probabilities of given continuations of a prompt, which is computed once, in one XLA program."""

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
from paged_jax.decoding.rows import prompt_arrays
from paged_jax.forward import Forward
from paged_jax.sampling.processors import log_probabilities


class Score(NamedTuple):
    """What `score` finds: the model's own log-probabilities of n continuations of one prompt of at most C tokens."""

    logprobs: Float32[Array, "n X"]  # of each token after the prompt and those before it; 0 past the end
    prompt_logprobs: Float32[Array, " C"] | None  # of the prompt's tokens; None where they were not asked for


class _Text(NamedTuple):
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


class _Measured(NamedTuple):
    """What the T tokens of a step say about the tokens that follow them."""

    number: Int32[Array, " T"]
    position: Int32[Array, " T"]  # of the token that follows
    logprobs: Float32[Array, " T"]


class _Flight(NamedTuple):
    """The continuations on their way, in the first R rows."""

    cache: KVCache
    number: Int32[Array, " R"]  # the continuation in each row; n + 1 where the row is free
    next: Int32[Array, ""]  # the next continuation that gets a row
    logprobs: Float32[Array, "n X"]


def score(
    forward: Forward,
    params: Any,
    prompt: Int32[Array | np.ndarray, " C"],
    prompt_len: Int32[Array, ""] | int,
    continuations: Int32[Array | np.ndarray, "n X"],
    lengths: Int32[Array | np.ndarray, " n"],
    cache: KVCache,
    *,
    chunk: int = 256,
    prompt_logprobs: bool = False,
    prefix: Handles | None = None,
) -> tuple[Score, KVCache]:
    """Log-probabilities of given continuations of a prompt, and of the prompt itself.

    It is a pure function: call it inside your own jit. The prompt is computed once, and all continuations share its
    pages. As many of them as there are rows and pages for are computed side by side. A step computes at most `chunk`
    tokens, so there are never more logits than [chunk, V].

        @functools.partial(jax.jit, donate_argnums=1)
        def choose(params, cache, prompt, prompt_len, answers, lengths):
            result, cache = score(forward, params, prompt, prompt_len, answers, lengths, cache)
            return jnp.argmax(jnp.sum(result.logprobs, axis=1)), cache

    Args:
        forward: the decoder.
        params: its parameters.
        prompt: token ids from the first column on; what follows the prompt is ignored.
        prompt_len: tokens of the prompt, at least 1.
        continuations: token ids, each continuation from the first column on; what follows it is ignored.
        lengths: tokens of each continuation, 0 to X.
        cache: donate it at the jit boundary. Its rows must be empty; handles that you published keep their pages.
        chunk: the most tokens that a step computes; static.
        prompt_logprobs: whether those of the prompt are computed, too; static.
        prefix: handles to the first tokens of the prompt, which were computed before; the prompt repeats these tokens.

    Returns:
        The log-probabilities, and the cache, with all rows empty. `prompt_logprobs[i]` is that of token i given those
        before it; 0 for the first token, for those whose predecessor the prefix holds, and past the end. All are NaN
        if `prompt_len` is out of range, or if handles hold so many pages that the prompt or a single continuation of
        it finds too few.

    Raises:
        ValueError: at trace time, for sizes that do not fit in an empty cache.

    Examples:
        >>> @functools.partial(jax.jit, donate_argnums=1)
        ... def measure(params, cache, prompt, answers, lengths):
        ...     return score(forward, params, prompt, 2, answers, lengths, cache, chunk=8)
        >>> answers = jnp.array([[3, 4], [3, 7]])
        >>> result, cache = measure(params, KVCache.create(config), jnp.array([1, 2]), answers, jnp.array([2, 2]))
        >>> jnp.round(jnp.sum(result.logprobs, axis=1)).tolist()  # the counting decoder of `Forward`'s example
        [-0.0, -9.0]
    """
    continuations, lengths = prompt_arrays(continuations, lengths, ("continuations", "lengths"))
    num_continuations, width = continuations.shape
    lengths = jnp.clip(lengths, 0, width)
    text = _Text(jnp.asarray(prompt, jnp.int32), jnp.asarray(prompt_len, jnp.int32), continuations, lengths)
    _check_sizes(cache.tables, text, chunk, prefix is not None)

    steps = _Steps(forward, params, text)
    cache, handles, of_prompt, is_computed = _compute_prompt(steps, cache, chunk, prompt_logprobs, prefix)
    num_tokens = min(chunk, num_continuations * width)
    num_rows = min(cache.tables.num_rows, num_continuations, num_tokens)
    own = jnp.array(_own_pages(cache.tables, width, num_tokens), jnp.int32)
    with_pages = jnp.where(is_computed, jnp.min(cache.tables.num_free // own), 0)
    fits = with_pages > 0
    flight = _Flight(
        cache=cache,
        number=jnp.full(num_rows, num_continuations + 1, jnp.int32),
        next=jnp.where(fits, 0, num_continuations).astype(jnp.int32),
        logprobs=jnp.zeros(continuations.shape, jnp.float32),
    )
    flight = lax.while_loop(
        lambda flight: (flight.next < num_continuations) | jnp.any(flight.number < num_continuations),
        lambda flight: _continue(steps, _admit(flight, handles, with_pages), num_tokens),
        flight,
    )
    cache = dataclasses.replace(flight.cache, tables=flight.cache.tables.drop(handles))
    logprobs, of_prompt = (jnp.where(fits, x, jnp.nan) for x in (flight.logprobs, of_prompt))
    return Score(logprobs, of_prompt if prompt_logprobs else None), cache


class _Steps(NamedTuple):
    """The decoder over a text."""

    forward: Forward
    params: Any
    text: _Text

    def advance(
        self, cache: KVCache, number: Int32[Array, " R"], num_tokens: int, longest: int, measures: bool
    ) -> tuple[KVCache, _Measured | None, Bool[Array, " R"]]:
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
            measured = _Measured(number, following, logprobs)
        tables, measured, granted = everywhere((cache.tables, measured, granted), pool)
        return KVCache(tables, pool), measured, granted


def _compute_prompt(
    steps: _Steps, cache: KVCache, chunk: int, measures: bool, prefix: Handles | None
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


def _admit(flight: _Flight, handles: Handles, most: Int32[Array, ""]) -> _Flight:
    """Free rows take the next continuations, in as many rows as there are pages for."""
    num_continuations = len(flight.logprobs)
    is_free = (flight.number > num_continuations) & (jnp.arange(len(flight.number), dtype=jnp.int32) < most)
    candidate = flight.next + jnp.cumsum(is_free, dtype=jnp.int32) - 1
    takes = is_free & (candidate < num_continuations)
    tables = flight.cache.tables
    return flight._replace(
        cache=dataclasses.replace(flight.cache, tables=tables.attach_each(_all_rows(tables, takes), handles)),
        number=jnp.where(takes, candidate, flight.number),
        next=flight.next + jnp.sum(takes, dtype=jnp.int32),
    )


def _continue(steps: _Steps, flight: _Flight, num_tokens: int) -> _Flight:
    """One step of all rows; those that reach their end are free."""
    text, (num_continuations, width) = steps.text, flight.logprobs.shape
    cache, measured, _ = steps.advance(flight.cache, flight.number, num_tokens, longest=width, measures=True)
    assert measured is not None
    after = measured.position - text.prompt_len
    place = measured.number, jnp.where(after >= 0, after, width)
    length = text.prompt_len - 1 + text.lengths.at[flight.number].get(mode="fill", fill_value=0)
    ended = (flight.number < num_continuations) & (cache.tables.lengths[: len(length)] >= length)
    return flight._replace(
        cache=dataclasses.replace(cache, tables=cache.tables.release(_all_rows(cache.tables, ended))),
        number=jnp.where(ended, num_continuations + 1, flight.number),
        logprobs=flight.logprobs.at[place].set(measured.logprobs, mode="drop"),
    )


def _all_rows(tables: PageTables, first: Bool[Array, " R"]) -> Bool[Array, " B"]:
    """A mask over the first rows as one over all."""
    return jnp.zeros(tables.num_rows, bool).at[: len(first)].set(first)


def _own_pages(tables: PageTables, width: int, num_tokens: int) -> list[int]:
    """For each group the most pages of its own that a continuation of `width` tokens has at once."""
    own = []
    for table, group in zip(tables.groups, tables.layout, strict=True):
        touched = (width + table.page_size - 2) // table.page_size + 1
        own.append(min(touched, pages_mapped(group.window, tables.max_length, num_tokens, table.page_size)))
    return own


def _check_sizes(tables: PageTables, text: _Text, chunk: int, has_prefix: bool) -> None:
    (longest,), (num_continuations, width) = text.prompt.shape, text.continuations.shape
    sizes = {"chunk": chunk, "tokens of the prompt": longest, "continuations": num_continuations}
    for name, value in (sizes | {"tokens of a continuation": width}).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    asked = f"a prompt of {longest} tokens and a continuation of {width}"
    if longest + width - 1 > tables.max_length:  # the last token is never cached
        page_size = tables.groups[0].page_size
        raise ValueError(
            f"{asked} need a row of {longest + width - 1} tokens, but rows hold {tables.max_length}: shorten the "
            f"arrays or raise max_pages_per_sequence to {-(-(longest + width - 1) // page_size)}"
        )
    num_tokens = min(chunk, num_continuations * width)
    for table, group, own in zip(tables.groups, tables.layout, _own_pages(tables, width, num_tokens), strict=True):
        held, mapped = (pages_mapped(group.window, longest - 1, n, table.page_size) for n in (1, chunk))
        need = max(mapped, held + own)
        if has_prefix:  # whose last page is copied; pages before a window stay with it
            need += 1 if group.window is None else held
        if need > table.num_pages - 1:
            whose, name = "the pool has", "num_pages"
            if group.window is not None:
                whose, name = f"layers with a window of {group.window} have", "window_pages"
            raise ValueError(
                f"{asked} in steps of {chunk} tokens need {need} pages, but {whose} {table.num_pages - 1}: raise "
                f"{name} to {need + 1}, shorten the arrays or lower chunk"
            )
