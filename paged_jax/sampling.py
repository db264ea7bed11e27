"""From logits to the next token: greedy, temperature, top-k, top-p; one random stream a sequence."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Args:
        max_new_tokens: most tokens a sample may have, its stop token included.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: then keep the smallest set of most likely tokens whose probability reaches p (nucleus sampling,
            Holtzman et al. 2020); 1 keeps all.
        seed: sample i of a request draws from the random stream (seed, i), whatever runs beside it.
        num_samples: continuations of the prompt; they share the prompt's pages.
        stop_tokens: a sample ends with the first of these.
        stop_strings: a sample ends with the token that completes the first of these.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        def need(ok, name, rule):
            if not ok:
                raise ValueError(f"SamplingParams({name}={getattr(self, name)!r}): {name} must be {rule}")

        need(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        need(0 <= self.temperature < float("inf"), "temperature", "finite and at least 0; 0 means greedy")
        need(self.top_k >= 0, "top_k", "at least 0; 0 keeps every token")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]; 1 keeps every token")
        need(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")
        need(self.num_samples >= 1, "num_samples", "at least 1")
        need(all(t >= 0 for t in self.stop_tokens), "stop_tokens", "token ids, at least 0 each")
        need(all(self.stop_strings), "stop_strings", "non-empty strings")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sampling parameters of every row of a batch, as arrays: new values need no recompilation."""

    temperature: Float[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    sample: Int32[Array, " B"]
    stop_tokens: Int32[Array, "B X"]  # -1 where unused

    @classmethod
    def create(cls, num_rows: int, max_stop_tokens: int = 4) -> "Sampler":
        """Greedy rows without stop tokens."""
        return cls(
            temperature=jnp.zeros(num_rows, jnp.float32),
            top_k=jnp.zeros(num_rows, jnp.int32),
            top_p=jnp.ones(num_rows, jnp.float32),
            seed=jnp.zeros(num_rows, jnp.uint32),
            sample=jnp.zeros(num_rows, jnp.int32),
            stop_tokens=jnp.full((num_rows, max_stop_tokens), -1, jnp.int32),
        )

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams, int] | None], max_stop_tokens: int) -> "Sampler":
        """From the parameters and the sample number of each row, on the host; rows that are None are greedy."""
        params = [row[0] if row else SamplingParams() for row in rows]
        stop_tokens = np.full((len(rows), max_stop_tokens), -1, np.int32)
        for b, p in enumerate(params):
            stop_tokens[b, : len(p.stop_tokens)] = p.stop_tokens
        return cls(
            temperature=jnp.array([p.temperature for p in params], jnp.float32),
            top_k=jnp.array([p.top_k for p in params], jnp.int32),
            top_p=jnp.array([p.top_p for p in params], jnp.float32),
            seed=jnp.array(np.array([p.seed for p in params], np.uint32)),
            sample=jnp.array([row[1] if row else 0 for row in rows], jnp.int32),
            stop_tokens=jnp.array(stop_tokens),
        )

    def is_stop(self, tokens: Int32[Array, " B"]) -> Bool[Array, " B"]:
        return jnp.any(tokens[:, None] == self.stop_tokens, axis=1)


def sample(logits: Float[Array, "B V"], sampler: Sampler, positions: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """The next token of each row.

    A draw depends on the row's logits, parameters, seed, sample number and position alone, never on its
    neighbours: a sequence that was preempted, moved to another row or run alone draws the same tokens. A batch
    without a temperature costs an argmax. Tokens that tie at the edge of top-k or top-p are all kept.

    Args:
        logits: of the next token.
        positions: where the token will stand in its sequence.
    """
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)

    def draw():
        scaled = logits.astype(jnp.float32) / jnp.where(sampler.temperature > 0, sampler.temperature, 1.0)[:, None]
        restricted = (sampler.top_k > 0) | (sampler.top_p < 1)
        scaled = lax.cond(jnp.any(restricted), lambda: _restrict(scaled, sampler), lambda: scaled)
        noise = jax.vmap(
            lambda seed, number, at: jax.random.gumbel(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), at),
                (logits.shape[1],),
                jnp.float32,
            )
        )(sampler.seed, sampler.sample, positions)
        drawn = jnp.argmax(scaled + noise, axis=1).astype(jnp.int32)
        return jnp.where(sampler.temperature > 0, drawn, greedy)

    return lax.cond(jnp.any(sampler.temperature > 0), draw, lambda: greedy)


def _restrict(logits: Float[Array, "B V"], sampler: Sampler) -> Float[Array, "B V"]:
    """-inf for the tokens outside top-k, then outside top-p of what top-k left."""
    num_rows, vocab = logits.shape
    order = _ordered_bits(logits)
    k = jnp.where(sampler.top_k > 0, jnp.minimum(sampler.top_k, vocab), vocab)
    edge = _greatest(lambda at: jnp.sum(order >= at[:, None], axis=1) >= k, num_rows)
    logits = jnp.where(order >= edge[:, None], logits, -jnp.inf)
    mass = jax.nn.softmax(logits, axis=1)
    edge = _greatest(lambda at: jnp.sum(jnp.where(order >= at[:, None], mass, 0.0), axis=1) >= sampler.top_p, num_rows)
    return jnp.where((order >= edge[:, None]) | (sampler.top_p >= 1)[:, None], logits, -jnp.inf)


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _greatest(holds: Callable[[Array], Array], num_rows: int) -> UInt32[Array, " B"]:
    """The greatest threshold of each row at which a monotone condition still holds, found bit by bit; else 0.

    32 passes over the logits: a sort of a 128k vocabulary compiles for seconds on a TPU, this does not.
    """

    def try_bit(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(higher), higher, threshold)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(num_rows, jnp.uint32))
