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
from paged_jax.decoding.plan import YOUNGEST
from paged_jax.decoding.room import reserve
from paged_jax.decoding.rows import Counters, DecodeState, Finish, Rows
from paged_jax.decoding.step import Stepper, compute, release, start
from paged_jax.sampling import SamplingState, processors

NO_PROMPT = -1


class Beams(NamedTuple):
    """What `beam_search` finds for Q prompts: n sequences of at most X tokens each, the best first."""

    tokens: Int32[Array, "Q n X"]  # 0 past each sequence's end
    logprobs: Float[Array, "Q n X"]  # of these tokens; 0 past the end
    lengths: Int32[Array, "Q n"]  # tokens, a stop token included; 0 where there are fewer sequences
    scores: Float[Array, "Q n"]  # sum of the logprobs / lengths ** length_penalty; -inf where there are fewer
    finish: Int32[Array, "Q n"]  # of Finish; UNFINISHED where there are fewer, because no more were allowed
    peak_pages: Int32[Array, " G"]  # the most pages of each group of layers that the beams held at once
    counters: Counters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Queue:
    """The prompts."""

    prompts: Int32[Array, "Q C"]
    prompt_lens: Int32[Array, " Q"]
    limits: Int32[Array, " Q"]
    widths: Int32[Array, " Q"]
    processor: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Search:
    """U groups on their way; group u has the rows u * W to u * W + W - 1. Rows past the last group stay empty."""

    next: Int32[Array, ""]  # the next prompt that gets a group
    prompt: Int32[Array, " U"]  # of each group; NO_PROMPT where it is free
    widths: Int32[Array, " U"]  # beams of each
    scores: Float[Array, "U W"]  # log-probabilities of the running beams, the best first; -inf where there is none
    finished: Hypotheses
    least_free: Int32[Array, " G"]  # the fewest pages of each group of layers that were free

    @property
    def is_taken(self) -> Bool[Array, " U"]:
        """Groups that have a prompt."""
        return self.prompt != NO_PROMPT

    def of_rows(self, per_group: Array, num_rows: int) -> Array:
        """From groups to their rows; zeros for the rows of none."""
        width = self.scores.shape[1]
        return jnp.pad(jnp.repeat(per_group, width, axis=0), (0, num_rows - len(per_group) * width))

    def of_groups(self, per_row: Array) -> Array:
        """From rows to groups, [U, W, ...]."""
        num_groups, width = self.scores.shape
        return per_row[: num_groups * width].reshape(num_groups, width, *per_row.shape[1:])


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
            beams alone need more pages than there are, ends with `Finish.TOO_LONG` and the sequences that it had
            finished.
    """
    num_prompts, longest = prompts.shape
    num_return = width if num_return is None else num_return
    num_rows = cache.tables.num_rows
    _check_sizes(stepper, num_rows, width, max_new_tokens, num_return, num_prompts)
    rules = Rules(length_penalty, early_stopping)
    queue = _Queue(
        prompts=prompts,
        prompt_lens=prompt_lens,
        limits=_within(limits, num_prompts, max_new_tokens),
        widths=_within(widths, num_prompts, width),
        processor=processor_state,
    )
    state = _idle_state(stepper, cache, longest + max_new_tokens, stop_tokens, processor_state)
    num_groups = min(num_rows // width, num_prompts)
    search = _Search(
        next=jnp.int32(0),
        prompt=jnp.full(num_groups, NO_PROMPT, jnp.int32),
        widths=jnp.ones(num_groups, jnp.int32),
        scores=jnp.full((num_groups, width), NOTHING, jnp.float32),
        finished=Hypotheses.create(num_groups, width, max_new_tokens),
        least_free=cache.tables.num_free,
    )
    out = Hypotheses.create(num_prompts, width, max_new_tokens), jnp.zeros((num_prompts, width), jnp.int32)
    carry = state, search, out

    def unfinished(carry: tuple[DecodeState, _Search, Any]) -> Array:
        _, search, _ = carry
        return (search.next < num_prompts) | jnp.any(search.is_taken)

    def body(carry: tuple[DecodeState, _Search, Any]) -> tuple[DecodeState, _Search, Any]:
        state, search, out = carry
        state, search = _admit(state, search, queue)
        state, search = _step(stepper, params, state, search, rules)
        search, out = _collect(state, search, out)
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
    if num_rows > stepper.token_counts[-1]:
        raise ValueError(
            f"token_counts={stepper.token_counts} for a batch of {num_rows} rows: the largest must hold one token of "
            "each"
        )
    if stepper.drafter is not None:
        raise ValueError("drafts are for rows that draw for themselves: leave the stepper's drafter out for beams")
    if stepper.num_logprobs or stepper.processed_logprobs:
        raise ValueError(
            "num_logprobs and processed_logprobs of the stepper are for tokens that are drawn: leave them out, a "
            "sequence comes with the log-probabilities of its own tokens"
        )


def _within(values: Int32[Array, " Q"] | None, num_prompts: int, most: int) -> Int32[Array, " Q"]:
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


# ---- groups begin and end ----------------------------------------------------------------------------------------


def _admit(state: DecodeState, search: _Search, queue: _Queue) -> tuple[DecodeState, _Search]:
    """Free groups take the next prompts; a group that gave up its pages begins again."""
    candidate = search.next + jnp.cumsum(~search.is_taken, dtype=jnp.int32) - 1
    takes = ~search.is_taken & (candidate < len(queue.prompt_lens))
    again = search.is_taken & (search.scores[:, 0] == NOTHING)

    def begin(state: DecodeState, search: _Search) -> tuple[DecodeState, _Search]:
        search = dataclasses.replace(
            search,
            next=search.next + jnp.sum(takes, dtype=jnp.int32),
            prompt=jnp.where(takes, candidate, search.prompt),
        )
        return _begin(state, search, queue, takes | again)

    return lax.cond(jnp.any(takes | again), begin, lambda state, search: (state, search), state, search)


def _begin(
    state: DecodeState, search: _Search, queue: _Queue, begins: Bool[Array, " U"]
) -> tuple[DecodeState, _Search]:
    """Some groups begin: the first row of each computes the prompt, as its only beam."""
    num_rows, width = len(state.rows.active), search.scores.shape[1]
    longest = queue.prompts.shape[1]
    beam = jnp.arange(num_rows, dtype=jnp.int32) % width
    prompt = jnp.maximum(search.prompt, 0)
    mine = search.of_rows(prompt, num_rows)
    num_prompt = queue.prompt_lens[mine]
    fits = (num_prompt >= 1) & (num_prompt <= longest)
    rows = dataclasses.replace(
        state.rows,
        tokens=state.rows.tokens.at[:, :longest].set(queue.prompts[mine]),
        num_prompt=jnp.where(fits, num_prompt, state.longest_row + 1),  # so that `start` refuses it
        num_known=num_prompt,
        limit=num_prompt + queue.limits[mine],
        age=mine * width + beam,
        active=beam == 0,
        finish=jnp.zeros(num_rows, jnp.int32),
        sampling=dataclasses.replace(state.rows.sampling, processor=jax.tree.map(lambda x: x[mine], queue.processor)),
    )
    state = start(state, search.of_rows(begins, num_rows), rows)
    first = jnp.where(jnp.arange(width) == 0, 0.0, NOTHING).astype(jnp.float32)
    first = jnp.broadcast_to(first, search.scores.shape)
    none = Hypotheses.create(*search.finished.tokens.shape)
    return state, dataclasses.replace(
        search,
        widths=jnp.where(begins, queue.widths[prompt], search.widths),
        scores=_where(begins, first, search.scores),
        finished=jax.tree.map(lambda new, old: _where(begins, new, old), none, search.finished),
    )


def _collect(
    state: DecodeState, search: _Search, out: tuple[Hypotheses, Array]
) -> tuple[_Search, tuple[Hypotheses, Array]]:
    """Groups that have ended hand out their sequences, and are free."""
    ended = search.is_taken & ~_is_active(state, search) & (search.scores[:, 0] > NOTHING)

    def collect(out: tuple[Hypotheses, Array]) -> tuple[Hypotheses, Array]:
        place = jnp.where(ended, search.prompt, len(out[1]))
        is_there = search.finished.scores > NOTHING
        none = Hypotheses.create(*search.finished.tokens.shape)
        finished = jax.tree.map(lambda x, y: _where(is_there, x, y), search.finished, none)
        why = jnp.where(finished.stopped, jnp.int32(Finish.STOP_TOKEN), jnp.int32(Finish.MAX_TOKENS))
        was_cut = search.of_groups(state.rows.finish)[:, :1] == Finish.TOO_LONG
        missing = jnp.where(was_cut, jnp.int32(Finish.TOO_LONG), jnp.int32(Finish.UNFINISHED))
        new = finished, jnp.where(is_there, why, missing)
        return jax.tree.map(lambda all, x: all.at[place].set(x, mode="drop"), out, new)

    out = lax.cond(jnp.any(ended), collect, lambda out: out, out)
    return dataclasses.replace(search, prompt=jnp.where(ended, NO_PROMPT, search.prompt)), out


def _where(mask: Array, new: Array, old: Array) -> Array:
    """`new` where a mask over the first axes holds."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim)), new, old)


