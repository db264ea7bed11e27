"""A step of a batch in which groups of rows hold beams, beside rows that draw for themselves.

When all rows of a group have caught up, its best continuations are chosen among them: rows are permuted, so that each
row shares the pages of the beam that it continues, and copies on write the one page in which they part. So a page is
held once for all beams that begin with its tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from paged_jax.decoding.groups import Groups, groups_of, where
from paged_jax.decoding.hypotheses import (
    NOTHING,
    Candidates,
    Choice,
    Hypotheses,
    find_candidates,
    finish,
    go_on,
    num_candidates,
    rank,
)
from paged_jax.decoding.room import reserve
from paged_jax.decoding.rows import DecodeState, Rows
from paged_jax.decoding.step import Choose, Logits, commit, compute, draw_next, release, share_prompts
from paged_jax.decoding.stepper import Stepper
from paged_jax.sampling import processors


def step(stepper: Stepper, params: Any, state: DecodeState) -> tuple[DecodeState, Bool[Array, " B"]]:
    """As `paged_jax.decoding.step.step`, for a batch with groups; without drafts.

    Returns:
        The state, and which rows ended in this step; those of a group end together.
    """
    stepper.check_rows(len(state.rows.active))
    state, counts = reserve(state, stepper.plan(state, stepper.token_counts[-1]))
    return step_with(stepper, params, state, counts, others_draw=True)


def step_with(
    stepper: Stepper, params: Any, state: DecodeState, counts: Int32[Array, " B"], *, others_draw: bool
) -> tuple[DecodeState, Bool[Array, " B"]]:
    """A step after its pages were reserved.

    Args:
        stepper: what is static about a step.
        params: the decoder's parameters.
        state: the batch, after `reserve`.
        counts: tokens that each row computes.
        others_draw: whether there may be rows of no group; static.
    """
    state, counts, is_ready = _wait_for_each_other(state, counts)
    was_active, num_rows = state.rows.active, len(state.rows.active)
    groups, num_stop = groups_of(state), state.rows.sampling.stop_tokens.shape[1]
    find = find_candidates(num_candidates(groups.width, num_stop))
    is_other = ~groups.to_rows(groups.are_taken, num_rows)
    state, chosen = compute(stepper, params, state, counts, _both(find, is_ready) if others_draw else find)
    if others_draw:
        drawn, found = chosen
        state, _ = commit(share_prompts(state), drawn._replace(drew=drawn.drew & is_other[:, None]))
    else:
        found = chosen
    state = lax.cond(
        jnp.any(is_ready), lambda state: _choose(stepper, state, found, is_ready), lambda state: state, state
    )
    are_over = groups.to_rows(groups_of(state).have_ended(state.rows), num_rows)
    return state, was_active & ~state.rows.active & (is_other | are_over)


def _both(find: Choose, is_ready: Bool[Array, " U"]) -> Choose:
    """Draws, and finds candidates where some group is ready for them."""

    def choose(stepper: Stepper, logits: Logits, rows: Rows, draws: Bool[Array, " R"]) -> tuple:
        shapes = jax.eval_shape(lambda: find(stepper, logits, rows, draws))
        found = lax.cond(
            jnp.any(is_ready),
            lambda: find(stepper, logits, rows, draws),
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        )
        return draw_next(stepper, logits, rows, draws), found

    return choose


def _wait_for_each_other(
    state: DecodeState, counts: Int32[Array, " B"]
) -> tuple[DecodeState, Int32[Array, " B"], Bool[Array, " U"]]:
    """Rows leave their last known token for later where another row of their group does not catch up in this step.

    Returns:
        The state, how many tokens each row computes, and the groups that choose their next beams after that.
    """
    groups, rows, tables = groups_of(state), state.rows, state.cache.tables
    is_active = groups.are_taken & jnp.any(groups.to_groups(rows.active), axis=1)
    is_behind = jnp.any(groups.to_groups(rows.active & (tables.lengths < rows.num_known)), axis=1)
    waits = groups.to_rows(is_active & is_behind, len(counts)) & (counts > 0) & (tables.lengths == rows.num_known)
    waiting = waits.astype(jnp.int32)
    tables = lax.cond(jnp.any(waits), lambda t: t.truncate(t.lengths - waiting), lambda t: t, tables)
    return state.with_tables(tables), counts - waiting, is_active & ~is_behind


def _choose(stepper: Stepper, state: DecodeState, found: Candidates, is_ready: Bool[Array, " U"]) -> DecodeState:
    """The next beams of the groups that are ready, and what they have finished; rows of those that end are inactive."""
    groups, rows = groups_of(state), state.rows
    width, rules, widths = groups.width, groups.rules, groups.widths
    num_prompt, limit, num_known = (groups.to_groups(x)[:, 0] for x in (rows.num_prompt, rows.limit, rows.num_known))
    num_drawn = num_known + 1 - num_prompt
    stop_tokens = groups.to_groups(rows.sampling.stop_tokens)[:, 0]
    candidates = jax.tree.map(lambda x: x[: groups.scores.size], found)
    choice = rank(candidates, groups.scores, stop_tokens, num_known + 1 >= limit)

    def add(finished: Hypotheses) -> Hypotheses:
        at = jnp.arange(finished.tokens.shape[2], dtype=jnp.int32)[None, None, :] + num_prompt[:, None, None]
        at = jnp.minimum(at, rows.tokens.shape[1] - 1)
        tokens, logprobs = (jnp.take_along_axis(groups.to_groups(x), at, axis=2) for x in (rows.tokens, rows.logprobs))
        return finished.merge(finish(choice, tokens, logprobs, num_drawn, widths, rules), widths)

    may_finish = is_ready[:, None] & choice.ends
    added = lax.cond(jnp.any(may_finish), add, lambda finished: finished, groups.finished)
    finished = jax.tree.map(lambda new, old: where(is_ready, new, old), added, groups.finished)
    chosen = go_on(choice, width, widths)
    over = rules.are_over(finished, widths, chosen.totals[:, 0], num_drawn, limit - num_prompt)
    goes_on = is_ready & ~over
    groups = dataclasses.replace(groups, scores=where(goes_on, chosen.totals, groups.scores), finished=finished)
    return _continue(stepper, dataclasses.replace(state, groups=groups), chosen, goes_on, is_ready & over)


def _continue(
    stepper: Stepper, state: DecodeState, chosen: Choice, goes_on: Bool[Array, " U"], over: Bool[Array, " U"]
) -> DecodeState:
    """Rows become those of the chosen beams, and learn their tokens; rows without a beam hold nothing."""
    groups: Groups = groups_of(state)
    rows, num_rows = state.rows, len(state.rows.active)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    is_chosen = goes_on[:, None] & (chosen.totals > NOTHING)
    first = jnp.arange(len(goes_on), dtype=jnp.int32)[:, None] * groups.width

    def of_beams(x: Array, otherwise: Array) -> Array:
        flat = jnp.where(is_chosen, x, groups.to_groups(otherwise)).reshape(-1)
        return otherwise.at[: len(flat)].set(flat)

    parents = of_beams(first + chosen.parents, row)
    moved, learns = groups.to_rows(goes_on, num_rows), of_beams(is_chosen, jnp.zeros(num_rows, bool))
    ends = groups.to_rows(over, num_rows)
    tables = state.cache.tables.permute(parents)
    tokens = of_beams(chosen.tokens, jnp.zeros(num_rows, jnp.int32))
    logprobs = of_beams(chosen.logprobs, jnp.zeros(num_rows, jnp.float32))
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
    return release(state, (moved & ~learns & (tables.lengths > 0)) | (ends & ~rows.keeps))
