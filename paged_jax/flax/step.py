"""What nnx and linen have in common: the pages of a layer during a step, and the jitted step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from paged_jax.attention import Pages, paged_attention
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool

Forward = Callable[[Any, Int32[Array, " T"], PagePool, AttentionMetadata], tuple[Float[Array, "B V"], PagePool]]
Call = Callable[[Any, Int32[Array, " T"], AttentionMetadata], Float[Array, "B V"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A Flax decoder as a pure function, split from its weights once.

    Called, it runs one jitted step with its own weights; the pool that is passed dies, its memory is the new pool's.
    `forward` and `params` are what `decode_loop` and `Generator` take. The weights share their memory with the module
    they came from: do not donate them.

    Args:
        forward: `(params, tokens, pool, metadata) -> (logits, pool)`, pure and not jitted.
        params: the weights, plain dicts of arrays. For other weights pass those to `forward`; nothing compiles anew.
    """

    forward: Forward
    params: Any

    def __call__(
        self, tokens: Int32[Array, " T"], pool: PagePool, metadata: AttentionMetadata
    ) -> tuple[Float[Array, "B V"], PagePool]:
        """Logits at each sequence's last new token, and the pool with the new keys and values in it."""
        return self._jitted(self.params, tokens, pool, metadata)

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.forward, donate_argnums=2)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pages"], meta_fields=["index", "is_written"])
@dataclasses.dataclass(frozen=True)
class LayerPages:
    """The pages of one layer in the course of one step."""

    pages: Pages
    index: int  # static: the layer's number
    is_written: bool = False  # static: a layer that runs twice in a step would overwrite its own keys

    def attend(
        self, query: Array, key: Array, value: Array, metadata: Any, **options: Any
    ) -> tuple[Array, "LayerPages"]:
        """`paged_attention` for arrays `[..., heads, H]` whose leading axes, flattened, are the packed tokens.

        Raises:
            ValueError: at trace time, for arguments that belong to another kind of attention or another pool.
        """
        if not isinstance(metadata, AttentionMetadata):
            given = "None" if metadata is None else f"an object of type {type(metadata).__name__}"
            raise ValueError(
                f"mask is {given}, but a PagedCache needs the step's AttentionMetadata there: pass the metadata down "
                "to the attention layer as its mask (and leave decode=False: with decode=True, Flax makes a mask of "
                "its own for a dense cache of its own)."
            )
        num_tokens, pages, metadata = len(metadata.positions), self.pages, metadata.layer(self.index)
        if query.shape[:-2] != key.shape[:-2] or np.prod(query.shape[:-2], dtype=int) != num_tokens:
            raise ValueError(
                f"query {query.shape} and key {key.shape} must both hold the {num_tokens} tokens that the metadata "
                "speaks of: self-attention over the packed new tokens, with decode=False."
            )
        if key.shape[-2:] != (pages.num_kv_heads, pages.head_dim):
            raise ValueError(
                f"the layer has {key.shape[-2]} KV heads of size {key.shape[-1]}, the pool has pages for "
                f"{pages.num_kv_heads} of size {pages.head_dim}: create it with num_kv_heads={key.shape[-2]}, "
                f"head_dim={key.shape[-1]}."
            )
        if self.is_written:
            raise ValueError(
                "a PagedCache was called twice in one step, so the second call would overwrite the keys of the first: "
                "give every application of a layer a PagedCache of its own."
            )
        q, k, v = (x.reshape(num_tokens, *x.shape[-2:]) for x in (query, key, value))
        out, pages = paged_attention(q, k, v, pages, metadata, **options)
        return out.reshape(query.shape), LayerPages(pages, self.index, is_written=True)


def refuse(dropout: bool, weights: bool) -> None:
    """Raises ValueError for what attention layers can do and a paged cache cannot."""
    if dropout:
        raise ValueError("a PagedCache has no dropout: pass deterministic=True to the attention layer.")
    if weights:
        raise ValueError("sow_weights=True, but a PagedCache never forms the weights: leave it False.")


def check_pool(pool: PagePool, layers: Sequence[str]) -> None:
    """Raises ValueError unless there are pages for each layer that has a PagedCache."""
    if len(pool.layers) != len(layers):
        raise ValueError(
            f"the pool has pages for {len(pool.layers)} layers, but {len(layers)} layers have a PagedCache "
            f"({', '.join(layers)}): give every attention layer one, and create the pool with num_layers={len(layers)}."
        )


def finish(logits: Array, layers: dict[str, Any], metadata: AttentionMetadata) -> tuple[Array, PagePool]:
    """What a step returns, once it is certain that every layer ran and that the logits are those of the sequences."""
    num_rows = len(metadata.lengths)
    if logits.ndim != 2 or len(logits) != num_rows:
        raise ValueError(
            f"the model returned logits of shape {logits.shape}, a step needs [B, V] with B = {num_rows}: index the "
            "packed tokens with metadata.last_tokens before the vocabulary projection."
        )
    idle = [name for name, layer in layers.items() if not layer.is_written]
    if idle:
        raise ValueError(f"the PagedCache of {', '.join(idle)} was not called: run its layer, or remove it.")
    return logits, PagePool(tuple(layer.pages for layer in layers.values()))
