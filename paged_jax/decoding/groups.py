"""Groups of rows that hold the beams of a prompt: how they begin, end and make room for each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.decoding.hypotheses import NOTHING, Hypotheses, Rules
from paged_jax.decoding.plan import YOUNGEST
from paged_jax.decoding.rows import DecodeState, Finish, Rows
from paged_jax.decoding.step import release, start

NO_PROMPT = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """U groups of W rows; group u has the rows u * W to u * W + W - 1.

    A group without a prompt is free. Its rows draw for themselves, and so do the rows past the last group.
    """

    prompt: Int32[Array, " U"]  # the number of each group's prompt, the lowest came first; NO_PROMPT: it is free
    widths: Int32[Array, " U"]  # beams of each
    rules: Rules  # of each
    scores: Float[Array, "U W"]  # log-probabilities of the running beams, the best first; -inf where there is none
    finished: Hypotheses

    @classmethod
    def create(cls, num_groups: int, width: int, max_new_tokens: int) -> "Groups":
        """Groups without a prompt.

        Args:
            num_groups: U.
            width: W, the most beams of a group.
            max_new_tokens: the most tokens of a sequence.
        """
        return cls(
            prompt=jnp.full(num_groups, NO_PROMPT, jnp.int32),
            widths=jnp.ones(num_groups, jnp.int32),
            rules=Rules.of(num_groups),
            scores=jnp.full((num_groups, width), NOTHING, jnp.float32),
            finished=Hypotheses.create(num_groups, width, max_new_tokens),
        )

    @property
    def width(self) -> int:
        """W."""
        return self.scores.shape[1]

    @property
    def are_taken(self) -> Bool[Array, " U"]:
        """Groups that have a prompt."""
        return self.prompt != NO_PROMPT

    @property
    def are_oldest(self) -> Bool[Array, " U"]:
        """The group whose prompt came first."""
        return self.are_taken & (self.prompt == jnp.min(jnp.where(self.are_taken, self.prompt, YOUNGEST)))

    def have_ended(self, rows: Rows) -> Bool[Array, " U"]:
        """Groups whose rows have all ended, other than those that begin again."""
        is_active = jnp.any(self.to_groups(rows.active), axis=1)
        return self.are_taken & ~is_active & (self.scores[:, 0] > NOTHING)

    def to_rows(self, per_group: Array, num_rows: int) -> Array:
        """From groups to their rows; zeros for the rows past the last group."""
        return jnp.pad(jnp.repeat(per_group, self.width, axis=0), (0, num_rows - len(per_group) * self.width))

    def to_groups(self, per_row: Array) -> Array:
        """From rows to groups, [U, W, ...]."""
        return per_row[: self.scores.size].reshape(*self.scores.shape, *per_row.shape[1:])

    def begin(
        self, begins: Bool[Array, " U"], prompt: Int32[Array, " U"], widths: Int32[Array, " U"], rules: Rules
    ) -> "Groups":
        """Some groups begin, with their prompt as the only beam, and nothing finished."""
        first = jnp.where(jnp.arange(self.width) == 0, 0.0, NOTHING).astype(jnp.float32)
        first = jnp.broadcast_to(first, self.scores.shape)
        new = Groups(prompt, widths, rules, first, Hypotheses.create(*self.finished.tokens.shape))
        return jax.tree.map(lambda new, old: where(begins, new, old), new, self)

    def free(self, rows: Bool[Array, " B"]) -> "Groups":
        """The groups of these rows are free."""
        return dataclasses.replace(
            self, prompt=jnp.where(jnp.any(self.to_groups(rows), axis=1), NO_PROMPT, self.prompt)
        )


def groups_of(state: DecodeState) -> Groups:
    """The groups of a batch that has some."""
    assert isinstance(state.groups, Groups), "the batch was made with groups"
    return state.groups


def where(mask: Array, new: Array, old: Array) -> Array:
    """`new` where a mask over the first axes holds, `old` elsewhere."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim)), new, old)


# ---- a queue of prompts --------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """The prompts of a search, and what is asked of each."""

    prompts: Int32[Array, "Q C"]
    prompt_lens: Int32[Array, " Q"]
    limits: Int32[Array, " Q"]
    widths: Int32[Array, " Q"]
    rules: Rules
    processor: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """How far a queue is."""

    next: Int32[Array, ""]  # the next prompt that gets a group
    last_try: Bool[Array, ""]  # the oldest group has begun again for lack of pages: the next time it ends
    sequences: Hypotheses  # of prompts that have ended
    finish: Int32[Array, "Q W"]  # of Finish, of each

    @classmethod
    def create(cls, num_prompts: int, width: int, max_new_tokens: int) -> "Search":
        """Before the first prompt."""
        sequences = Hypotheses.create(num_prompts, width, max_new_tokens)
        return cls(jnp.int32(0), jnp.bool_(False), sequences, jnp.zeros((num_prompts, width), jnp.int32))


