"""Beam search: the likeliest continuations of many prompts, in one XLA program.

The beams of a prompt are W rows of the batch, a group (`paged_jax.decoding.groups`). Only the first of them computes
the prompt; then its beams share all pages of the tokens that they have in common (`paged_jax.decoding.beam_step`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from paged_jax.cache.kv_cache import KVCache
from paged_jax.decoding.beam_step import step_with
from paged_jax.decoding.groups import Groups, Queue, Search, admit, collect, groups_of, make_room
from paged_jax.decoding.hypotheses import Rules
from paged_jax.decoding.room import reserve
from paged_jax.decoding.rows import Counters, DecodeState, Rows, prompt_arrays
from paged_jax.decoding.stepper import Stepper
from paged_jax.sampling import SamplingState


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
    prompts: Int32[Array | np.ndarray, "Q C"],
    prompt_lens: Int32[Array | np.ndarray, " Q"],
    cache: KVCache,
    *,
    width: int,
    max_new_tokens: int,
    num_return: int | None = None,
    length_penalty: float | Float[Array, ""] | Float[Array, " Q"] = 1.0,
    early_stopping: bool | str | Sequence[bool | str] = False,
    stop_tokens: Sequence[int] | Int32[Array, " x"] = (),
    widths: Int32[Array, " Q"] | Sequence[int] | np.ndarray | None = None,
    limits: Int32[Array, " Q"] | Sequence[int] | np.ndarray | None = None,
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
        length_penalty: the score of a sequence is its log-probability / length ** length_penalty; of all prompts, or
            of each.
        early_stopping: when the search for a prompt is over that has as many finished sequences as beams, as in
            transformers: True: at once; False: when the best running beam, were it finished now, is no better than the
            worst of them; "never": as False, but the beam is scored as if it had the greatest length, if the penalty is
            above 0. Of all prompts, or of each; static.
        stop_tokens: that end a sequence; in an array, which may be traced, -1 where unused.
        widths: beams of each prompt, 1 to W; None: W for all. Those of a JAX array, which may be traced, are clipped.
        limits: the most tokens of each prompt's sequences, 1 to X; None: X for all. Likewise.
        processor_state: of Q prompts, for the stepper's processor.

    Returns:
        The sequences, and the cache, with all rows empty.

    Raises:
        ValueError: at trace time, for sizes that do not fit together. A prompt that does not fit in a row, or whose
            beams alone need more pages than there are, ends with `Finish.TOO_LONG` for all of its sequences, which are
            those that it had finished.

    Examples:
        The counting decoder of `Forward`'s example is all but sure that 3 follows 2:

        >>> @functools.partial(jax.jit, donate_argnums=1)
        ... def search(params, cache, prompts, prompt_lens):
        ...     stepper = Stepper(forward, token_counts=(8,))
        ...     return beam_search(stepper, params, prompts, prompt_lens, cache, width=2, max_new_tokens=3)
        >>> found, cache = search(params, KVCache.create(config), jnp.array([[1, 2]]), jnp.array([2]))
        >>> found.tokens[0, 0].tolist(), found.scores[0].round(2).tolist()
        ([3, 4, 5], [-0.0, -3.0])
    """
    prompts, prompt_lens = prompt_arrays(prompts, prompt_lens)
    num_prompts, longest = prompts.shape
    num_return = width if num_return is None else num_return
    num_rows = cache.tables.num_rows
    wrong = {x.shape for x in jax.tree.leaves(processor_state) if x.shape[:1] != (num_prompts,)}
    if wrong:
        raise ValueError(
            f"processor_state has an array of shape {wrong.pop()}: its first axis must be the {num_prompts} prompts"
        )
    _check_sizes(stepper, num_rows, width, max_new_tokens, num_return, num_prompts)
    queue = Queue(
        prompts=prompts,
        prompt_lens=prompt_lens,
        limits=_within(limits, num_prompts, max_new_tokens, "limits"),
        widths=_within(widths, num_prompts, width, "widths"),
        rules=Rules.of(num_prompts, length_penalty, early_stopping),
        processor=processor_state,
    )
    groups = Groups.create(min(num_rows // width, num_prompts), width, max_new_tokens)
    state = _idle_state(stepper, cache, groups, longest + max_new_tokens, stop_tokens, processor_state)
    carry = state, Search.create(num_prompts, width, max_new_tokens), cache.tables.num_free

    def unfinished(carry: tuple[DecodeState, Search, Array]) -> Array:
        state, search, _ = carry
        return (search.next < num_prompts) | jnp.any(groups_of(state).are_taken)

    def body(carry: tuple[DecodeState, Search, Array]) -> tuple[DecodeState, Search, Array]:
        state, search, least_free = carry
        state, search = admit(state, search, queue)
        state, counts = reserve(state, stepper.plan(state, stepper.token_counts[-1]))
        least_free = jnp.minimum(least_free, state.cache.tables.num_free)
        before = state.counters.computed_tokens
        state, _ = step_with(stepper, params, state, counts, others_draw=False)
        is_stuck = (state.counters.computed_tokens == before) & ~jnp.any(groups_of(state).have_ended(state.rows))
        state, search = lax.cond(is_stuck, make_room, lambda *both: both, state, search)
        state, search = collect(state, search)
        return state.settle(), search, least_free

    state, search, least_free = lax.while_loop(unfinished, body, carry)
    found = search.sequences
    beams = Beams(
        tokens=found.tokens[:, :num_return],
        logprobs=found.logprobs[:, :num_return],
        lengths=found.lengths[:, :num_return],
        scores=found.scores[:, :num_return],
        finish=search.finish[:, :num_return],
        peak_pages=cache.tables.num_free - least_free,
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
    if values is None:
        return jnp.full(num_prompts, most, jnp.int32)
    if isinstance(values, Sequence):
        values = np.asarray(values)
    if jnp.shape(values) != (num_prompts,) or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} of {values.dtype}{list(jnp.shape(values))}: give a whole number for each prompt")
    if isinstance(values, np.ndarray) and np.any((values < 1) | (values > most)):
        raise ValueError(f"{name}={values.tolist()} must be from 1 to {most}")
    return jnp.clip(values, 1, most).astype(jnp.int32)


def _idle_state(
    stepper: Stepper,
    cache: KVCache,
    groups: Groups,
    capacity: int,
    stop_tokens: Sequence[int] | Array,
    processor_state: Any,
) -> DecodeState:
    """A batch of empty rows."""
    num_rows = cache.tables.num_rows
    stops = jnp.asarray(stop_tokens, jnp.int32).reshape(1, -1)
    sampling = dataclasses.replace(
        SamplingState.create(num_rows, max_stop_tokens=0),
        stop_tokens=jnp.broadcast_to(stops, (num_rows, stops.shape[1])),
        processor=jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (num_rows, *x.shape[1:])), processor_state),
    )
    rows, counters = Rows.create(num_rows, capacity, sampling), Counters.create(len(stepper.token_counts))
    return DecodeState(cache, rows, counters, groups=groups)
