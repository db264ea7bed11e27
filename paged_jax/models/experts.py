"""A mixture of experts in place of the MLP, as in gpt-oss."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paged_jax.models.config import DecoderConfig
from paged_jax.models.parts import Linear

GATE_SHARPNESS = 1.702  # of the sigmoid in gate * sigmoid(1.702 * gate), which is close to GELU
GATE_LIMIT = 7.0  # gates above, and linear parts beyond plus or minus this are clipped


class Experts(nnx.Module):
    """Every token goes to its `experts_per_token` best experts, weighted by a softmax over their router logits.

    Tokens are sorted by expert, so that each expert is one contiguous run of a ragged matrix product.
    """

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.experts_per_token = config.experts_per_token
        self.router = Linear(hidden, experts, bias=True, dtype=dtype, rngs=rngs)
        # Gate and linear part alternate along the last axis, as in the checkpoint files.
        self.gate_up = nnx.Param(0.02 * jax.random.normal(rngs.params(), (experts, hidden, 2 * inner), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((experts, 2 * inner), dtype))
        self.down = nnx.Param(0.02 * jax.random.normal(rngs.params(), (experts, inner, hidden), dtype))
        self.down_bias = nnx.Param(jnp.zeros((experts, hidden), dtype))

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        tokens = x.reshape(-1, x.shape[-1])
        logits, chosen = jax.lax.top_k(self.router(tokens).astype(jnp.float32), self.experts_per_token)
        shares = jax.nn.softmax(logits, axis=-1).ravel()
        by_expert = jnp.argsort(chosen.ravel())
        expert, token = chosen.ravel()[by_expert], by_expert // self.experts_per_token
        sizes = jnp.bincount(expert, length=self.gate_up.shape[0])
        h = jax.lax.ragged_dot(tokens[token], self.gate_up[...], sizes) + self.gate_up_bias[...][expert]
        gate, up = jnp.minimum(h[:, ::2], GATE_LIMIT), jnp.clip(h[:, 1::2], -GATE_LIMIT, GATE_LIMIT)
        h = (up + 1) * gate * jax.nn.sigmoid(GATE_SHARPNESS * gate)
        y = jax.lax.ragged_dot(h, self.down[...], sizes) + self.down_bias[...][expert]
        y = y * shares[by_expert][:, None].astype(y.dtype)
        return jnp.zeros_like(tokens).at[token].add(y).reshape(x.shape)
