"""Drafts: tokens that a row may draw next, guessed cheaply, and verified by the step that computes them.

Drafts stand in a row's token buffer after the tokens that it knows. A step computes them together with the row's last
known token, so it has the logits after each of them. Then the row draws its next token as it would without drafts. If
that is the drafted one, it draws another from the logits after the draft, and so on. The noise of a draw depends only
on seed, sample and position, so the tokens are the same as without drafts, at any temperature. If a row's drafts depend
on its tokens only, each is accepted with the probability that the decoder gives it, as in speculative sampling
(Leviathan et al. 2023, section 2.3). A draft model that draws with the row's own noise is the method of Daliri et al.
2024.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.decoding.rows import NO_TOKEN, DecodeState, Rows

MOST_DRAFTS = 7  # of a row in a step: with the token before them they fill a pass of short queries


class Drafts(NamedTuple):
    """What a `Drafter` proposes: tokens that may come next in each row; D is its `num_drafts`."""

    tokens: Int32[Array, "B D"]
    counts: Int32[Array, " B"]  # how many of them, from the first on; 0 where nothing is proposed


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens that a row may draw next. A frozen, hashable value, static under jit.

    Wrong proposals cost time and change nothing. What a drafter must remember is its state, a pytree, which is kept in
    `DecodeState.drafter`.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class SameAgain:
        ...     num_drafts: int = 2
        ...
        ...     def propose(self, state, rows, asks):  # the last token of each row, again and again
        ...         last = jnp.take_along_axis(rows.tokens, rows.num_known[:, None] - 1, axis=1)
        ...         return Drafts(jnp.tile(last, (1, self.num_drafts)), asks), state
        >>> isinstance(SameAgain(), Drafter)
        True
        >>> stepper = Stepper(forward, token_counts_for(2, num_drafts=2), drafter=SameAgain())
    """

    @property
    def num_drafts(self) -> int:
        """D, the most drafts of a row in a step."""
        ...

    def propose(self, state: Any, rows: Rows, asks: Int32[Array, " B"]) -> tuple[Drafts, Any]:
        """Drafts for the rows, from what they know; a pure function.

        Args:
            state: of the drafter.
            rows: of the batch.
            asks: the most drafts that each row can use now, often 0.

        Returns:
            The drafts, and the state, of the same structure, shapes and dtypes.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Drafts the continuation of an earlier occurrence of a row's last tokens (Yang et al. 2023, section 2).

    The occurrence is looked for in the row's hints, in the row itself, and in the sample of the same prompt and seed
    that has come farthest. The longest continuation counts; of those, the latest one.

    Args:
        num_drafts: D, from 1 to 7.
        num_matched: n, the last tokens of a row that must occur again.
        reads_siblings: whether to look in other rows. Turn it off where rows of different users run together: by the
            time that a step takes, one user could find out what another says.

    Raises:
        ValueError: `num_drafts` is not from 1 to 7, or `num_matched` is below 1.

    Examples:
        >>> rows = Rows.create(1, capacity=12, sampling=SamplingState.create(1))
        >>> tokens = jnp.array([[7, 1, 2, 3, 8, 9, 1, 2, 3, 0, 0, 0]])
        >>> rows = dataclasses.replace(rows, tokens=tokens, num_known=jnp.array([9]), active=jnp.array([True]))
        >>> drafts, _ = Lookup(num_drafts=3).propose(None, rows, asks=jnp.array([3]))
        >>> drafts.tokens.tolist(), drafts.counts.tolist()
        ([[8, 9, 1]], [3])
    """

    num_drafts: int = 4
    num_matched: int = 3
    reads_siblings: bool = True

    def __post_init__(self):
        if not 1 <= self.num_drafts <= MOST_DRAFTS:
            raise ValueError(f"num_drafts of the drafter must be from 1 to {MOST_DRAFTS}, got {self.num_drafts}")
        if self.num_matched < 1:
            raise ValueError(f"num_matched must be at least 1, got {self.num_matched}")

    def propose(self, state: Any, rows: Rows, asks: Int32[Array, " B"]) -> tuple[Drafts, Any]:
        row, n = jnp.arange(len(rows.active), dtype=jnp.int32), self.num_matched
        place = rows.num_known[:, None] - n + jnp.arange(n, dtype=jnp.int32)[None, :]
        last = rows.tokens.at[row[:, None], jnp.maximum(place, 0)].get(mode="clip")
        found = [
            self._continue(rows.hints, jnp.full_like(row, rows.hints.shape[1]), last),
            self._continue(rows.tokens, rows.num_known, last, repeats=True),
        ]
        if self.reads_siblings:
            found.append(self._continue(*_farthest_sibling(rows), last))
        best = found[0]
        for other in found[1:]:
            has_it = best.counts >= other.counts
            best = Drafts(
                jnp.where(has_it[:, None], best.tokens, other.tokens), jnp.where(has_it, best.counts, other.counts)
            )
        return best._replace(counts=jnp.where(rows.active & (rows.num_known >= n), best.counts, 0)), state

    def _continue(
        self, text: Int32[Array, "B W"], ends: Int32[Array, " B"], last: Int32[Array, "B n"], repeats: bool = False
    ) -> Drafts:
        """What follows the latest occurrence of `last` in the first `ends[b]` tokens of each text.

        Args:
            text: up to a `NO_TOKEN`, an occurrence can be continued.
            ends: tokens of each text.
            last: the tokens to look for.
            repeats: the text ends with `last`, and is taken to go on as it does after the occurrence before.
        """
        width, n = text.shape[1], self.num_matched
        num_places = width - n  # where an occurrence may start, with a token after it
        if num_places <= 0:
            return Drafts(jnp.zeros((len(text), self.num_drafts), jnp.int32), jnp.zeros(len(text), jnp.int32))
        occurs = jnp.ones((len(text), num_places), bool)
        for i in range(n):
            occurs &= text[:, i : num_places + i] == last[:, i : i + 1]
        place = jnp.arange(width, dtype=jnp.int32)[None, :]
        occurs &= place[:, n:] < ends[:, None]
        is_text = jnp.pad((place < ends[:, None]) & (text != NO_TOKEN), ((0, 0), (0, self.num_drafts)))
        length, goes_on = jnp.zeros(occurs.shape, jnp.int32), occurs
        for i in range(n, n + self.num_drafts):
            goes_on = goes_on if repeats else goes_on & is_text[:, i : num_places + i]
            length += goes_on.astype(jnp.int32)
        start = jnp.argmax(length * width + place[:, :num_places], axis=1).astype(jnp.int32)
        first = (start + n)[:, None]
        i = jnp.arange(self.num_drafts, dtype=jnp.int32)[None, :]
        at = first + (i % jnp.maximum(ends[:, None] - first, 1) if repeats else i)
        return Drafts(
            jnp.take_along_axis(text, jnp.clip(at, 0, width - 1), axis=1),
            jnp.take_along_axis(length, start[:, None], axis=1)[:, 0],
        )


