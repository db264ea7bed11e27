"""Pure functions from logits [R, V] to logits [R, V]; -inf means that a token cannot be drawn."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

_MAX = jnp.finfo(jnp.float32).max
_TINY = jnp.finfo(jnp.float32).tiny


@runtime_checkable
class Processor(Protocol):
    """Your own rules about what may be drawn next: a grammar, a trie, a watermark.

    A processor is a frozen, hashable value, static under jit. What it must remember of each row is its state: a pytree
    whose leaves have the rows as their first axis, kept in `SamplingState.processor`. You make the first state: pass it
    to `SamplingState.of(..., processor=state)`, or to an engine as `processor_state`. The part of a row must depend on
    that row only, since rows move and are computed again. Leave each row a token: one that may draw none draws token 0.

    Examples:
        Never the same token twice in a row.

        >>> @dataclasses.dataclass(frozen=True)
        ... class NoRepeat:
        ...     def process(self, state, logits, tokens, num_known):  # state [R]: the last token, -1 before the first
        ...         last = jax.nn.one_hot(state, logits.shape[1], dtype=bool)
        ...         return jnp.where(last, -jnp.inf, logits)
        ...
        ...     def advance(self, state, drawn, drew):
        ...         return jnp.where(drew, drawn, state)
        >>> step = jax.jit(draw, static_argnames="processor")
        >>> num_rows = 2
        >>> state = SamplingState.create(num_rows, processor=jnp.full(num_rows, -1, jnp.int32))
        >>> logits = jnp.array([[0.0, 2.0, 1.0]] * num_rows)
        >>> known, length = jnp.zeros((num_rows, 8), jnp.int32), jnp.zeros(num_rows, jnp.int32)
        >>> for _ in range(4):
        ...     drawn = step(logits, state, known, length, length, processor=NoRepeat())
        ...     state = dataclasses.replace(state, processor=drawn.processor)
        ...     print(drawn.tokens)
        [1 1]
        [2 2]
        [1 1]
        [2 2]
    """

    def process(
        self, state: Any, logits: Float32[Array, "R V"], tokens: Int32[Array, "R C"], num_known: Int32[Array, " R"]
    ) -> Float32[Array, "R V"]:
        """The logits under the rules.

        Args:
            state: of these rows.
            logits: the model's own, in float32; in a beam search log-probabilities, whose sums are the scores.
            tokens: that each row knows, its prompt first; the first `num_known` of each row are valid.
            num_known: how many.
        """
        ...

    def advance(self, state: Any, drawn: Int32[Array, " R"], drew: Bool[Array, " R"]) -> Any:
        """The state after a draw, of the same structure, shapes and dtypes.

        Args:
            state: of these rows.
            drawn: the token of each row.
            drew: which rows drew one; the others must keep their state.
        """
        ...


def apply(
    processor: Processor, state: Any, logits: Float32[Array, "R V"], tokens: Array, num_known: Array
) -> Float32[Array, "R V"]:
    """What a user's processor makes of the logits; ValueError at trace time for another shape or dtype."""
    result = processor.process(state, logits, tokens, num_known)
    if (result.shape, result.dtype) != (logits.shape, logits.dtype):
        raise ValueError(
            f"{type(processor).__name__}.process returned {result.dtype}{list(result.shape)}: return the "
            f"{logits.dtype}{list(logits.shape)} logits that it was given, changed"
        )
    return result


def advance(processor: Processor, state: Any, drawn: Int32[Array, " R"], active: Bool[Array, " R"]) -> Any:
    """The state of a user's processor after a draw; ValueError at trace time for another structure, shape or dtype."""
    result = processor.advance(state, drawn, active)
    given, returned = (jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree) for tree in (state, result))
    if given != returned:
        raise ValueError(
            f"{type(processor).__name__}.advance returned a state of {returned}, but was given {given}: keep the "
            "structure, shapes and dtypes, because a compiled loop carries the state from step to step"
        )
    return result


def bias(
    logits: Float32[Array, "R V"], tokens: Int32[Array, "R Z"], values: Float32[Array, "R Z"]
) -> Float32[Array, "R V"]:
    """Add a value to the logits of some tokens; -inf forbids one.

    Args:
        logits: of the next token.
        tokens: -1 where unused.
        values: for each of them.
    """
    num_rows, vocab = logits.shape
    at = jnp.where(tokens >= 0, tokens, vocab)
    return logits.at[jnp.arange(num_rows)[:, None], at].add(values, mode="drop")


