"""A mixture of experts in place of the MLP."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paged_jax.models.config import DecoderConfig
from paged_jax.models.parts import ACTIVATIONS, Linear

GATE_SHARPNESS = 1.702  # of the sigmoid in gate * sigmoid(1.702 * gate), which is close to GELU
GATE_LIMIT = 7.0  # gates above, and linear parts beyond plus or minus this are clipped


class Experts(nnx.Module):
    """Every token goes to its `experts_per_token` best experts, weighted by a softmax over router logits.

    Tokens are sorted by expert, so that each expert is one contiguous run of a ragged matrix product.
    """

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.experts_per_token, self.activation = config.experts_per_token, config.activation
        self.shares_of_all, self.clipped_gates = config.shares_of_all_experts, config.clipped_gates
        self.router = Linear(hidden, experts, bias=config.expert_bias, dtype=dtype, rngs=rngs)
        # Gate and linear part alternate along the last axis, as in the checkpoint files.
        self.gate_up = nnx.Param(0.02 * jax.random.normal(rngs.params(), (experts, hidden, 2 * inner), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((experts, 2 * inner), dtype)) if config.expert_bias else None
        self.down = nnx.Param(0.02 * jax.random.normal(rngs.params(), (experts, inner, hidden), dtype))
        self.down_bias = nnx.Param(jnp.zeros((experts, hidden), dtype)) if config.expert_bias else None

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens).astype(jnp.float32)
        best, chosen = jax.lax.top_k(logits, self.experts_per_token)
        total = jax.nn.logsumexp(logits if self.shares_of_all else best, axis=-1, keepdims=True)
        shares = jnp.exp(best - total).ravel()
        by_expert = jnp.argsort(chosen.ravel())
        expert, token = chosen.ravel()[by_expert], by_expert // self.experts_per_token
        sizes = jnp.bincount(expert, length=self.gate_up.shape[0])
        h = self._gate(_product(tokens[token], self.gate_up, self.gate_up_bias, sizes, expert))
        y = _product(h, self.down, self.down_bias, sizes, expert)
        y = y * shares[by_expert][:, None].astype(y.dtype)
        return jnp.zeros_like(tokens).at[token].add(y).reshape(x.shape)

    def _gate(self, h):
        gate, up = h[:, ::2], h[:, 1::2]
        if not self.clipped_gates:
            return ACTIVATIONS[self.activation](gate) * up
        gate, up = jnp.minimum(gate, GATE_LIMIT), jnp.clip(up, -GATE_LIMIT, GATE_LIMIT)
        return (up + 1) * gate * jax.nn.sigmoid(GATE_SHARPNESS * gate)


def _product(x, weights, bias, sizes, expert):
    """Each expert's product with its own run of rows."""
    y = jax.lax.ragged_dot(x, weights[...], sizes)
    return y if bias is None else y + bias[...][expert]
