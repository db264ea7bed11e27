"""One step for everything: plan, reserve, forward, draw, commit.

A row knows tokens and caches some of them. A step computes some of the tokens between the two, of any number of rows
at once, and a row that has caught up draws its next token; with drafts (`paged_jax.decoding.draft`) several of them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.attention import find_sharing, step_pays
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool
from paged_jax.decoding.draft import add_drafts, settle_drafts
from paged_jax.decoding.room import reserve
from paged_jax.decoding.rows import FIRST_TRUST, NO_ROW, DecodeState, Finish, Rows
from paged_jax.decoding.stepper import SHORT, Stepper
from paged_jax.sampling import SamplingState, draw


class Drawn(NamedTuple):
    """What a step drew, for each row one token after the other, X = D + 1; anything where `drew` is False."""

    drew: Bool[Array, "B X"]
    tokens: Int32[Array, "B X"]
    logprobs: Float[Array, "B X"]
    top_tokens: Int32[Array, "B X k"]
    top_logprobs: Float[Array, "B X k"]
    processor: Any


class Logits(NamedTuple):
    """Of the rows that take part in a step: after the tokens that each knows, and after each of its drafts."""

    values: Float[Array, "Z V"]
    first: Int32[Array, " R"] | None  # where those of each row begin; None: one of each row, and no drafts
    num_drafts: Int32[Array, " R"]

    def after(self, num_drafts: int | Int32[Array, ""]) -> Float[Array, "R V"]:
        """Those after this many drafts of each row; anything for rows that have fewer."""
        if self.first is None:
            return self.values
        return self.values.at[self.first + num_drafts].get(mode="clip")


Choose = Callable[[Stepper, Logits, Rows, Bool[Array, " R"]], Any]
"""(stepper, logits, rows, draws) -> what is made of the logits of some rows: a pytree whose leaves have the rows first.

`draws` says which of these rows have caught up; the logits of the others mean nothing.
"""


def draw_next(stepper: Stepper, logits: Logits, rows: Rows, draws: Bool[Array, " R"]) -> Drawn:
    """The `Choose` of rollouts and of the engine: each row draws a token, and another one for each draft it draws."""

    def draw_at(i: int | Array, draws: Array, processor: Any) -> tuple:
        drawn = draw(
            logits.after(i),
            dataclasses.replace(rows.sampling, processor=processor),
            rows.tokens,
            rows.num_prompt,
            rows.num_known + i,
            active=draws,
            processor=stepper.processor,
            num_logprobs=stepper.num_logprobs,
            processed_logprobs=stepper.processed_logprobs,
        )
        logprobs = jnp.zeros(len(draws), jnp.float32) if drawn.logprobs is None else drawn.logprobs
        return draws, drawn.tokens, logprobs, drawn.top_tokens, drawn.top_logprobs, drawn.processor

    if stepper.drafter is None:
        *columns, processor = draw_at(0, draws, rows.sampling.processor)
        return Drawn._make((*(x[:, None] for x in columns), processor))

    def goes_on(carry: tuple[Array, Array, Drawn]) -> Array:
        return jnp.any(carry[1])

    def draw_one_more(carry: tuple[Array, Array, Drawn]) -> tuple[Array, Array, Drawn]:
        i, draws, drawn = carry
        *columns, processor = draw_at(i, draws, drawn.processor)
        token = columns[1]
        columns = [old.at[:, i].set(new) for old, new in zip(drawn[:-1], columns, strict=True)]
        row = jnp.arange(len(draws), dtype=jnp.int32)
        drafted = rows.tokens.at[row, rows.num_known + i].get(mode="clip")
        is_drafted = (i < logits.num_drafts) & (token == drafted)
        has_ended = rows.sampling.is_stop(token) | (rows.num_known + i + 1 >= rows.limit)
        return i + 1, draws & is_drafted & ~has_ended, Drawn._make((*columns, processor))

    *shapes, _ = jax.eval_shape(draw_at, 0, draws, rows.sampling.processor)
    most = stepper.num_drafts + 1
    nothing = (jnp.zeros((len(draws), most, *x.shape[1:]), x.dtype) for x in shapes)
    start = jnp.int32(0), draws, Drawn._make((*nothing, rows.sampling.processor))
    return lax.while_loop(goes_on, draw_one_more, start)[2]


Step = Callable[[Stepper, Any, DecodeState], tuple[DecodeState, Bool[Array, " B"]]]
"""(stepper, params, state) -> (state, which rows ended)"""


def step(stepper: Stepper, params: Any, state: DecodeState) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Every row that the plan chooses computes tokens; those that catch up draw; those that end are inactive.

    Rows that have ended still hold their pages: `release` frees them.

    Returns:
        The state, and which rows ended in this step.
    """
    stepper.check_rows(len(state.rows.active))
    if (kept := state.rows.top_tokens.shape[2]) != (stepper.num_logprobs or 0):
        raise ValueError(
            f"num_logprobs={stepper.num_logprobs} of the stepper, but the rows keep {kept} of the most likely tokens: "
            f"create the state with num_logprobs={stepper.num_logprobs or 0}"
        )
    state, counts = reserve(*ask(stepper, state))
    state, drawn = compute(stepper, params, state, counts)
    return commit(share_prompts(state), drawn)