# ---- a step --------------------------------------------------------------------------------------------------------


def _step(
    stepper: Stepper, params: Any, state: DecodeState, search: _Search, rules: Rules
) -> tuple[DecodeState, _Search]:
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
    is_stuck = (jnp.sum(counts, dtype=jnp.int32) == 0) & jnp.all(_is_active(state, search) == search.is_taken)
    return lax.cond(is_stuck, _make_room, lambda state, search: (state, search), state, search)


def _is_active(state: DecodeState, search: _Search) -> Bool[Array, " U"]:
    return jnp.any(search.of_groups(state.rows.active), axis=1)


def _wait_for_each_other(
    state: DecodeState, search: _Search, counts: Int32[Array, " B"]
) -> tuple[DecodeState, Int32[Array, " B"], Bool[Array, " U"]]:
    """Rows leave their last known token for later where another row of their group does not catch up in this step.

    Returns:
        The state, how many tokens each row computes, and the groups that choose their next beams after that.
    """
    rows, tables = state.rows, state.cache.tables
    falls_behind = jnp.any(search.of_groups(rows.active & (tables.lengths < rows.num_known)), axis=1)
    waits = search.of_rows(falls_behind, len(counts)) & (counts > 0) & (tables.lengths == rows.num_known)
    waiting = waits.astype(jnp.int32)
    tables = lax.cond(jnp.any(waits), lambda t: t.truncate(t.lengths - waiting), lambda t: t, tables)
    state = dataclasses.replace(state, cache=KVCache(tables, state.cache.pool))
    return state, counts - waiting, _is_active(state, search) & ~falls_behind


