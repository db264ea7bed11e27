"""One decoder for the Llama family and its relatives. What differs between them is a field of `DecoderConfig`.

The same module serves and trains. `Decoder.__call__` runs the packed tokens of many sequences against a paged cache,
`Decoder.dense` runs whole sequences without any cache. Both send their tokens through the same layers and differ only
in the `attend` function that they pass down.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from paged_jax.attention import paged_attention
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import LayerPlace, PagePool
from paged_jax.models.config import DecoderConfig
from paged_jax.models.dense import dense_attention
from paged_jax.models.experts import Experts
from paged_jax.models.parts import MLP, Linear, RMSNorm, make_norm
from paged_jax.models.rope import rotate
from paged_jax.models.stacks import check_period, layer_numbers

# attend(q [*T, N, H], k [*T, K, H], v [*T, K, H], sinks [N] or None) -> [*T, N, H]
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
        self.norm_of_all, self.interleaved = config.qk_norm_of_all, config.rope.interleaved
        sizes = (num_q, num_kv) if config.qk_norm_of_all else (config.head_dim, config.head_dim)
        self.q_norm = make_norm(config, sizes[0], dtype) if config.qk_norm else None
        self.k_norm = make_norm(config, sizes[1], dtype) if config.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros((config.num_heads,), dtype)) if config.sinks else None

    def __call__(self, x: Float[Array, "*T D"], angles, attend: Attend) -> Float[Array, "*T D"]:
        # Without the barrier XLA:TPU makes a product for each head, and first copies the layer's weights for it.
        q, k, v = lax.optimization_barrier((self.q(x), self.k(x), self.v(x)))
        if self.norm_of_all:
            q, k = self._normalise(q, k)
        q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in (q, k, v))
        if not self.norm_of_all:
            q, k = self._normalise(q, k)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        q, k = (rotate(y, *angles, interleaved=self.interleaved) for y in (q, k))
        out = attend(q, k, v, sinks)
        return self.out(out.reshape(*out.shape[:-2], -1))

    def _normalise(self, q, k):
        return (q, k) if self.q_norm is None or self.k_norm is None else (self.q_norm(q), self.k_norm(k))


class Layer(nnx.Module):
    """Attention and MLP, each normalised before (in Gemma after, too) and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype, rngs: nnx.Rngs):
        def norm():
            return make_norm(config, config.hidden_size, dtype)

        self.attn_norm = norm() if config.pre_norms else None
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.attn_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm() if config.pre_norms else None
        self.mlp = (Experts if config.num_experts else MLP)(config, dtype=dtype, rngs=rngs)
        self.mlp_post_norm = norm() if config.post_norms else None
        self.residual_scale = config.residual_scale

    def __call__(self, x: Float[Array, "*T D"], angles, attend: Attend) -> Float[Array, "*T D"]:
        update = self.attn(_optional(self.attn_norm, x), angles, attend)
        x = x + self._scale(_optional(self.attn_post_norm, update))
        update = self.mlp(_optional(self.mlp_norm, x))
        return x + self._scale(_optional(self.mlp_post_norm, update))

    def _scale(self, update):
        return update if self.residual_scale == 1.0 else update * jnp.asarray(self.residual_scale, update.dtype)


def _optional(norm: RMSNorm | None, x):
    return x if norm is None else norm(x)