def ask(stepper: Stepper, state: DecodeState) -> tuple[DecodeState, Int32[Array, " B"]]:
    """How many tokens each row is to compute: what the plan gives it, and drafts, in a step that may have some.

    Returns:
        The state, with drafts in the rows' token buffers, and the tokens of each row.
    """
    counts = stepper.plan(state, stepper.token_counts[-1])
    if stepper.drafter is None:
        return state, counts
    is_short = (jnp.max(counts) <= SHORT) | (len(stepper.token_counts) == 1)  # the only pass has room for drafts, too
    return add_drafts(stepper.drafter, state, counts, jnp.where(is_short, stepper.most_verified, 0))


def release(state: DecodeState, rows: Bool[Array, " B"]) -> DecodeState:
    """Free the pages of some rows."""
    tables = lax.cond(jnp.any(rows), lambda t: t.release(rows), lambda t: t, state.cache.tables)
    return state.with_tables(tables)


def compute(
    stepper: Stepper, params: Any, state: DecodeState, counts: Int32[Array, " B"], choose: Choose = draw_next
) -> tuple[DecodeState, Any]:
    """Run the decoder on the next `counts[b]` tokens of each row, for which there are pages, and draw.

    Tokens past those that a row knows are drafts. Only rows that compute something take part, at most T of them in a
    step of T tokens. Token counts for which as many rows can take part share the drawing, which takes as long to
    compile as a small decoder, but not where they verify drafts.

    Args:
        stepper: what is static about a step.
        params: the decoder's parameters.
        state: the batch, after `reserve`.
        counts: tokens that each row computes.
        choose: what is made of the logits.

    Returns:
        The state, and what was chosen, with all rows first: zeros where a row computed nothing.
    """
    total = jnp.sum(counts, dtype=jnp.int32)
    num_rows = len(counts)
    draws = (counts > 0) & (state.cache.tables.lengths >= state.rows.num_known)
    alike = itertools.groupby(stepper.token_counts, lambda t: (min(t, num_rows), t if stepper.verifies(t) else 0))
    by_rows = [(n, tuple(group)) for (n, _), group in alike]
    branches = [functools.partial(_forward_and_choose, stepper, choose, *sizes) for sizes in by_rows]
    which = stepper.choose_pass(counts)
    ends = jnp.cumsum(jnp.array([len(token_counts) for _, token_counts in by_rows], jnp.int32), dtype=jnp.int32)
    branch = jnp.sum(ends <= which, dtype=jnp.int32)
    pool, chosen = lax.switch(branch, branches, params, state, counts, draws)
    counters = state.counters
    counters = counters._replace(
        steps=counters.steps.at[which].add(1),
        computed_tokens=counters.computed_tokens + total,
        drawn_tokens=counters.drawn_tokens + jnp.sum(draws, dtype=jnp.int32),  # `commit` adds accepted drafts
    )
    return dataclasses.replace(state, cache=KVCache(state.cache.tables, pool), counters=counters), chosen


