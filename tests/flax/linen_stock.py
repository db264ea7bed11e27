"""A decoder in Flax linen."""

import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        attn = nn.MultiHeadDotProductAttention(num_heads=4)
        x = x + attn(nn.RMSNorm()(x), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.RMSNorm()(x))))


class Decoder(nn.Module):
    vocab: int
    width: int
    num_layers: int

    @nn.compact
    def __call__(self, tokens):
        positions = jnp.arange(len(tokens))
        x = nn.Embed(self.vocab, self.width)(tokens) + nn.Embed(512, self.width)(positions)
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.num_layers):
            x = Block()(x, mask)
        return nn.Dense(self.vocab)(x)
