"""A paged cache for models in Flax nnx."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int32

from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool
from paged_jax.flax.step import Call, LayerPages, Step, check_pool, finish, refuse


class PagedCache(nnx.Module):
    """The paged cache of one layer: `attention_fn` of an `nnx.MultiHeadAttention`, or called by attention of your own.

        self.attn = nnx.MultiHeadAttention(..., decode=False, attention_fn=PagedCache(), rngs=rngs)
        self.attn(x, mask=metadata)

    It owns no memory: `paged_step` lends it the layer's pages for the course of a step.

    Args:
        scale: factor on the scores; None: H ** -0.5.
        window: a query at position p sees the keys in (p - window, p]; None: all before it.
        soft_cap: c in c * tanh(score / c); None: no cap.
        implementation: which kernel; None: by platform.
    """

    def __init__(
        self,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        implementation: str | None = None,
    ):
        self.scale = scale
        self.window = window
        self.soft_cap = soft_cap
        self.implementation = implementation
        self.pages: nnx.Cache[LayerPages | None] = nnx.Cache(None)  # there are some during a step alone

    def __call__(
        self,
        query: Float[Array, "*T N H"],
        key: Float[Array, "... K H"],
        value: Float[Array, "... K H"],
        mask: Any = None,
        *,
        sinks: Float[Array, " N"] | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        module: Any = None,
        **_: Any,
    ) -> Float[Array, "*T N H"]:
        """Writes the new keys and values to their pages, then lets every query attend to its own sequence.

        Args:
            query: of the new tokens, whose leading axes, flattened, are the packed tokens of the step.
            key: their keys.
            value: their values.
            mask: the step's `AttentionMetadata`, which is what says who sees whom; always causal.
            sinks: an extra logit for each query head that takes softmax mass and adds no value.
            dropout_rate, deterministic, module: what Flax passes; dropout and `sow_weights` are refused. Its other
                options change nothing and are ignored.

        Returns:
            The attention output, shaped as `query`.

        Raises:
            ValueError: at trace time, naming what does not fit.
        """
        refuse(dropout=dropout_rate > 0 and not deterministic, weights=module is not None)
        layer = self.pages.get_value()
        if layer is None:
            raise ValueError("a PagedCache has no pages outside of a step: use paged_step(model).")
        out, layer = layer.attend(
            query, key, value, mask,
            scale=self.scale, window=self.window, soft_cap=self.soft_cap, sinks=sinks,
            implementation=self.implementation,
        )  # fmt: skip
        self.pages.set_value(layer)
        return out


def paged_step(model: nnx.Module, call: Call = lambda model, tokens, metadata: model(tokens, metadata)) -> Step:
    """Splits a model once and makes it the pure step of a decode loop.

    The pool's layers belong to the model's `PagedCache`s in the order of their paths. State other than the pages is
    read and never updated.

    Args:
        model: holds a `PagedCache` in every attention layer.
        call: `(model, tokens, metadata) -> logits [B, V]` at each sequence's last new token, for a model that wants
            to be called in another way.

    Returns:
        The step; its `params` are those of `weights(model)`.

    Raises:
        ValueError: the model has no `PagedCache`, or an attention layer has one and `decode=True`.
    """
    layers = _caches(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no PagedCache: give every attention layer one, for example "
            "nnx.MultiHeadAttention(..., decode=False, attention_fn=PagedCache())."
        )
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention) and module.decode and _name((*path, "attention_fn")) in layers:
            raise ValueError(
                f"{_name(path)} has decode=True, so Flax would fill its own dense cache first: a PagedCache needs "
                "decode=False."
            )
    graph = nnx.graphdef(model)

    def forward(params, tokens: Int32[Array, " T"], pool: PagePool, metadata: AttentionMetadata):
        model = nnx.merge(graph, params)
        caches = _caches(model)
        check_pool(pool, list(caches))
        for i, (cache, pages) in enumerate(zip(caches.values(), pool.layers, strict=True)):
            cache.pages.set_value(LayerPages(pages, i))
        logits = call(model, tokens, metadata)
        return finish(logits, {name: cache.pages.get_value() for name, cache in caches.items()}, metadata)

    return Step(forward, weights(model))


def weights(model: nnx.Module) -> dict:
    """The weights of a model as `Step.params` has them: pass them to `Step.forward` when the model has learned more."""
    return nnx.to_pure_dict(nnx.state(model))


def _caches(model: nnx.Module) -> dict[str, PagedCache]:
    return {_name(path): module for path, module in nnx.iter_modules(model) if isinstance(module, PagedCache)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
