"""A decoder in Flax linen."""

from flax import linen as nn

from paged_jax.flax.linen import PagedCache


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        width = x.shape[-1]
        attn = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=PagedCache())
        x = x + attn(nn.RMSNorm()(x), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.RMSNorm()(x))))


class Decoder(nn.Module):
    vocab: int
    width: int
    num_layers: int

    @nn.compact
    def __call__(self, tokens, metadata):
        x = nn.Embed(self.vocab, self.width)(tokens) + nn.Embed(512, self.width)(metadata.positions)
        for _ in range(self.num_layers):
            x = Block()(x, metadata)
        return nn.Dense(self.vocab)(x[metadata.logits_at])