class Decoder(nnx.Module):
    """A decoder-only transformer.

    Without a period its layers are unrolled: `layers.i` is layer i. With a period they run in a loop over stacked
    weights, so that the time to compile does not grow with their number: `layers.j` for j < period holds the weights of
    the layers j, j + period, j + 2 * period and so on, stacked along a first axis. Layers that are left over at the end
    are unrolled.

    Args:
        config: shape and options.
        period: the number of layers after which they repeat, `config.period` or a multiple of it; None: unrolled.
        implementation: the kernel for attention over pages, by its name; None: chosen by platform.
        dtype: of the weights and of the activations; norms, RoPE, softmax and logits are float32.
        rngs: its stream `params` initialises the weights.

    Raises:
        ValueError: the layers do not repeat after that many.

    Examples:
        >>> shape = models.DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
        ...                              num_kv_heads=2, head_dim=8)
        >>> decoder = Decoder(shape, rngs=nnx.Rngs(0))
        >>> decoder.dense(jnp.array([[1, 2, 3]])).shape
        (1, 3, 32)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        period: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if period is not None:
            check_period(config, period)
        self.config, self.period, self.implementation = config, period, implementation

        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, rngs=rngs)

        def make_stack(num_layers: int) -> Layer:
            return nnx.split_rngs(splits=num_layers)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)

        numbers = layer_numbers(config.num_layers, period)
        num_stacks = period or 0
        self.embed = Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [make_stack(len(own)) for own in numbers[:num_stacks]] + [make(rngs) for _ in numbers[num_stacks:]]
        )
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
            ValueError: the pool has pages for another number of layers, or does not repeat as the layers do.
        """
        if pool.num_layers != self.config.num_layers:
            raise ValueError(
                f"the pool has pages for {pool.num_layers} layers, but the decoder has {self.config.num_layers}: "
                f"create it with num_layers={self.config.num_layers}."
            )

        def attend(pool, entry, step, q, k, v, sinks):
            return paged_attention(
                q, k, v, pool, metadata, self._place(pool, entry, step),
                sinks=sinks, implementation=self.implementation, **self._attention_options(entry),
            )  # fmt: skip

        x, written = self._hidden(tokens, metadata.positions, attend, pool)
        assert written is not None, "attention returns the pool that it was given"
        return self._logits(x[metadata.logits_at]), written

    def dense(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T V"]:
        """Logits at every token of whole sequences, without a cache: for training, and to check the paged path.

        Args:
            tokens: token ids.

        Returns:
            float32 logits.
        """

        def attend(pool, entry, step, q, k, v, sinks):
            return dense_attention(q, k, v, sinks=sinks, **self._attention_options(entry)), pool

        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        return self._logits(self._hidden(tokens, positions, attend, None)[0])

    @property
    def _layer_numbers(self) -> tuple[tuple[int, ...], ...]:
        return layer_numbers(self.config.num_layers, self.period)

    def _window(self, entry: int) -> int | None:
        return self.config.window(self._layer_numbers[entry][0])

    def _attention_options(self, entry: int) -> dict:
        config = self.config
        return {
            "scale": config.attention_scale,
            "window": self._window(entry),
            "soft_cap": config.attention_soft_cap,
        }

    def _place(self, pool: PagePool, entry: int, step: int | Array) -> LayerPlace:
        """Where the pages of an entry of the layers lie in a step of the loop."""
        first, *others = (pool.place(layer) for layer in self._layer_numbers[entry])
        if not others:
            return first
        stride = others[0].index - first.index
        expected = [LayerPlace(first.group, first.index + (i + 1) * stride) for i in range(len(others))]
        if others != expected or pool.array_per_layer:
            raise ValueError(
                f"this decoder runs its layers in a loop of {self.period}, so their pages must lie at equal distances "
                "in one array a group: create the pool with the windows of the decoder and without array_per_layer, or "
                "make the decoder with period=None."
            )
        return LayerPlace(first.group, first.index + step * stride)

    def _hidden(self, tokens, positions, attend, pool: PagePool | None):
        """The residual stream after the last layer, [*T, D], and the pool.

        Args:
            tokens: token ids.
            positions: of the tokens.
            attend: `(pool, entry, step, q, k, v, sinks) -> (out, pool)`, with the entry of the layers and the step of
                the loop over them, which together say which layer it is.
            pool: what goes through `attend` from layer to layer.
        """
        config = self.config
        x = self.embed.weight[...][tokens]
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        ropes = [config.layer_rope(numbers[0]) for numbers in self._layer_numbers]
        angles = {rope: rope.angles(positions, config.head_dim) for rope in set(ropes)}

        def run(layer: Layer, entry: int, step: int | Array, x, pool):
            def attend_here(q, k, v, sinks):
                nonlocal pool
                out, pool = attend(pool, entry, step, q, k, v, sinks)
                return out

            return layer(x, angles[ropes[entry]], attend_here), pool

        num_stacks = self.period or 0
        if num_stacks:
            graphs, weights = zip(*(nnx.split(layer) for layer in self.layers[:num_stacks]), strict=True)

            def run_period(carry, this):
                step, weights = this
                for entry, (graph, own) in enumerate(zip(graphs, weights, strict=True)):
                    carry = run(nnx.merge(graph, own), entry, step, *carry)
                return carry, None

            steps = jnp.arange(len(self._layer_numbers[0]), dtype=jnp.int32)
            (x, pool), _ = lax.scan(run_period, (x, pool), (steps, weights))
        for entry, layer in list(enumerate(self.layers))[num_stacks:]:
            x, pool = run(layer, entry, 0, x, pool)
        return x, pool

    def _logits(self, x):
        logits = (self.embed if self.head is None else self.head)(self.norm(x)).astype(jnp.float32)
        logits = logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