def penalties(
    logits: Float32[Array, "R V"],
    repetition: Float32[Array, " R"],
    presence: Float32[Array, " R"],
    frequency: Float32[Array, " R"],
    tokens: Int32[Array, "R C"],
    num_prompt: Int32[Array, " R"],
    num_known: Int32[Array, " R"],
) -> Float32[Array, "R V"]:
    """Penalise the tokens that a row holds: repetition counts its prompt as well, the other two what it drew.

        logit = logit / repetition if logit > 0 else logit * repetition     where the row holds the token
        logit -= frequency * (times drawn)
        logit -= presence                                                   where it was drawn

    Args:
        logits: of the next token.
        repetition: 1 changes nothing.
        presence: 0 changes nothing.
        frequency: 0 changes nothing.
        tokens: that each row knows, its prompt first.
        num_prompt: tokens of the prompt.
        num_known: tokens of the prompt and drawn ones.
    """
    num_rows, vocab = logits.shape
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    is_known = position < num_known[:, None]
    rows = jnp.arange(num_rows)[:, None]
    zeros = jnp.zeros((num_rows, vocab), jnp.int32)
    held = zeros.at[rows, jnp.where(is_known, tokens, vocab)].add(1, mode="drop") > 0
    is_drawn = is_known & (position >= num_prompt[:, None])
    times = zeros.at[rows, jnp.where(is_drawn, tokens, vocab)].add(1, mode="drop")
    factor = repetition[:, None]
    logits = jnp.where(held, jnp.where(logits > 0, logits / factor, logits * factor), logits)
    logits -= frequency[:, None] * times.astype(jnp.float32)
    return jnp.where(times > 0, logits - presence[:, None], logits)


def temperature(logits: Float32[Array, "R V"], temperatures: Float32[Array, " R"]) -> Float32[Array, "R V"]:
    """Divide the distance to the row's greatest logit, which becomes 0; nothing overflows, however low it is.

    Args:
        logits: of the next token.
        temperatures: 0 is taken as 1.
    """
    divisor = jnp.where(temperatures > 0, jnp.clip(temperatures, _TINY, 1 / _TINY), 1.0)  # its reciprocal is normal
    return below_maximum(logits) / divisor[:, None]


def top_k(logits: Float32[Array, "R V"], k: Int32[Array, " R"]) -> Float32[Array, "R V"]:
    """Keep the k greatest logits of each row, and all that tie with the last of them; 0 keeps every token."""
    num_rows, vocab = logits.shape
    order = _ordered_bits(logits)
    k = jnp.where(k > 0, jnp.minimum(k, vocab), vocab)
    edge = _greatest(lambda at: jnp.sum(order >= at[:, None], axis=1, dtype=jnp.int32) >= k, num_rows)
    return jnp.where(order >= edge[:, None], logits, -jnp.inf)


def top_p(logits: Float32[Array, "R V"], p: Float32[Array, " R"]) -> Float32[Array, "R V"]:
    """Keep the fewest most likely tokens whose probability reaches p, and all that tie with the last of them.

    The most likely token is always kept; p = 1 keeps every token.
    """
    order = _ordered_bits(logits)
    mass = jnp.exp(log_probabilities(logits))
    edge = _greatest(lambda at: jnp.sum(jnp.where(order >= at[:, None], mass, 0.0), axis=1) >= p, len(logits))
    edge = jnp.where(p < 1, jnp.minimum(edge, jnp.max(order, axis=1)), 0)
    return jnp.where(order >= edge[:, None], logits, -jnp.inf)


def min_p(logits: Float32[Array, "R V"], p: Float32[Array, " R"]) -> Float32[Array, "R V"]:
    """Keep the tokens that are at least p times as likely as the most likely one; 0 keeps every token."""
    edge = jnp.where(p > 0, jnp.log(jnp.maximum(p, _TINY)), -jnp.inf)
    return jnp.where(below_maximum(logits) >= edge[:, None], logits, -jnp.inf)


def log_probabilities(logits: Float32[Array, "R V"]) -> Float32[Array, "R V"]:
    """Logarithms of the softmax; a row in which no token can be drawn has -inf everywhere, and never a NaN."""
    below = below_maximum(logits)
    total = jnp.sum(jnp.exp(below), axis=1, keepdims=True)
    return below - jnp.log(jnp.maximum(total, 1.0))  # the greatest adds 1, so less means that there is none


def below_maximum(logits: Float32[Array, "R V"]) -> Float32[Array, "R V"]:
    """The logits less the greatest of their row: at most 0, and never a NaN, even with infinities among them."""
    greatest = jnp.clip(jnp.max(logits, axis=1, keepdims=True), -_MAX, _MAX)
    return jnp.minimum(logits, _MAX) - greatest


def _ordered_bits(x: Float32[Array, "R V"]) -> UInt32[Array, "R V"]:
    """Unsigned integers in the order of the floats; the two zeros are one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _greatest(holds: Callable[[Array], Array], num_rows: int) -> UInt32[Array, " R"]:
    """The greatest threshold of each row at which a monotone condition still holds, found bit by bit; else 0.

    32 passes over the logits: a sort of a 128k vocabulary compiles for seconds on a TPU, this does not.
    """

    def try_bit(i: int | Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1 << 31) >> jnp.asarray(i, jnp.uint32))
        return jnp.where(holds(higher), higher, threshold)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(num_rows, jnp.uint32))