def _forward_and_choose(
    stepper: Stepper,
    choose: Choose,
    num_taking: int,
    token_counts: tuple[int, ...],
    params: Any,
    state: DecodeState,
    counts: Int32[Array, " B"],
    draws: Bool[Array, " B"],
) -> tuple[PagePool, Any]:
    """A step of one of some token counts, in which up to R = `num_taking` rows take part."""
    num_rows = len(counts)
    row = jnp.flatnonzero(counts > 0, size=num_taking, fill_value=num_rows).astype(jnp.int32)
    query_lens = counts.at[row].get(mode="fill", fill_value=0)
    branches = [functools.partial(_forward, stepper, num_tokens) for num_tokens in token_counts]
    which = stepper.choose_pass(counts) - stepper.token_counts.index(token_counts[0])
    logits, pool = lax.switch(which, branches, params, state, row, query_lens)

    mine = jax.tree.map(lambda x: x.at[row].get(mode="clip"), state.rows)
    num_drafts = jnp.maximum(state.cache.tables.lengths.at[row].get(mode="clip") - mine.num_known, 0)
    first = None
    if stepper.verifies(token_counts[0]):  # there are logits of every token
        first = jnp.cumsum(query_lens, dtype=jnp.int32) - 1 - num_drafts
    logits = Logits(logits, first, num_drafts)
    chosen = choose(stepper, logits, mine, draws.at[row].get(mode="fill", fill_value=False))

    def spread(x: Array) -> Array:
        """From the rows that take part to all rows."""
        return jnp.zeros((num_rows, *x.shape[1:]), x.dtype).at[row].set(x, mode="drop")

    return pool, jax.tree.map(spread, chosen)


def _forward(
    stepper: Stepper,
    num_tokens: int,
    params: Any,
    state: DecodeState,
    row: Int32[Array, " R"],
    query_lens: Int32[Array, " R"],
) -> tuple[Float[Array, "Z V"], PagePool]:
    """Logits at the last of the next tokens of some rows, computed in a pass of T = `num_tokens`.

    In a pass that verifies drafts, logits of every token.
    """
    num_rows, capacity = state.rows.tokens.shape
    longest = num_tokens if stepper.prefills(num_tokens) else min(SHORT, num_tokens)
    metadata = AttentionMetadata.ragged(state.cache.tables, query_lens, num_tokens, rows=row, max_query_len=longest)
    sharing = stepper.sharing
    if sharing is None:
        sharing = longest <= SHORT and step_pays(len(row))
    if stepper.verifies(num_tokens):
        metadata = dataclasses.replace(metadata, logits_at=jnp.arange(num_tokens, dtype=jnp.int32))
    if sharing:
        metadata = find_sharing(metadata, state.cache.pool)
    place = row.at[metadata.sequences].get(mode="clip"), jnp.minimum(metadata.positions, capacity - 1)
    tokens = state.rows.tokens.at[place].get(mode="clip")
    return stepper.forward(params, tokens, state.cache.pool, metadata)


def share_prompts(state: DecodeState) -> DecodeState:
    """Rows that wait for another row's prompt are forked from it once it is computed, but for its last token.

    They compute that token themselves, and so draw for themselves.
    """
    rows, lengths = state.rows, state.cache.tables.lengths
    source = jnp.maximum(rows.source, 0)
    is_ready = rows.active & (rows.source != NO_ROW) & (lengths[source] >= rows.num_prompt - 1)

    def share(state: DecodeState) -> DecodeState:
        child = jnp.arange(len(source), dtype=jnp.int32)
        tables, _ = state.cache.tables.fork(jnp.where(is_ready, source, -1), jnp.where(is_ready, child, -1))
        tables = tables.truncate(jnp.where(is_ready, rows.num_prompt - 1, tables.lengths))
        return state.with_tables(
            tables, rows=dataclasses.replace(rows, source=jnp.where(is_ready, NO_ROW, rows.source))
        )

    return lax.cond(jnp.any(is_ready), share, lambda state: state, state)


