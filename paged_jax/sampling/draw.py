"""The next token of each row, with its log-probability."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Float32, Int32

from paged_jax.sampling import processors
from paged_jax.sampling.processors import Processor
from paged_jax.sampling.state import SamplingState
from pallas_kernels.platform import target_platform


class Draw(NamedTuple):
    """What `draw` returns for R rows; n is the number of most likely tokens that were asked for, often 0."""

    tokens: Int32[Array, " R"]
    logprobs: Float32[Array, " R"] | None  # of the drawn token; None where none were asked for
    top_tokens: Int32[Array, "R n"]  # the most likely tokens, in their order; of equal ones the lower id first
    top_logprobs: Float32[Array, "R n"]
    processor: Any  # the state of the user's processor after the draw


def draw(
    logits: Float[Array, "R V"],
    state: SamplingState,
    tokens: Int32[Array, "R C"],
    num_prompt: Int32[Array, " R"],
    num_known: Int32[Array, " R"],
    *,
    active: Bool[Array, " R"] | None = None,
    processor: Processor | None = None,
    num_logprobs: int | None = None,
    processed_logprobs: bool = False,
) -> Draw:
    """Draw the next token of each row.

    What acts on the logits, in this order, which is that of vLLM and transformers:

        1. the user's processor
        2. logit_bias and forbidden_tokens; min_new_tokens, which forbids the stop tokens
        3. repetition_penalty, frequency_penalty, presence_penalty
        4. temperature, top_k, top_p, min_p: where the temperature is not 0

    Then a row with temperature 0 takes the greatest logit, and of equal ones the lowest id; any other row draws from
    the softmax. Tokens that tie at the edge of top-k or top-p are all kept. Where no token may be drawn, token 0 is.

    A draw depends on the row's logits, parameters, seed, sample number and position (`num_known`), never on its
    neighbours: a sequence that was preempted, moved to another row or run alone draws the same tokens. The noise of
    token v < h = ceil(V / 2) is the first word of the hash threefry2x32 (Salmon et al. 2011) of key (seed, sample) and
    counter (position, v), that of token v + h the second, whatever generator JAX is configured to use.

    A feature that no active row uses costs only the test for it. For a batch of plain greedy rows, a draw is an argmax.

    Args:
        logits: of the next token.
        state: of these rows.
        tokens: all tokens that each row knows, its prompt first.
        num_prompt: tokens of the prompt.
        num_known: tokens of the prompt and drawn ones; the drawn token will stand at this position.
        active: rows that draw, None for all. The others get a token without a meaning; their processor's state stays.
        processor: rules of the user's own, whose state is `state.processor`; static.
        num_logprobs: None computes no log-probabilities, 0 those of the drawn tokens, n > 0 also those of the n most
            likely tokens; static.
        processed_logprobs: log-probabilities after all of the above instead of the model's own; static. Those of a
            greedy row are taken after step 3. A token that cannot be drawn has -inf.

    Returns:
        The tokens, their log-probabilities, the most likely tokens, and the new state of the processor.

    Raises:
        ValueError: sizes do not fit, or the processor returned another shape or dtype than it was given.

    Examples:
        >>> state = SamplingState.of([None, (SamplingParams(temperature=1.0, top_k=2), 0)])
        >>> logits = jnp.array([[0.0, 2.0, 1.0], [2.0, 1.9, -9.0]])
        >>> known, length = jnp.zeros((2, 4), jnp.int32), jnp.zeros(2, jnp.int32)
        >>> drawn = draw(logits, state, known, length, length, num_logprobs=0)
        >>> drawn.tokens[0].item(), round(drawn.logprobs[0].item(), 2)  # greedy: e^2 / (1 + e^2 + e) is e^-0.41
        (1, -0.41)
    """
    _check(logits, state, num_logprobs)
    active = jnp.ones(len(logits), bool) if active is None else active
    plain = logits.astype(jnp.float32)
    allowed = plain if processor is None else processors.apply(processor, state.processor, plain, tokens, num_known)
    sampled = active & (state.temperature > 0)
    biased = active & _uses_bias(state, num_known - num_prompt)
    penalised = active & _uses_penalties(state)

    def choose(final: Array, noise: Array | float = 0.0):
        drawn = jnp.argmax(final + noise, axis=1).astype(jnp.int32)
        return drawn, final if processed_logprobs else None

    def choose_greedily():
        return choose(allowed)

    def choose_with_features():
        changed = _bias(allowed, state, num_known - num_prompt, jnp.any(biased))
        changed = lax.cond(
            jnp.any(penalised),
            lambda: processors.penalties(
                changed,
                state.repetition_penalty,
                state.presence_penalty,
                state.frequency_penalty,
                tokens,
                num_prompt,
                num_known,
            ),
            lambda: changed,
        )

        def choose_randomly():
            final = jnp.where(sampled[:, None], _restrict(changed, state, sampled), changed)
            noise = _gumbel(state.seed, state.sample, num_known, logits.shape[1])
            return choose(final, jnp.where(sampled[:, None], noise, 0.0))

        return lax.cond(jnp.any(sampled), choose_randomly, lambda: choose(changed))

    drawn, final = lax.cond(jnp.any(sampled | biased | penalised), choose_with_features, choose_greedily)
    measured = plain if final is None else final
    logprobs, top_tokens, top_logprobs = _measure(measured, drawn, num_logprobs)
    advanced = state.processor if processor is None else processors.advance(processor, state.processor, drawn, active)
    return Draw(drawn, logprobs, top_tokens, top_logprobs, advanced)


# ---- which rows use what, and doing it ---------------------------------------------------------------------------


def _uses_bias(state: SamplingState, num_drawn: Int32[Array, " R"]) -> Bool[Array, " R"]:
    withholds = (num_drawn < state.min_new_tokens) & jnp.any(state.stop_tokens >= 0, axis=1)
    return withholds | jnp.any(state.bias_tokens >= 0, axis=1)


def _uses_penalties(state: SamplingState) -> Bool[Array, " R"]:
    return (state.repetition_penalty != 1) | (state.presence_penalty != 0) | (state.frequency_penalty != 0)


def _bias(
    logits: Float32[Array, "R V"], state: SamplingState, num_drawn: Int32[Array, " R"], used: Bool[Array, ""]
) -> Float32[Array, "R V"]:
    """Biases, forbidden tokens, and stop tokens that may not be drawn yet: one scatter, none where X = Z = 0."""
    withheld = jnp.where(num_drawn < state.min_new_tokens, -jnp.inf, 0.0).astype(jnp.float32)
    tokens = jnp.concatenate([state.bias_tokens, state.stop_tokens], axis=1)
    values = [state.bias_values, jnp.broadcast_to(withheld[:, None], state.stop_tokens.shape)]
    if tokens.shape[1] == 0:
        return logits
    return lax.cond(used, lambda: processors.bias(logits, tokens, jnp.concatenate(values, axis=1)), lambda: logits)


def _restrict(logits: Float32[Array, "R V"], state: SamplingState, sampled: Bool[Array, " R"]) -> Float32[Array, "R V"]:
    """Temperature, top-k, top-p, min-p. Each of the two searches runs only where a row asks for it."""
    logits = processors.temperature(logits, state.temperature)
    for restrict, value, used in (
        (processors.top_k, state.top_k, state.top_k > 0),
        (processors.top_p, state.top_p, state.top_p < 1),
    ):
        logits = lax.cond(jnp.any(sampled & used), restrict, lambda logits, _: logits, logits, value)
    return processors.min_p(logits, state.min_p)


def _gumbel(seed: Array, sample: Int32[Array, " R"], position: Int32[Array, " R"], vocab: int) -> Float32[Array, "R V"]:
    """Gumbel noise, a pure function of (seed, sample, position, token).

    The greatest of logits plus Gumbel noise is a draw from their softmax.
    """
    half = -(-vocab // 2)  # a hash has two words: one for a token of the lower half, one for its like in the upper
    words = [seed[:, None], sample[:, None], position[:, None], jnp.arange(half, dtype=jnp.int32)[None]]
    wide = (jnp.broadcast_to(word.astype(jnp.uint32), (len(seed), half)) for word in words)
    bits = jnp.concatenate(threefry2x32_p.bind(*wide), axis=1)[:, :vocab]
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # exact, and neither 0 nor 1
    noise = -jnp.log(-jnp.log(uniform))
    # A CPU would compute it inside the argmax, one number after the other, which takes three times as long.
    return lax.optimization_barrier(noise) if target_platform() == "cpu" else noise


def _measure(
    logits: Float32[Array, "R V"], drawn: Int32[Array, " R"], num_logprobs: int | None
) -> tuple[Float32[Array, " R"] | None, Int32[Array, "R n"], Float32[Array, "R n"]]:
    """The log-probabilities of the drawn and of the most likely tokens."""
    no_top = jnp.zeros((len(logits), 0), jnp.int32), jnp.zeros((len(logits), 0), jnp.float32)
    if num_logprobs is None:
        return None, *no_top
    measured = processors.log_probabilities(logits)
    of_drawn = jnp.take_along_axis(measured, drawn[:, None], axis=1)[:, 0]
    if num_logprobs == 0:
        return of_drawn, *no_top
    top_logprobs, top_tokens = lax.top_k(measured, num_logprobs)
    return of_drawn, top_tokens.astype(jnp.int32), top_logprobs


# ---- what is refused when the draw is traced -----------------------------------------------------------------------


def _check(logits: Array, state: SamplingState, num_logprobs: int | None) -> None:
    if len(state.temperature) != len(logits):
        raise ValueError(
            f"{len(logits)} rows of logits, but a SamplingState of {len(state.temperature)} rows: gather the rows that "
            "draw from it with jax.tree.map"
        )
    if num_logprobs is not None and not 0 <= num_logprobs <= logits.shape[1]:
        raise ValueError(
            f"num_logprobs={num_logprobs} must be None or from 0 to the {logits.shape[1]} tokens of the vocabulary"
        )
