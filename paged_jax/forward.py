"""What the library asks of a decoder: one pure function."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32

from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool


@runtime_checkable
class Forward(Protocol):
    """A decoder: computes the packed new tokens of many sequences against the cache.

        def forward(params, tokens, pool, metadata):
            x = params["embed"][tokens]
            for i, layer in enumerate(params["layers"]):
                q, k, v = ...                                   # RoPE takes metadata.positions
                out, pool = paged_attention(q, k, v, pool, metadata, i)
                x = ...
            return x[metadata.logits_at] @ params["head"], pool

    A step computes T new tokens of several sequences, packed one after the other; V is the size of the vocabulary, and
    Z the number of places at which the step asks for logits, one for each sequence unless it is told otherwise.

    Pure, and not jitted: whoever calls it jits the whole step. It is static under jit, so pass the same function object
    each time, or everything compiles again.

    Examples:
        The smallest decoder: after token t comes t + 1. It looks at the last token only, and so needs no attention.

        >>> def forward(params, tokens, pool, metadata):
        ...     return params[tokens[metadata.logits_at]], pool
        >>> params = 9 * jnp.roll(jnp.eye(8), 1, axis=1)  # [V, V]: the logits after each token
        >>> cache, active = KVCache.create(config).reserve(jnp.array([1, 1]))
        >>> metadata = AttentionMetadata.decode(cache.tables, active)
        >>> logits, pool = forward(params, jnp.array([3, 6]), cache.pool, metadata)
        >>> jnp.argmax(logits, axis=-1).tolist()
        [4, 7]
    """

    def __call__(
        self, params: Any, tokens: Int32[Array, " T"], pool: PagePool, metadata: AttentionMetadata, /
    ) -> tuple[Float[Array, "Z V"], PagePool]:
        """Runs the decoder.

        Args:
            params: its parameters, any pytree.
            tokens: the new tokens of all sequences, packed; padding after them.
            pool: the pages of all layers.
            metadata: where each token stands.

        Returns:
            Logits at the tokens `metadata.logits_at`, and the pool with the new keys and values in it.
        """
        ...
