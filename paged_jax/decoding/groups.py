"""Groups of rows, each of which holds the beams of a prompt: how they begin, end and make room for each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.decoding.hypotheses import NOTHING, Hypotheses
from paged_jax.decoding.plan import YOUNGEST
from paged_jax.decoding.rows import DecodeState, Finish
from paged_jax.decoding.step import release, start

NO_PROMPT = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """The prompts."""

    prompts: Int32[Array, "Q C"]
    prompt_lens: Int32[Array, " Q"]
    limits: Int32[Array, " Q"]
    widths: Int32[Array, " Q"]
    processor: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """U groups on their way; group u has the rows u * W to u * W + W - 1. Rows past the last group stay empty."""

    next: Int32[Array, ""]  # the next prompt that gets a group
    prompt: Int32[Array, " U"]  # of each group; NO_PROMPT where it is free
    widths: Int32[Array, " U"]  # beams of each
    scores: Float[Array, "U W"]  # log-probabilities of the running beams, the best first; -inf where there is none
    finished: Hypotheses
    last_try: Bool[Array, ""]  # the oldest group has begun again for lack of pages, when it was the oldest already
    least_free: Int32[Array, " G"]  # the fewest pages of each group of layers that were free

    @classmethod
    def create(cls, num_groups: int, width: int, max_new_tokens: int, num_free: Int32[Array, " G"]) -> "Search":
        """Groups without a prompt."""
        return cls(
            next=jnp.int32(0),
            prompt=jnp.full(num_groups, NO_PROMPT, jnp.int32),
            widths=jnp.ones(num_groups, jnp.int32),
            scores=jnp.full((num_groups, width), NOTHING, jnp.float32),
            finished=Hypotheses.create(num_groups, width, max_new_tokens),
            last_try=jnp.bool_(False),
            least_free=num_free,
        )

    @property
    def is_taken(self) -> Bool[Array, " U"]:
        """Groups that have a prompt."""
        return self.prompt != NO_PROMPT

    @property
    def is_oldest(self) -> Bool[Array, " U"]:
        """The group whose prompt came first."""
        return self.is_taken & (self.prompt == jnp.min(jnp.where(self.is_taken, self.prompt, YOUNGEST)))

    def has_ended(self, state: DecodeState) -> Bool[Array, " U"]:
        """Groups whose rows have all ended, other than those that begin again."""
        is_active = jnp.any(self.of_groups(state.rows.active), axis=1)
        return self.is_taken & ~is_active & (self.scores[:, 0] > NOTHING)

    def of_rows(self, per_group: Array, num_rows: int) -> Array:
        """From groups to their rows; zeros for the rows of none."""
        width = self.scores.shape[1]
        return jnp.pad(jnp.repeat(per_group, width, axis=0), (0, num_rows - len(per_group) * width))

    def of_groups(self, per_row: Array) -> Array:
        """From rows to groups, [U, W, ...]."""
        num_groups, width = self.scores.shape
        return per_row[: num_groups * width].reshape(num_groups, width, *per_row.shape[1:])


def admit(state: DecodeState, search: Search, queue: Queue) -> tuple[DecodeState, Search]:
    """Free groups take the next prompts; a group that gave up its pages begins again."""
    candidate = search.next + jnp.cumsum(~search.is_taken, dtype=jnp.int32) - 1
    takes = ~search.is_taken & (candidate < len(queue.prompt_lens))
    again = search.is_taken & (search.scores[:, 0] == NOTHING)

    def begin(state: DecodeState, search: Search) -> tuple[DecodeState, Search]:
        search = dataclasses.replace(
            search,
            next=search.next + jnp.sum(takes, dtype=jnp.int32),
            prompt=jnp.where(takes, candidate, search.prompt),
        )
        return _begin(state, search, queue, takes | again)

    return lax.cond(jnp.any(takes | again), begin, lambda state, search: (state, search), state, search)


def _begin(state: DecodeState, search: Search, queue: Queue, begins: Bool[Array, " U"]) -> tuple[DecodeState, Search]:
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
        scores=where(begins, first, search.scores),
        finished=jax.tree.map(lambda new, old: where(begins, new, old), none, search.finished),
    )


def collect(
    state: DecodeState, search: Search, out: tuple[Hypotheses, Array]
) -> tuple[Search, tuple[Hypotheses, Array]]:
    """Groups that have ended hand out their sequences, and are free."""
    ended = search.has_ended(state)

    def hand_out(out: tuple[Hypotheses, Array]) -> tuple[Hypotheses, Array]:
        place = jnp.where(ended, search.prompt, len(out[1]))
        is_there = search.finished.scores > NOTHING
        none = Hypotheses.create(*search.finished.tokens.shape)
        finished = jax.tree.map(lambda x, y: where(is_there, x, y), search.finished, none)
        why = jnp.where(finished.stopped, jnp.int32(Finish.STOP_TOKEN), jnp.int32(Finish.MAX_TOKENS))
        why = jnp.where(is_there, why, jnp.int32(Finish.UNFINISHED))
        was_cut = search.of_groups(state.rows.finish)[:, :1] == Finish.TOO_LONG
        new = finished, jnp.where(was_cut, jnp.int32(Finish.TOO_LONG), why)
        return jax.tree.map(lambda all, x: all.at[place].set(x, mode="drop"), out, new)

    out = lax.cond(jnp.any(ended), hand_out, lambda out: out, out)
    prompt = jnp.where(ended, NO_PROMPT, search.prompt)
    last_try = search.last_try & ~jnp.any(ended & search.is_oldest)
    return dataclasses.replace(search, prompt=prompt, last_try=last_try), out


def where(mask: Array, new: Array, old: Array) -> Array:
    """`new` where a mask over the first axes holds."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim)), new, old)


def make_room(state: DecodeState, search: Search) -> tuple[DecodeState, Search]:
    """Where nobody can go on, the youngest of several groups that hold pages gives them up and begins again.

    If no other holds any, the oldest begins again itself, because rows that have given up pages to older groups no
    longer share them. If that was no help, its beams need more pages than there are, and it ends.
    """
    holds = jnp.any(search.of_groups(state.cache.tables.lengths) > 0, axis=1)
    several = jnp.sum(holds, dtype=jnp.int32) > 1
    youngest = holds & (search.prompt == jnp.max(jnp.where(holds, search.prompt, NO_PROMPT)))
    gives_up = jnp.where(several, youngest, search.is_oldest)
    ends = gives_up & ~several & search.last_try
    gone, cut = (search.of_rows(mask, len(state.rows.active)) for mask in (gives_up, ends))
    rows = dataclasses.replace(
        state.rows,
        active=state.rows.active & ~gone,
        finish=jnp.where(cut, jnp.int32(Finish.TOO_LONG), state.rows.finish),
    )
    scores = jnp.where((gives_up & ~ends)[:, None], NOTHING, search.scores)
    search = dataclasses.replace(search, scores=scores, last_try=search.last_try | ~several)
    return release(dataclasses.replace(state, rows=rows), gone), search