def _choose(
    stepper: Stepper, state: DecodeState, search: _Search, found: Candidates, is_ready: Bool[Array, " U"], rules: Rules
) -> tuple[DecodeState, _Search]:
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
    finished = jax.tree.map(lambda new, old: _where(is_ready, new, old), added, search.finished)
    chosen = go_on(choice, width, search.widths)
    over = rules.are_over(finished, search.widths, chosen.totals[:, 0], num_drawn, limit - num_prompt)
    goes_on = is_ready & ~over
    search = dataclasses.replace(search, scores=_where(goes_on, chosen.totals, search.scores), finished=finished)
    return _continue(stepper, state, search, chosen, goes_on, is_ready & over), search


def _continue(
    stepper: Stepper,
    state: DecodeState,
    search: _Search,
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
    state = dataclasses.replace(state, cache=KVCache(tables, state.cache.pool), rows=rows)
    return release(state, (moved & ~learns & (tables.lengths > 0)) | ends)


def _make_room(state: DecodeState, search: _Search) -> tuple[DecodeState, _Search]:
    """Where nobody can go on, the youngest of several groups that hold pages gives them up and begins again later.

    A group that is stuck though no other holds any needs more pages than there are, and ends.
    """
    holds = jnp.any(search.of_groups(state.cache.tables.lengths) > 0, axis=1)
    is_only = jnp.sum(holds, dtype=jnp.int32) <= 1
    youngest = holds & (search.prompt == jnp.max(jnp.where(holds, search.prompt, NO_PROMPT)))
    waiting = jnp.where(search.is_taken, search.prompt, YOUNGEST)
    oldest = search.is_taken & (search.prompt == jnp.min(waiting))
    gone = search.of_rows(jnp.where(is_only, oldest, youngest), len(state.rows.active))
    cut = jnp.where(gone & is_only, jnp.int32(Finish.TOO_LONG), state.rows.finish)
    rows = dataclasses.replace(state.rows, active=state.rows.active & ~gone, finish=cut)
    again = ~is_only & youngest
    search = dataclasses.replace(search, scores=jnp.where(again[:, None], NOTHING, search.scores))
    return release(dataclasses.replace(state, rows=rows), gone), search
