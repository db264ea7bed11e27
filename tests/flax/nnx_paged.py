"""A decoder in Flax nnx."""

from flax import nnx

from paged_jax.flax.nnx import PagedCache


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.attn = nnx.MultiHeadAttention(4, width, num_kv_heads=2, decode=False, attention_fn=PagedCache(), rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.norm, self.mlp_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attn(self.norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Decoder(nnx.Module):
    def __init__(self, vocab, width, num_layers, rngs):
        self.embed, self.position = nnx.Embed(vocab, width, rngs=rngs), nnx.Embed(512, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(num_layers)])
        self.head = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, tokens, metadata):
        x = self.embed(tokens) + self.position(metadata.positions)
        for block in self.blocks:
            x = block(x, metadata)
        return self.head(x[metadata.logits_at])
