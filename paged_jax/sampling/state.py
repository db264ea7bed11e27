"""What a row carries: the sampling parameters of a batch as arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from paged_jax.sampling.params import SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The sampling parameters of every row of a batch, as arrays: new values need no recompilation.

    X is the most stop tokens of a row, and Z the most tokens that a row biases or forbids; both are sizes of arrays.
    With X = 0 or Z = 0, the compiled draw has no code for that feature.

    Every leaf has the rows as its first axis, so `jax.tree.map` can gather, permute or replace rows.

    Examples:
        >>> warm = SamplingParams(temperature=1.0, seed=3, stop_tokens=(2,))
        >>> state = SamplingState.of([(warm, 0), (warm, 1), None])  # two samples of a request, and a row that is greedy
        >>> state.temperature.tolist(), state.sample.tolist(), state.stop_tokens[:, 0].tolist()
        ([1.0, 1.0, 0.0], [0, 1, 0], [2, 2, -1])
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    repetition_penalty: Float32[Array, " B"]
    presence_penalty: Float32[Array, " B"]
    frequency_penalty: Float32[Array, " B"]
    min_new_tokens: Int32[Array, " B"]
    seed: UInt32[Array, " B"]
    sample: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B X"]  # -1 where unused
    bias_tokens: Int32[Array, "B Z"]  # -1 where unused
    bias_values: Float32[Array, "B Z"]
    processor: Any = None  # the state of a user's `Processor`: any pytree whose leaves have a leading axis B

    @classmethod
    def create(
        cls, num_rows: int, *, max_stop_tokens: int = 4, max_bias_tokens: int = 0, processor: Any = None
    ) -> "SamplingState":
        """Greedy rows without stop tokens, see `of`."""
        return cls.of(
            [None] * num_rows, max_stop_tokens=max_stop_tokens, max_bias_tokens=max_bias_tokens, processor=processor
        )

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[SamplingParams, int] | None],
        *,
        max_stop_tokens: int = 4,
        max_bias_tokens: int = 0,
        processor: Any = None,
    ) -> "SamplingState":
        """From what each row asks for, on the host: the same shapes and dtypes whatever is asked for.

        Args:
            rows: the parameters and the sample number of each row; a row that is None is greedy.
            max_stop_tokens: X, the most stop tokens that a row can have.
            max_bias_tokens: Z, the most tokens that `logit_bias` and `forbidden_tokens` of a row can name together.
            processor: the state of a user's `Processor`, for all rows.

        Raises:
            ValueError: a row names more tokens than X or Z.
        """
        params = [row[0] if row else SamplingParams() for row in rows]
        biases = [[*dict(p.logit_bias).items(), *((token, -np.inf) for token in p.forbidden_tokens)] for p in params]

        columns = {
            name: jnp.array(np.array([getattr(p, name) for p in params], dtype)) for name, dtype in _COLUMNS.items()
        }
        return cls(
            **columns,
            sample=jnp.array(np.array([row[1] if row else 0 for row in rows], np.int32)),
            stop_tokens=_padded([p.stop_tokens for p in params], max_stop_tokens, -1, np.int32, "max_stop_tokens"),
            bias_tokens=_padded(
                [[token for token, _ in pairs] for pairs in biases], max_bias_tokens, -1, np.int32, "max_bias_tokens"
            ),
            bias_values=_padded(
                [[bias for _, bias in pairs] for pairs in biases], max_bias_tokens, 0, np.float32, "max_bias_tokens"
            ),
            processor=processor,
        )

    def is_stop(self, tokens: Int32[Array, " B"]) -> Bool[Array, " B"]:
        """Whether each row's token is one of its stop tokens."""
        return jnp.any(tokens[:, None] == self.stop_tokens, axis=1)


_COLUMNS = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "min_new_tokens": np.int32,
    "seed": np.uint32,
}
_NAMED_BY = {"max_stop_tokens": "stop_tokens", "max_bias_tokens": "logit_bias and forbidden_tokens"}


def _padded(rows: Sequence[Sequence[int] | Sequence[float]], width: int, fill: int, dtype: type, size: str) -> Array:
    """Lists of at most `width` numbers as the rows of an array."""
    padded = np.full((len(rows), width), fill, dtype)
    for b, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(
                f"row {b} names {len(row)} tokens in {_NAMED_BY[size]}, but {size}={width}: raise it to {len(row)}"
            )
        padded[b, : len(row)] = row
    return jnp.array(padded)
