"""What nnx and linen have in common: the pages of a layer during a step, and the jitted step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from paged_jax.attention import paged_attention
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import LayerPlace, PagePool
from paged_jax.forward import Forward

Call = Callable[[Any, Int32[Array, " T"], AttentionMetadata], Float[Array, "Z V"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A Flax decoder as a pure function, split from its weights once.

    Called, it runs one jitted step with its own weights; the pool that is passed dies, its memory is the new pool's.
    `forward` and `params` are what every loop of this library takes. The weights share their memory with the module
    they came from: do not donate them.

    Args:
        forward: the decoder as a pure function, not jitted.
        params: the weights, plain dicts of arrays. For other weights pass those to `forward`; nothing compiles anew.
    """

    forward: Forward
    params: Any

    def __call__(
        self, tokens: Int32[Array, " T"], pool: PagePool, metadata: AttentionMetadata
    ) -> tuple[Float[Array, "Z V"], PagePool]:
        """Logits at the tokens `metadata.logits_at`, and the pool with the new keys and values in it."""
        return self._jitted(self.params, tokens, pool, metadata)

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self.forward, donate_argnums=2)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["offset"], meta_fields=["first", "is_written"])
@dataclasses.dataclass(frozen=True)
class LayerUse:
    """Which layers of the pool a PagedCache is, and whether it was called in this step.

    Args:
        first: the place of its first layer; static.
        offset: which layer past the first; of a PagedCache that a scan runs over, one entry for each of its steps;
            None: there is one layer.
        is_written: whether it was called, after which it refuses another call; static.
    """

    first: LayerPlace
    offset: Int32[Array, "..."] | None = None
    is_written: bool = False

    @property
    def place(self) -> LayerPlace:
        """The layer, inside a scan that of the step."""
        return self.first if self.offset is None else self.first._replace(index=self.first.index + self.offset)

    def attend(
        self, pool: PagePool, query: Array, key: Array, value: Array, metadata: Any, **options: Any
    ) -> tuple[Array, PagePool, "LayerUse"]:
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
        num_tokens, pages = len(metadata.positions), pool.arrays[0]
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
        out, pool = paged_attention(q, k, v, pool, metadata, self.place, **options)
        return out.reshape(query.shape), pool, dataclasses.replace(self, is_written=True)


def refuse(dropout: bool, weights: bool) -> None:
    """Raises ValueError for what attention layers can do and a paged cache cannot."""
    if dropout:
        raise ValueError("a PagedCache has no dropout: pass deterministic=True to the attention layer.")
    if weights:
        raise ValueError("sow_weights=True, but a PagedCache never forms the weights: leave it False.")


def check_pool(pool: PagePool, layers: Mapping[str, int]) -> None:
    """Raises ValueError unless there are pages for each layer that has a PagedCache.

    Args:
        pool: the step's.
        layers: by the name of each PagedCache, how many layers it is.
    """
    num_layers = sum(layers.values())
    if pool.num_layers != num_layers:
        raise ValueError(
            f"the pool has pages for {pool.num_layers} layers, but the model has PagedCaches for {num_layers} "
            f"({', '.join(layers)}): give each attention layer a PagedCache of its own (an object that several layers "
            f"share counts once), or create the pool with num_layers={num_layers}."
        )


def finish(logits: Array, uses: Mapping[str, LayerUse], metadata: AttentionMetadata) -> Array:
    """The logits, once it is certain that every layer ran and that the logits are those that were asked for."""
    num_logits = len(metadata.logits_at)
    if logits.ndim != 2 or len(logits) != num_logits:
        raise ValueError(
            f"the model returned logits of shape {logits.shape}, a step needs [Z, V] with Z = {num_logits}: index the "
            "packed tokens with metadata.logits_at before the vocabulary projection."
        )
    idle = [name for name, use in uses.items() if not use.is_written]
    if idle:
        raise ValueError(f"the PagedCache of {', '.join(idle)} was not called: run its layer, or remove it.")
    return logits