def admit(state: DecodeState, search: Search, queue: Queue) -> tuple[DecodeState, Search]:
    """Free groups take the next prompts; a group that gave up its pages begins again."""
    groups = groups_of(state)
    candidate = search.next + jnp.cumsum(~groups.are_taken, dtype=jnp.int32) - 1
    takes = ~groups.are_taken & (candidate < len(queue.prompt_lens))
    begins = takes | (groups.are_taken & (groups.scores[:, 0] == NOTHING))
    prompt = jnp.where(takes, candidate, groups.prompt)
    search = dataclasses.replace(search, next=search.next + jnp.sum(takes, dtype=jnp.int32))
    return lax.cond(jnp.any(begins), lambda: _begin(state, queue, begins, prompt), lambda: state), search


def _begin(state: DecodeState, queue: Queue, begins: Bool[Array, " U"], prompt: Int32[Array, " U"]) -> DecodeState:
    """Some groups begin: the first row of each computes the prompt, as its only beam."""
    groups, num_rows, longest = groups_of(state), len(state.rows.active), queue.prompts.shape[1]
    beam = jnp.arange(num_rows, dtype=jnp.int32) % groups.width
    each = jnp.maximum(prompt, 0)
    mine = groups.to_rows(each, num_rows)
    num_prompt = queue.prompt_lens[mine]
    fits = (num_prompt >= 1) & (num_prompt <= longest)
    rows = dataclasses.replace(
        state.rows,
        tokens=state.rows.tokens.at[:, :longest].set(queue.prompts[mine]),
        num_prompt=jnp.where(fits, num_prompt, state.longest_row + 1),  # so that `start` refuses it
        num_known=num_prompt,
        limit=num_prompt + queue.limits[mine],
        age=mine * groups.width + beam,
        active=beam == 0,
        finish=jnp.zeros(num_rows, jnp.int32),
        sampling=dataclasses.replace(state.rows.sampling, processor=jax.tree.map(lambda x: x[mine], queue.processor)),
    )
    state = start(state, groups.to_rows(begins, num_rows), rows)
    rules = jax.tree.map(lambda x: x[each], queue.rules)
    return dataclasses.replace(state, groups=groups.begin(begins, prompt, queue.widths[each], rules))


def collect(state: DecodeState, search: Search) -> tuple[DecodeState, Search]:
    """Groups that have ended hand out their sequences, and are free."""
    groups = groups_of(state)
    ended = groups.have_ended(state.rows)

    def hand_out(search: Search) -> Search:
        place = jnp.where(ended, groups.prompt, len(search.finish))
        is_there = groups.finished.scores > NOTHING
        none = Hypotheses.create(*groups.finished.tokens.shape)
        finished = jax.tree.map(lambda x, y: where(is_there, x, y), groups.finished, none)
        why = jnp.where(finished.stopped, jnp.int32(Finish.STOP_TOKEN), jnp.int32(Finish.MAX_TOKENS))
        why = jnp.where(is_there, why, jnp.int32(Finish.UNFINISHED))
        was_cut = groups.to_groups(state.rows.finish)[:, :1] == Finish.TOO_LONG
        why = jnp.where(was_cut, jnp.int32(Finish.TOO_LONG), why)
        return dataclasses.replace(
            search,
            last_try=search.last_try & ~jnp.any(ended & groups.are_oldest),
            sequences=jax.tree.map(lambda all, x: all.at[place].set(x, mode="drop"), search.sequences, finished),
            finish=search.finish.at[place].set(why, mode="drop"),
        )

    search = lax.cond(jnp.any(ended), hand_out, lambda search: search, search)
    groups = dataclasses.replace(groups, prompt=jnp.where(ended, NO_PROMPT, groups.prompt))
    return dataclasses.replace(state, groups=groups), search


def make_room(state: DecodeState, search: Search) -> tuple[DecodeState, Search]:
    """Free pages where no row can go on.

    If several groups hold pages, the youngest of these gives them up, and begins again later. Otherwise the oldest
    group begins again: its rows may have given up pages to older groups, and compute them again each for itself; from
    the prompt on they share them. If it cannot go on even then, its beams need more pages than there are, and it ends.
    """
    groups, num_rows = groups_of(state), len(state.rows.active)
    holds = jnp.any(groups.to_groups(state.cache.tables.lengths) > 0, axis=1)
    several = jnp.sum(holds, dtype=jnp.int32) > 1
    youngest = holds & (groups.prompt == jnp.max(jnp.where(holds, groups.prompt, NO_PROMPT)))
    gives_up = jnp.where(several, youngest, groups.are_oldest)
    ends = gives_up & ~several & search.last_try
    gone, cut = (groups.to_rows(mask, num_rows) for mask in (gives_up, ends))
    rows = dataclasses.replace(
        state.rows,
        active=state.rows.active & ~gone,
        finish=jnp.where(cut, jnp.int32(Finish.TOO_LONG), state.rows.finish),
    )
    scores = jnp.where((gives_up & ~ends)[:, None], NOTHING, groups.scores)
    search = dataclasses.replace(search, last_try=search.last_try | ~several)
    state = dataclasses.replace(state, rows=rows, groups=dataclasses.replace(groups, scores=scores))
    return release(state, gone), search
