"""The plain parts of a decoder layer: projection, norm, gated MLP."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from paged_jax.models.config import DecoderConfig
from pallas_kernels.platform import target_platform

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}

FEW_TOKENS = 64  # at which the order of the operands of a product makes little difference


def product(x: Float[Array, "*T I"], weight: Float[Array, "O I"]) -> Float[Array, "*T O"]:
    """`x @ weight.T`; how its sums round depends on the number of tokens.

    XLA on a CPU packs the right operand of a float32 product anew in each call. With few tokens that is what a product
    of weights takes longest for, so there the tokens stand on the right, and a barrier keeps XLA from swapping them
    back. A product of 8 tokens then takes .6 of the time where a weight has a million numbers, and .3 where it has 16
    million. Under `vmap` the tokens of one example count.
    """
    num_tokens = math.prod(x.shape[:-1])
    is_float32 = x.dtype == weight.dtype == jnp.float32
    # A number of tokens that is not known yet, in an export, is no integer.
    if target_platform() == "cpu" and is_float32 and isinstance(num_tokens, int) and num_tokens <= FEW_TOKENS:
        columns = lax.optimization_barrier(jnp.einsum("oi,...i->o...", weight, x))
        return jnp.moveaxis(columns, 0, -1)
    return jnp.einsum("...i,oi->...o", x, weight)


class Linear(nnx.Module):
    """`x @ weight.T + bias`; the weight is [out, in] as in checkpoint files, so loading never transposes."""

    def __init__(self, num_in: int, num_out: int, *, bias: bool = False, std: float = 0.02, dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (num_out, num_in), dtype))
        self.bias = nnx.Param(jnp.zeros((num_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        y = product(x, self.weight[...])
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (https://arxiv.org/abs/1910.07467), computed in float32."""

    def __init__(self, size: int, *, eps: float, unit_offset: bool, dtype):
        self.weight = nnx.Param(jnp.zeros((size,), dtype) if unit_offset else jnp.ones((size,), dtype))
        self.eps, self.unit_offset = eps, unit_offset

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        wide = x.astype(jnp.float32)
        weight = self.weight[...].astype(jnp.float32) + (1.0 if self.unit_offset else 0.0)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * jnp.broadcast_to(weight, normed.shape)).astype(x.dtype)


def make_norm(config: DecoderConfig, size: int, dtype) -> RMSNorm:
    """The config's norm for a vector of this size."""
    return RMSNorm(size, eps=config.norm_eps, unit_offset=config.unit_offset_norm, dtype=dtype)


class MLP(nnx.Module):
    """The gated MLP: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        std = 0.02 * (2 * config.num_layers) ** -0.5
        self.gate = Linear(hidden, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.up = Linear(hidden, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(inner, hidden, bias=bias, std=std, dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "*T D"]) -> Float[Array, "*T D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