def _farthest_sibling(rows: Rows) -> tuple[Int32[Array, "B C"], Int32[Array, " B"]]:
    """What the row of the same seed and prompt that has come farthest knows, and how many tokens; 0 where none has."""
    row, num_known = jnp.arange(len(rows.active), dtype=jnp.int32), jnp.where(rows.active, rows.num_known, 0)
    is_like = rows.sampling.seed[:, None] == rows.sampling.seed[None, :]
    is_like &= rows.num_prompt[:, None] == rows.num_prompt[None, :]
    sibling = jnp.argmax(jnp.where(is_like, num_known[None, :], -1), axis=1).astype(jnp.int32)
    tokens = rows.tokens[sibling]
    is_prompt = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < rows.num_prompt[:, None]
    has_prompt = jnp.all((tokens == rows.tokens) | ~is_prompt, axis=1)
    return tokens, jnp.where(has_prompt & (sibling != row), num_known[sibling], 0)


# ---- trust: how many drafts a row asks for -------------------------------------------------------------------------

RECOVERY = 1 / 64  # what trust regains in a step without drafts: a row that is always wrong tries once in 32 tokens


def update_trust(
    trust: Float[Array, " B"], proposed: Int32[Array, " B"], accepted: Int32[Array, " B"], num_drafts: int
) -> Float[Array, " B"]:
    """How many drafts each row asks for next: twice as many if all were right, else half, plus one for each right one.

    Args:
        trust: so far; a row asks for its integer part.
        proposed: drafts that the step verified.
        accepted: those of them that were drawn.
        num_drafts: the most that a row asks for.
    """
    accepts = accepted.astype(jnp.float32)
    next_trust = jnp.where(accepted == proposed, 2 * trust, accepts + trust / 2)
    next_trust = jnp.where(proposed > 0, next_trust, trust + jnp.where(trust < 1, RECOVERY, 0))
    return jnp.minimum(next_trust, num_drafts)


# ---- drafts in a step ----------------------------------------------------------------------------------------------