def commit(state: DecodeState, drawn: Drawn) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Rows learn the tokens that they drew and take back the drafts that they did not; those at their end are inactive.

    Returns:
        The state, and which rows ended.
    """
    rows = state.rows
    capacity = rows.tokens.shape[1]
    num_drawn = jnp.sum(drawn.drew, axis=1, dtype=jnp.int32)
    drew = num_drawn > 0
    row = jnp.arange(len(drew), dtype=jnp.int32)
    i = jnp.arange(drawn.drew.shape[1], dtype=jnp.int32)[None, :]
    place = row[:, None], jnp.where(drawn.drew, rows.num_known[:, None] + i, capacity + i)
    num_known = rows.num_known + num_drawn
    last = drawn.tokens[row, jnp.maximum(num_drawn - 1, 0)]
    finish = jnp.select(
        [drew & rows.sampling.is_stop(last), drew & (num_known >= rows.limit)],
        [jnp.int32(Finish.STOP_TOKEN), jnp.int32(Finish.MAX_TOKENS)],
        rows.finish,
    )
    ended = rows.active & (finish != Finish.UNFINISHED)

    def advance(new: Array, old: Array) -> Array:
        return jnp.where(drew.reshape(drew.shape + (1,) * (new.ndim - 1)), new, old)

    processor = jax.tree.map(advance, drawn.processor, rows.sampling.processor)
    sampling: SamplingState = dataclasses.replace(rows.sampling, processor=processor)
    rows = dataclasses.replace(
        rows,
        tokens=rows.tokens.at[place].set(drawn.tokens, mode="drop", unique_indices=True),
        logprobs=rows.logprobs.at[place].set(drawn.logprobs, mode="drop", unique_indices=True),
        top_tokens=rows.top_tokens.at[place].set(drawn.top_tokens, mode="drop", unique_indices=True),
        top_logprobs=rows.top_logprobs.at[place].set(drawn.top_logprobs, mode="drop", unique_indices=True),
        num_known=num_known,
        active=rows.active & ~ended,
        finish=finish,
        sampling=sampling,
    )
    state = dataclasses.replace(state, rows=rows)
    num_drafts = drawn.drew.shape[1] - 1
    return (settle_drafts(state, num_drawn, num_drafts) if num_drafts else state), ended


def start(state: DecodeState, mask: Bool[Array, " B"], rows: Rows) -> DecodeState:
    """Put sequences into some rows, which must hold no pages; the others stay as they are.

    A row whose prompt could never fit, even alone, ends at once, with `Finish.TOO_LONG` and no token drawn; one whose
    limit leaves it no token to draw ends at once with `Finish.MAX_TOKENS`.
    """
    rows = rows.where(mask, state.rows)
    longest = min(state.longest_row, rows.tokens.shape[1] - 1)  # the last token that a row draws is never cached
    fits = rows.num_prompt <= longest
    draws = rows.limit > rows.num_prompt
    finish = jnp.select([~fits, ~draws], [jnp.int32(Finish.TOO_LONG), jnp.int32(Finish.MAX_TOKENS)], rows.finish)
    return dataclasses.replace(
        state,
        rows=dataclasses.replace(
            rows,
            limit=jnp.where(mask, jnp.minimum(rows.limit, longest + 1), rows.limit),
            active=rows.active & (fits & draws | ~mask),
            finish=jnp.where(mask, finish, rows.finish),
            trust=jnp.where(mask, FIRST_TRUST, rows.trust),
        ),
    )


def run(
    stepper: Stepper,
    params: Any,
    state: DecodeState,
    max_steps: int | Int32[Array, ""],
    *,
    until_one_ends: bool | Bool[Array, ""] = False,
    step: Step = step,
) -> DecodeState:
    """Steps in one `lax.while_loop`, until no row is active or `max_steps` were made.

    Rows that end give up their pages in that very step, but for those that keep them (`Rows.keeps`).

    Args:
        stepper: what is static about a step.
        params: the decoder's parameters.
        state: the batch; donate it at the jit boundary.
        max_steps: may be traced.
        until_one_ends: also return as soon as a row has ended.
        step: that of `paged_jax.decoding.beam_step`, where some rows hold beams; static.
    """

    def goes_on(carry: tuple[Array, Array, DecodeState]) -> Array:
        steps, any_ended, state = carry
        return (steps < max_steps) & jnp.any(state.rows.active) & ~(any_ended & until_one_ends)

    def body(carry: tuple[Array, Array, DecodeState]) -> tuple[Array, Array, DecodeState]:
        steps, _, state = carry
        state, ended = step(stepper, params, state)
        state = release(state, ended & ~state.rows.keeps)
        return steps + 1, jnp.any(ended), state.settle()

    return lax.while_loop(goes_on, body, (jnp.int32(0), jnp.bool_(False), state))[2]
