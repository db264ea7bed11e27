"""Which tokens a beam search goes on with, and which sequences it has finished.

Everything here is about U groups of up to W beams each, one group for each prompt. Nothing here knows of pages. The
rules are those of transformers, so that both find the same sequences in the same order.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from paged_jax.decoding.rows import Rows
from paged_jax.decoding.step import Logits
from paged_jax.decoding.stepper import Stepper
from paged_jax.sampling import processors

NOTHING = -jnp.inf  # the score of a beam or of a sequence that is not there


class Candidates(NamedTuple):
    """The likeliest next tokens of each row, the likeliest first."""

    tokens: Int32[Array, "B Z"]
    logprobs: Float32[Array, "B Z"]  # -inf: not allowed


class Choice(NamedTuple):
    """The Y best continuations of all beams of a group, the best first."""

    parents: Int32[Array, "U Y"]  # the beam that each continues
    tokens: Int32[Array, "U Y"]
    logprobs: Float32[Array, "U Y"]  # of these tokens
    totals: Float32[Array, "U Y"]  # of all tokens of the sequence; -inf where there are no more
    stops: Bool[Array, "U Y"]  # it is a stop token
    ends: Bool[Array, "U Y"]  # it is one, or the last that there is room for

    def take(self, index: Int32[Array, "U W"]) -> "Choice":
        """Some of them; those out of range have the total -inf, parent 0 and token 0."""
        group = jnp.arange(len(index), dtype=jnp.int32)[:, None]
        taken = jax.tree.map(lambda x: x.at[group, index].get(mode="fill", fill_value=0), self)
        return taken._replace(totals=self.totals.at[group, index].get(mode="fill", fill_value=NOTHING))


class Hypotheses(NamedTuple):
    """The W best finished sequences of each group, the best first, without their prompt."""

    tokens: Int32[Array, "U W X"]
    logprobs: Float32[Array, "U W X"]
    lengths: Int32[Array, "U W"]
    scores: Float32[Array, "U W"]  # -inf where there are fewer
    stopped: Bool[Array, "U W"]  # the last token is a stop token

    @classmethod
    def create(cls, num_groups: int, width: int, max_new_tokens: int) -> "Hypotheses":
        """None yet."""
        each = num_groups, width
        return cls(
            tokens=jnp.zeros((*each, max_new_tokens), jnp.int32),
            logprobs=jnp.zeros((*each, max_new_tokens), jnp.float32),
            lengths=jnp.zeros(each, jnp.int32),
            scores=jnp.full(each, NOTHING, jnp.float32),
            stopped=jnp.zeros(each, bool),
        )

    def merge(self, others: "Hypotheses", widths: Int32[Array, " U"]) -> "Hypotheses":
        """The `widths[u]` best of both; of equal ones these come first."""
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, others)
        scores, best = lax.top_k(both.scores, self.scores.shape[1])
        merged = jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, best), both)
        is_within = jnp.arange(self.scores.shape[1], dtype=jnp.int32)[None, :] < widths[:, None]
        return merged._replace(scores=jnp.where(is_within, scores, NOTHING))

    def are_full(self, widths: Int32[Array, " U"]) -> Bool[Array, " U"]:
        """Whether a group has as many as it has beams."""
        return jnp.sum(self.scores > NOTHING, axis=1, dtype=jnp.int32) >= widths


class Stopping(enum.IntEnum):
    """When a search is over that has as many finished sequences as beams; `early_stopping` of transformers."""

    LATE = 0  # False: when the best running beam, were it finished now, is no better than the worst of them
    EARLY = 1  # True: at once
    NEVER = 2  # "never": as False, but the beam is scored as if it had the greatest length, if the penalty is above 0

    @classmethod
    def of(cls, early_stopping: bool | str) -> "Stopping":
        """From the names of transformers; raises ValueError for any other."""
        if not isinstance(early_stopping, bool) and early_stopping != "never":
            raise ValueError(f'early_stopping={early_stopping!r} must be True, False or "never"')
        return cls.NEVER if early_stopping == "never" else cls(int(early_stopping))


class Rules(NamedTuple):
    """How the sequences of each group compare, and when its search is over."""

    length_penalty: Float32[Array, " U"]
    stopping: Int32[Array, " U"]  # of Stopping

    @classmethod
    def of(
        cls,
        num_groups: int,
        length_penalty: float | Float[Array, ""] | Float[Array, " U"] = 1.0,
        early_stopping: bool | str | Sequence[bool | str] = False,
    ) -> "Rules":
        """Rules of all groups, or of each; raises ValueError for others than there are."""
        if isinstance(early_stopping, bool | str):
            stopping = jnp.int32(Stopping.of(early_stopping))
        else:
            stopping = jnp.array([Stopping.of(one) for one in early_stopping], jnp.int32)
        given = {"length_penalty": jnp.asarray(length_penalty, jnp.float32), "early_stopping": stopping}
        for name, values in given.items():
            if values.shape not in ((), (num_groups,)):
                raise ValueError(f"{name} has {values.shape} values: give one, or one for each of {num_groups} prompts")
        return cls(*(jnp.broadcast_to(values, num_groups) for values in given.values()))

    def score(self, totals: Float[Array, "U n"], lengths: Int32[Array, "U n"]) -> Float[Array, "U n"]:
        """What sequences of these log-probabilities and lengths are worth: totals / lengths ** length_penalty."""
        return totals / lengths.astype(jnp.float32) ** self.length_penalty[:, None]

    def are_over(
        self,
        finished: Hypotheses,
        widths: Int32[Array, " U"],
        best: Float32[Array, " U"],
        lengths: Int32[Array, " U"],
        limits: Int32[Array, " U"],
    ) -> Bool[Array, " U"]:
        """Whether the searches of some groups are over.

        Args:
            finished: sequences.
            widths: beams of each group.
            best: the log-probability of the best running beam; -inf where none is left.
            lengths: new tokens of the running beams.
            limits: the most new tokens.
        """
        hoped = jnp.where((self.stopping == Stopping.NEVER) & (self.length_penalty > 0), limits, lengths)
        hope = self.score(best[:, None], hoped[:, None])[:, 0]
        worst = jnp.take_along_axis(finished.scores, widths[:, None] - 1, axis=1)[:, 0]
        is_enough = (self.stopping == Stopping.EARLY) | (hope <= worst)
        return (lengths >= limits) | (best == NOTHING) | (finished.are_full(widths) & is_enough)


def find_candidates(num: int):
    """A `Choose` that finds the `num` likeliest next tokens of each row, or as many as there are tokens.

    The stepper's processor is given log-probabilities, not logits, and they are not normalised again: so the scores
    stay those of the model, whatever is forbidden. Its state is advanced later, with the tokens that were chosen.
    """

    def choose(stepper: Stepper, logits: Logits, rows: Rows, draws: Bool[Array, " R"]) -> Candidates:
        values = logits.after(0)
        logprobs = processors.log_probabilities(values.astype(jnp.float32))
        if stepper.processor is not None:
            state = rows.sampling.processor
            logprobs = processors.apply(stepper.processor, state, logprobs, rows.tokens, rows.num_known)
        logprobs, tokens = lax.top_k(logprobs, min(num, values.shape[1]))
        return Candidates(tokens.astype(jnp.int32), logprobs)

    return choose


def rank(
    found: Candidates, scores: Float32[Array, "U W"], stop_tokens: Int32[Array, "U x"], is_last: Bool[Array, " U"]
) -> Choice:
    """The best continuations of each group: enough that, whichever of them end, one is left for every beam.

    Args:
        found: of the U * W rows.
        scores: the log-probability of each running beam; -inf where there is none.
        stop_tokens: that end a sequence; -1 where unused.
        is_last: groups whose sequences end with this token, whatever it is.
    """
    (num_groups, width), per_row = scores.shape, found.tokens.shape[1]
    of_group = jax.tree.map(lambda x: x.reshape(num_groups, width * per_row), found)
    totals = (scores[:, :, None] + found.logprobs.reshape(num_groups, width, per_row)).reshape(num_groups, -1)
    num = min(num_candidates(width, stop_tokens.shape[1]), totals.shape[1])
    totals, index = lax.top_k(totals, num)
    tokens, logprobs = (jnp.take_along_axis(x, index, axis=1) for x in of_group)
    stops = jnp.any(tokens[:, :, None] == stop_tokens[:, None, :], axis=2)
    return Choice((index // per_row).astype(jnp.int32), tokens, logprobs, totals, stops, stops | is_last[:, None])


def num_candidates(width: int, num_stop_tokens: int) -> int:
    """Continuations among which there are `width` that do not end: a beam has one for each stop token that does."""
    return width * (1 + num_stop_tokens)


def go_on(choice: Choice, width: int, widths: Int32[Array, " U"]) -> Choice:
    """The W best continuations of each group that do not end, its beams of the next step; only the first `widths`."""
    goes_on = ~choice.ends & (choice.totals > NOTHING)
    place = jnp.cumsum(goes_on, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(goes_on & (place < widths[:, None]), place, width)
    num_groups, num = choice.tokens.shape
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    index = jnp.full((num_groups, width), num, jnp.int32)
    each = jnp.broadcast_to(jnp.arange(num, dtype=jnp.int32), (num_groups, num))
    return choice.take(index.at[group, place].set(each, mode="drop"))


def finish(
    choice: Choice,
    tokens: Int32[Array, "U W X"],
    logprobs: Float32[Array, "U W X"],
    num_drawn: Int32[Array, " U"],
    widths: Int32[Array, " U"],
    rules: Rules,
) -> Hypotheses:
    """The continuations that end, of the first `widths` ones of each group; the others are there for beams to go on.

    Args:
        choice: the continuations.
        tokens: that the running beams have drawn so far.
        logprobs: of these tokens.
        num_drawn: how many they will be with the next one.
        widths: beams of each group.
        rules: of scores.
    """
    (num_groups, num), most = choice.tokens.shape, tokens.shape[2]
    place = jnp.arange(num, dtype=jnp.int32)[None, :]
    ends = choice.ends & (choice.totals > NOTHING) & (place < widths[:, None])
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    at, last = jnp.arange(most, dtype=jnp.int32)[None, None, :], (num_drawn - 1)[:, None, None]

    def extend(drawn: Array, new: Array) -> Array:
        return jnp.where(at < last, drawn[group, choice.parents], jnp.where(at == last, new[:, :, None], 0))

    lengths = jnp.broadcast_to(num_drawn[:, None], ends.shape)
    return Hypotheses(
        tokens=extend(tokens, choice.tokens),
        logprobs=extend(logprobs, choice.logprobs),
        lengths=lengths,
        scores=jnp.where(ends, rules.score(choice.totals, lengths), NOTHING),
        stopped=choice.stops,
    )