def add_drafts(
    drafter: Drafter, state: DecodeState, counts: Int32[Array, " B"], max_tokens: Int32[Array, ""]
) -> tuple[DecodeState, Int32[Array, " B"]]:
    """Let rows that decode also compute drafts, as far as a pass of `max_tokens` and the free pages go.

    Drafts never take pages from anybody: where they and what the rows compute anyway might not all fit, there are none.

    Returns:
        The state, with the drafts in the rows' token buffers, and how many tokens each row computes.
    """
    rows, tables = state.rows, state.cache.tables
    decodes = (counts == 1) & (state.behind == 1)
    asks = jnp.where(decodes, jnp.floor(rows.trust).astype(jnp.int32), 0)
    most = jnp.minimum(rows.limit - rows.num_known - 1, tables.max_length - tables.lengths - 1)
    asks = jnp.maximum(jnp.minimum(asks, most), 0)  # rows that rest may have room for less than nothing

    def propose(state: DecodeState) -> tuple[DecodeState, Array]:
        drafts, kept = drafter.propose(state.drafter, rows, asks)
        wanted = _divide(jnp.clip(drafts.counts, 0, asks), max_tokens - jnp.sum(counts, dtype=jnp.int32))
        wanted = jnp.where(_fit(state, counts + wanted), wanted, 0)
        i = jnp.arange(drafts.tokens.shape[1], dtype=jnp.int32)[None, :]
        place = jnp.where(i < wanted[:, None], rows.num_known[:, None] + i, rows.tokens.shape[1] + i)
        row = jnp.arange(len(wanted), dtype=jnp.int32)[:, None]
        tokens = rows.tokens.at[row, place].set(drafts.tokens, mode="drop", unique_indices=True)
        rows_now = dataclasses.replace(rows, tokens=tokens)
        return dataclasses.replace(state, rows=rows_now, drafter=kept), counts + wanted

    return lax.cond(jnp.any(asks > 0) & (max_tokens > 0), propose, lambda state: (state, counts), state)


def _divide(wanted: Int32[Array, " B"], room: Int32[Array, ""]) -> Int32[Array, " B"]:
    """An equal share for each row that wants some, at most what it wants; what is left over by the order of rows."""
    num_wanting = jnp.sum(wanted > 0, dtype=jnp.int32)
    share = jnp.minimum(wanted, jnp.maximum(room, 0) // jnp.maximum(num_wanting, 1))
    more = wanted - share
    left = room - jnp.sum(share, dtype=jnp.int32) - (jnp.cumsum(more, dtype=jnp.int32) - more)
    return share + jnp.clip(left, 0, more)


def _fit(state: DecodeState, counts: Int32[Array, " B"]) -> Bool[Array, ""]:
    """Whether the free pages hold this many new tokens of each row, with a copy of each row's last page."""
    fits = jnp.bool_(True)
    for table in state.cache.tables.groups:
        size = table.page_size
        new = -(-(table.lengths + counts) // size) - -(-table.lengths // size)
        copies = (counts > 0) & (table.lengths % size > 0)
        fits &= jnp.sum(new + copies.astype(jnp.int32), dtype=jnp.int32) <= table.num_free
    return fits


def settle_drafts(state: DecodeState, num_drawn: Int32[Array, " B"], num_drafts: int) -> DecodeState:
    """Cut rows that drew back to what they know, less the token that they drew last; and see how good drafts were.

    Args:
        state: after the rows have learnt what they drew.
        num_drawn: tokens that each row drew in the step.
        num_drafts: D.
    """
    rows, tables, counters = state.rows, state.cache.tables, state.counters
    drew = num_drawn > 0
    accepted = jnp.maximum(num_drawn - 1, 0)
    proposed = jnp.where(drew, jnp.maximum(tables.lengths - (rows.num_known - num_drawn), 0), 0)
    kept = jnp.where(drew, jnp.minimum(tables.lengths, rows.num_known - 1), tables.lengths)
    tables = lax.cond(jnp.any(kept < tables.lengths), lambda t: t.truncate(kept), lambda t: t, tables)
    trust = jnp.where(drew, update_trust(rows.trust, proposed, accepted, num_drafts), rows.trust)
    counters = counters._replace(
        drawn_tokens=counters.drawn_tokens + jnp.sum(accepted, dtype=jnp.int32),
        drafted_tokens=counters.drafted_tokens + jnp.sum(proposed, dtype=jnp.int32),
        accepted_tokens=counters.accepted_tokens + jnp.sum(accepted, dtype=jnp.int32),
    )
    return state.with_tables(tables, rows=dataclasses.replace(rows, trust=trust), counters=counters)
