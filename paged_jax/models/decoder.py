"""One decoder for the Llama family and its relatives: what differs between them is a field of `DecoderConfig`.

The same module serves and trains. `Decoder.__call__` runs the packed tokens of many sequences against a paged cache,
`Decoder.dense` runs whole sequences without any cache. Both send their tokens through the same layers and differ only
in the `attend` function that they pass down.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from paged_jax.attention import paged_attention
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool
from paged_jax.models.config import DecoderConfig
from paged_jax.models.dense import dense_attention
from paged_jax.models.experts import Experts
from paged_jax.models.parts import MLP, Linear, RMSNorm, make_norm
from paged_jax.models.rope import rotate

# attend(layer, q [*T, N, H], k [*T, K, H], v [*T, K, H], sinks [N] or None) -> [*T, N, H]
Attend = Callable[..., jax.Array]


class Attention(nnx.Module):
    """Projections, optional QK norm and RoPE around whatever `attend` does with the cache."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        num_q, num_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, bias = config.hidden_size, config.qkv_bias
        self.head_dim = config.head_dim
        self.q = Linear(hidden, num_q, bias=bias, dtype=dtype, rngs=rngs)
        self.k = Linear(hidden, num_kv, bias=bias, dtype=dtype, rngs=rngs)
        self.v = Linear(hidden, num_kv, bias=bias, dtype=dtype, rngs=rngs)
        std = 0.02 * (2 * config.num_layers) ** -0.5
        self.out = Linear(num_q, hidden, bias=config.output_bias, std=std, dtype=dtype, rngs=rngs)
        self.q_norm = make_norm(config, config.head_dim, dtype) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim, dtype) if config.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros((config.num_heads,), dtype)) if config.sinks else None

    def __call__(self, x: Float[Array, "*T D"], angles, attend: Attend) -> Float[Array, "*T D"]:
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (self.q(x), self.k(x), self.v(x)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        out = attend(rotate(q, *angles), rotate(k, *angles), v, sinks)
        return self.out(out.reshape(*out.shape[:-2], -1))


class Layer(nnx.Module):
    """Attention and MLP, each normalised before (in Gemma after, too) and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        def norm():
            return make_norm(config, config.hidden_size, dtype)

        self.attn_norm = norm()
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.attn_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = (Experts if config.num_experts else MLP)(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(self, x: Float[Array, "*T D"], angles, attend: Attend) -> Float[Array, "*T D"]:
        update = self.attn(self.attn_norm(x), angles, attend)
        x = x + (update if self.attn_post_norm is None else self.attn_post_norm(update))
        update = self.mlp(self.mlp_norm(x))
        return x + (update if self.mlp_post_norm is None else self.mlp_post_norm(update))


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Args:
        config: shape and options.
        implementation: of attention over pages: which kernel; None: by platform.
        dtype: of the weights and of the activations; norms, RoPE, softmax and logits are float32.
        rngs: its stream `params` initialises the weights.
    """

    def __init__(self, config: DecoderConfig, *, implementation: str | None = None, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.implementation = implementation
        self.embed = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm: RMSNorm = make_norm(config, config.hidden_size, dtype)
        self.head = (
            None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self, tokens: Int[Array, " T"], pool: PagePool, metadata: AttentionMetadata
    ) -> tuple[Float[Array, "Z V"], PagePool]:
        """Runs the packed new tokens of many sequences against a paged cache.

        Args:
            tokens: the new tokens of all sequences, packed; padding after them.
            pool: the pages of every layer.
            metadata: where each token stands.

        Returns:
            float32 logits at the tokens `metadata.logits_at`, and the pool with the new keys and values in it.

        Raises:
            ValueError: the pool has pages for another number of layers.
        """
        if pool.num_layers != self.config.num_layers:
            raise ValueError(
                f"the pool has pages for {pool.num_layers} layers, but the decoder has {self.config.num_layers}: "
                f"create it with num_layers={self.config.num_layers}."
            )

        def attend(i, q, k, v, sinks):
            nonlocal pool
            out, pool = paged_attention(
                q, k, v, pool, metadata, i,
                sinks=sinks, implementation=self.implementation, **self._attention_options(i),
            )  # fmt: skip
            return out

        x = self._hidden(tokens, metadata.positions, attend)
        return self._logits(x[metadata.logits_at]), pool

    def dense(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T V"]:
        """Logits at every token of whole sequences, without a cache: for training, and to check the paged path.

        Args:
            tokens: token ids.

        Returns:
            float32 logits.
        """

        def attend(layer, q, k, v, sinks):
            return dense_attention(q, k, v, sinks=sinks, **self._attention_options(layer))

        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        return self._logits(self._hidden(tokens, positions, attend))

    def _attention_options(self, layer: int) -> dict:
        config = self.config
        return {
            "scale": config.attention_scale,
            "window": config.window(layer),
            "soft_cap": config.attention_soft_cap,
        }

    def _hidden(self, tokens, positions, attend: Attend):
        """The residual stream after the last layer, [*T, D]."""
        config = self.config
        x = self.embed.weight[...][tokens]
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        everywhere = config.rope.angles(positions, config.head_dim)
        local = config.local_rope.angles(positions, config.head_dim) if config.local_rope else everywhere
        for i, layer in enumerate(self.layers):
            angles = everywhere if config.window(i) is None else local
            x = layer(x, angles, lambda q, k, v, sinks, i=i: attend(i, q, k, v, sinks))
        return x

    def _logits(self, x):
        logits = (self.embed if self.head is None else self.head)(self.norm(x)).astype(jnp.float32)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
