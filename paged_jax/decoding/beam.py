"""Beam search: the likeliest continuations of many prompts, in one XLA program.

The beams of a prompt are W rows of the batch, a group. Only the first of them computes the prompt. When all rows of a
group have caught up, its best continuations are chosen among them: rows are permuted, so that each row shares the pages
of the beam that it continues, and copies on write the one page in which they part. So a page is held once for all beams
that begin with its tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.cache.kv_cache import KVCache
from paged_jax.decoding.groups import Queue, Search, admit, collect, make_room, where
from paged_jax.decoding.hypotheses import (
    NOTHING,
    Candidates,
    Choice,
    Hypotheses,
    Rules,
    find_candidates,
    finish,
    go_on,
    num_candidates,
    rank,
)
from paged_jax.decoding.room import reserve
from paged_jax.decoding.rows import Counters, DecodeState, Rows
from paged_jax.decoding.step import Stepper, compute, release
from paged_jax.sampling import SamplingState, processors


class Beams(NamedTuple):
    """What `beam_search` finds for Q prompts: n sequences of at most X tokens each, the best first."""

    tokens: Int32[Array, "Q n X"]  # 0 past each sequence's end
    logprobs: Float[Array, "Q n X"]  # of these tokens; 0 past the end
    lengths: Int32[Array, "Q n"]  # tokens, a stop token included; 0 where there are fewer sequences
    scores: Float[Array, "Q n"]  # sum of the logprobs / lengths ** length_penalty; -inf where there are fewer
    finish: Int32[Array, "Q n"]  # of Finish; UNFINISHED where there are fewer, TOO_LONG for all where pages ran out
    peak_pages: Int32[Array, " G"]  # the most pages of each group of layers that the beams held at once
    counters: Counters


def beam_search(
    stepper: Stepper,
    params: Any,
    prompts: Int32[Array, "Q C"],
    prompt_lens: Int32[Array, " Q"],
    cache: KVCache,
    *,
    width: int,
    max_new_tokens: int,
    num_return: int | None = None,
    length_penalty: float | Float[Array, ""] = 1.0,
    early_stopping: bool | str = False,
    stop_tokens: Sequence[int] | Int32[Array, " x"] = (),
    widths: Int32[Array, " Q"] | None = None,
    limits: Int32[Array, " Q"] | None = None,
    processor_state: Any = None,
) -> tuple[Beams, KVCache]:
    """Find likely continuations of many prompts by beam search, in one XLA program.

    A pure function: call it inside your own jit. It finds what `transformers` finds, in the same order. A prompt is
    computed once; its beams share all pages of the tokens that they have in common. As many prompts run at once as
    there are groups of `width` rows, the others wait for a group. When pages run short, the youngest groups start again
    later, to the same end.

        @functools.partial(jax.jit, donate_argnums=1)
        def search(params, cache, prompts, prompt_lens):
            return beam_search(
                Stepper(forward), params, prompts, prompt_lens, cache, width=4, max_new_tokens=32, stop_tokens=(2,)
            )

    Args:
        stepper: the decoder, and what is static about a step. Its processor is given log-probabilities, which are not
            normalised again after it.
        params: the decoder's parameters.
        prompts: token ids, each prompt from the first column on; what follows a prompt is ignored.
        prompt_lens: tokens of each prompt, at least 1.
        cache: donate it at the jit boundary. Its rows must be empty; handles that you published keep their pages.
        width: W, the most beams of a prompt; static.
        max_new_tokens: X, the most tokens of a sequence, its stop token included; static.
        num_return: n, the sequences that are returned for each prompt; None: W.
        length_penalty: the score of a sequence is its log-probability / length ** length_penalty.
        early_stopping: True, False or "never"; see `Rules`.
        stop_tokens: that end a sequence; in an array, which may be traced, -1 where unused.
        widths: beams of each prompt, 1 to W; None: W for all.
        limits: the most tokens of each prompt's sequences, 1 to X; None: X for all.
        processor_state: of Q prompts, for the stepper's processor.

    Returns:
        The sequences, and the cache, with all rows empty.

    Raises:
        ValueError: at trace time, for sizes that do not fit together. A prompt that does not fit in a row, or whose
            beams alone need more pages than there are, ends with `Finish.TOO_LONG` for all of its sequences, which are
            those that it had finished.
    """
    num_prompts, longest = prompts.shape
    num_return = width if num_return is None else num_return
    num_rows = cache.tables.num_rows
    wrong = {x.shape for x in jax.tree.leaves(processor_state) if x.shape[:1] != (num_prompts,)}
    if wrong:
        raise ValueError(
            f"processor_state has an array of shape {wrong.pop()}: its first axis must be the {num_prompts} prompts"
        )
    _check_sizes(stepper, num_rows, width, max_new_tokens, num_return, num_prompts)
    rules = Rules(length_penalty, early_stopping)
    queue = Queue(
        prompts=prompts,
        prompt_lens=prompt_lens,
        limits=_within(limits, num_prompts, max_new_tokens, "limits"),
        widths=_within(widths, num_prompts, width, "widths"),
        processor=processor_state,
    )
    state = _idle_state(stepper, cache, longest + max_new_tokens, stop_tokens, processor_state)
    search = Search.create(min(num_rows // width, num_prompts), width, max_new_tokens, cache.tables.num_free)
    out = Hypotheses.create(num_prompts, width, max_new_tokens), jnp.zeros((num_prompts, width), jnp.int32)
    carry = state, search, out

    def unfinished(carry: tuple[DecodeState, Search, Any]) -> Array:
        _, search, _ = carry
        return (search.next < num_prompts) | jnp.any(search.is_taken)

    def body(carry: tuple[DecodeState, Search, Any]) -> tuple[DecodeState, Search, Any]:
        state, search, out = carry
        state, search = admit(state, search, queue)
        state, search = _step(stepper, params, state, search, rules)
        search, out = collect(state, search, out)
        return state.settle(), search, out

    state, search, (found, why) = lax.while_loop(unfinished, body, carry)
    beams = Beams(
        tokens=found.tokens[:, :num_return],
        logprobs=found.logprobs[:, :num_return],
        lengths=found.lengths[:, :num_return],
        scores=found.scores[:, :num_return],
        finish=why[:, :num_return],
        peak_pages=cache.tables.num_free - search.least_free,
        counters=state.counters,
    )
    return beams, state.cache


def _check_sizes(
    stepper: Stepper, num_rows: int, width: int, max_new_tokens: int, num_return: int, num_prompts: int
) -> None:
    sizes = {"width": width, "max_new_tokens": max_new_tokens, "num_return": num_return, "prompts": num_prompts}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width > num_rows:
        raise ValueError(
            f"width={width} beams need a row each, but the cache has {num_rows}: raise max_sequences to {width}"
        )
    if num_return > width:
        raise ValueError(f"num_return={num_return} sequences of width={width} beams: ask for at most {width}")
    if stepper.drafter is not None:
        raise ValueError("drafts are for rows that draw for themselves: leave the stepper's drafter out for beams")
    stepper.check_rows(num_rows)
    if stepper.num_logprobs or stepper.processed_logprobs:
        raise ValueError(
            "num_logprobs and processed_logprobs of the stepper are for tokens that are drawn: leave them out, a "
            "sequence comes with the log-probabilities of its own tokens"
        )


def _within(values: Any, num_prompts: int, most: int, name: str) -> Int32[Array, " Q"]:
    if values is not None and (jnp.shape(values) != (num_prompts,) or not jnp.issubdtype(values.dtype, jnp.integer)):
        raise ValueError(f"{name} of {values.dtype}{list(jnp.shape(values))}: give a whole number for each prompt")
    return jnp.full(num_prompts, most, jnp.int32) if values is None else jnp.clip(values, 1, most).astype(jnp.int32)


def _idle_state(
    stepper: Stepper, cache: KVCache, capacity: int, stop_tokens: Sequence[int] | Array, processor_state: Any
) -> DecodeState:
    """A batch of empty rows."""
    num_rows = cache.tables.num_rows
    stops = jnp.asarray(stop_tokens, jnp.int32).reshape(1, -1)
    sampling = dataclasses.replace(
        SamplingState.create(num_rows, max_stop_tokens=0),
        stop_tokens=jnp.broadcast_to(stops, (num_rows, stops.shape[1])),
        processor=jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (num_rows, *x.shape[1:])), processor_state),
    )
    return DecodeState(cache, Rows.create(num_rows, capacity, sampling), Counters.create(len(stepper.token_counts)))


# ---- a step --------------------------------------------------------------------------------------------------------


def _step(
    stepper: Stepper, params: Any, state: DecodeState, search: Search, rules: Rules
) -> tuple[DecodeState, Search]:
    """Rows compute tokens; groups all of whose rows have caught up choose their next beams.

    No row of a group that has ended is active.
    """
    width, num_stop = search.scores.shape[1], state.rows.sampling.stop_tokens.shape[1]
    state, counts = reserve(state, stepper.plan(state, stepper.token_counts[-1]))
    search = dataclasses.replace(search, least_free=jnp.minimum(search.least_free, state.cache.tables.num_free))
    state, counts, is_ready = _wait_for_each_other(state, search, counts)
    state, found = compute(stepper, params, state, counts, find_candidates(num_candidates(width, num_stop)))
    state, search = lax.cond(
        jnp.any(is_ready),
        lambda state, search: _choose(stepper, state, search, found, is_ready, rules),
        lambda state, search: (state, search),
        state,
        search,
    )
    is_stuck = (jnp.sum(counts, dtype=jnp.int32) == 0) & ~jnp.any(search.has_ended(state))
    return lax.cond(is_stuck, make_room, lambda state, search: (state, search), state, search)


def _wait_for_each_other(
    state: DecodeState, search: Search, counts: Int32[Array, " B"]
) -> tuple[DecodeState, Int32[Array, " B"], Bool[Array, " U"]]:
    """Rows leave their last known token for later where another row of their group does not catch up in this step.

    Returns:
        The state, how many tokens each row computes, and the groups that choose their next beams after that.
    """
    rows, tables = state.rows, state.cache.tables
    is_active = jnp.any(search.of_groups(rows.active), axis=1)
    falls_behind = jnp.any(search.of_groups(rows.active & (tables.lengths < rows.num_known)), axis=1)
    waits = search.of_rows(falls_behind, len(counts)) & (counts > 0) & (tables.lengths == rows.num_known)
    waiting = waits.astype(jnp.int32)
    tables = lax.cond(jnp.any(waits), lambda t: t.truncate(t.lengths - waiting), lambda t: t, tables)
    state = state.with_tables(tables)
    return state, counts - waiting, is_active & ~falls_behind


def _choose(
    stepper: Stepper, state: DecodeState, search: Search, found: Candidates, is_ready: Bool[Array, " U"], rules: Rules
) -> tuple[DecodeState, Search]:
    """The next beams of the groups that are ready, and what they have finished; rows of those that end are inactive."""
    rows, width = state.rows, search.scores.shape[1]
    num_prompt, limit, num_known = (search.of_groups(x)[:, 0] for x in (rows.num_prompt, rows.limit, rows.num_known))
    num_drawn = num_known + 1 - num_prompt
    stop_tokens = search.of_groups(rows.sampling.stop_tokens)[:, 0]
    candidates = jax.tree.map(lambda x: x[: is_ready.size * width], found)
    choice = rank(candidates, search.scores, stop_tokens, num_known + 1 >= limit)

    def add(finished: Hypotheses) -> Hypotheses:
        at = jnp.arange(finished.tokens.shape[2], dtype=jnp.int32)[None, None, :] + num_prompt[:, None, None]
        at = jnp.minimum(at, rows.tokens.shape[1] - 1)
        tokens, logprobs = (jnp.take_along_axis(search.of_groups(x), at, axis=2) for x in (rows.tokens, rows.logprobs))
        return finished.merge(finish(choice, tokens, logprobs, num_drawn, search.widths, rules), search.widths)

    may_finish = is_ready[:, None] & choice.ends
    added = lax.cond(jnp.any(may_finish), add, lambda finished: finished, search.finished)
    finished = jax.tree.map(lambda new, old: where(is_ready, new, old), added, search.finished)
    chosen = go_on(choice, width, search.widths)
    over = rules.are_over(finished, search.widths, chosen.totals[:, 0], num_drawn, limit - num_prompt)
    goes_on = is_ready & ~over
    search = dataclasses.replace(search, scores=where(goes_on, chosen.totals, search.scores), finished=finished)
    return _continue(stepper, state, search, chosen, goes_on, is_ready & over), search


def _continue(
    stepper: Stepper,
    state: DecodeState,
    search: Search,
    chosen: Choice,
    goes_on: Bool[Array, " U"],
    over: Bool[Array, " U"],
) -> DecodeState:
    """Rows become those of the chosen beams, and learn their tokens; rows without a beam hold nothing."""
    rows, width, num_rows = state.rows, search.scores.shape[1], len(state.rows.active)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    is_chosen = goes_on[:, None] & (chosen.totals > NOTHING)
    first = jnp.arange(len(goes_on), dtype=jnp.int32)[:, None] * width

    def of_rows(x: Array, otherwise: Array) -> Array:
        flat = jnp.where(is_chosen, x, search.of_groups(otherwise)).reshape(-1)
        return otherwise.at[: len(flat)].set(flat)

    parents = of_rows(first + chosen.parents, row)
    moved, learns = search.of_rows(goes_on, num_rows), of_rows(is_chosen, jnp.zeros(num_rows, bool))
    ends = search.of_rows(over, num_rows)
    tables = state.cache.tables.permute(parents)
    tokens = of_rows(chosen.tokens, jnp.zeros(num_rows, jnp.int32))
    logprobs = of_rows(chosen.logprobs, jnp.zeros(num_rows, jnp.float32))
    place = row, jnp.where(learns, rows.num_known, rows.tokens.shape[1])
    processor = jax.tree.map(lambda x: x[parents], rows.sampling.processor)
    if stepper.processor is not None:
        processor = processors.advance(stepper.processor, processor, tokens, learns)
    rows = dataclasses.replace(
        rows,
        tokens=rows.tokens[parents].at[place].set(tokens, mode="drop", unique_indices=True),
        logprobs=rows.logprobs[parents].at[place].set(logprobs, mode="drop", unique_indices=True),
        num_known=rows.num_known + moved.astype(jnp.int32),
        active=jnp.where(moved, learns, rows.active & ~ends),
        sampling=dataclasses.replace(rows.sampling, processor=processor),
    )
    state = state.with_tables(tables, rows=rows)
    return release(state, (moved & ~learns & (tables.lengths > 0)) | ends)
