"""Log-probabilities of given continuations of a prompt, which is computed once, in one XLA program."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from paged_jax.cache.config import pages_mapped
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.page_tables import Handles, PageTables
from paged_jax.decoding.prefill import Steps, Text, check_pages, compute_prompt
from paged_jax.decoding.rows import prompt_arrays
from paged_jax.forward import Forward


class Score(NamedTuple):
    """What `score` finds: the model's own log-probabilities of n continuations of one prompt of at most C tokens."""

    logprobs: Float32[Array, "n X"]  # of each token after the prompt and those before it; 0 past the end
    prompt_logprobs: Float32[Array, " C"] | None  # of the prompt's tokens; None where they were not asked for


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
    text = Text(jnp.asarray(prompt, jnp.int32), jnp.asarray(prompt_len, jnp.int32), continuations, lengths)
    _check_sizes(cache.tables, text, chunk, prefix is not None)

    steps = Steps(forward, params, text)
    cache, handles, of_prompt, is_computed = compute_prompt(steps, cache, chunk, prompt_logprobs, prefix)
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


def _continue(steps: Steps, flight: _Flight, num_tokens: int) -> _Flight:
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


def _check_sizes(tables: PageTables, text: Text, chunk: int, has_prefix: bool) -> None:
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
    own = _own_pages(tables, width, num_tokens)
    check_pages(tables, longest - 1, chunk, own, has_prefix, asked, "shorten the arrays")
