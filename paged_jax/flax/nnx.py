"""A paged cache for models in Flax nnx."""

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool
from paged_jax.flax.step import Call, LayerUse, Step, check_pool, finish, refuse

__all__ = ["LentPool", "PagedCache", "paged_step", "weights"]


class LentPool(nnx.Variable):
    """The pool during a `paged_step`: one Variable that all `PagedCache`s of a model share.

    Models need it by name only where their layers run under `nnx.scan`, which must carry it; see `PagedCache`.
    """


class LentLayer(nnx.Variable):
    """Which layer of the pool a `PagedCache` is during a step."""


LENT = nnx.Any(LentPool, LentLayer)  # what is no part of the weights
SCAN_ADVICE = (
    "A scan over layers with a PagedCache must carry the pool and take everything else in slices: "
    "nnx.scan(in_axes=(nnx.StateAxes({LentPool: nnx.Carry, ...: 0}), nnx.Carry, None), out_axes=nnx.Carry)."
)


class PagedCache(nnx.Module):
    """The paged cache of one layer, for a model that `paged_step` runs.

    It is the `attention_fn` of an `nnx.MultiHeadAttention`, or is called by attention of your own:

        self.attn = nnx.MultiHeadAttention(..., decode=False, attention_fn=PagedCache(), rngs=rngs)
        self.attn(x, mask=metadata)

    It owns no memory: `paged_step` lends it the pool for the course of a step.

    In layers that were made under `nnx.vmap` and run under `nnx.scan`, it is as many layers as the scan has steps. The
    scan must carry the pool from layer to layer:

        @nnx.scan(in_axes=(nnx.StateAxes({LentPool: nnx.Carry, ...: 0}), nnx.Carry, None), out_axes=nnx.Carry)
        def run(block, x, metadata):
            return block(x, metadata)

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
        self.pool: LentPool = LentPool(None)  # there is one only during a step
        # Stacked with the weights by nnx.vmap, its shape says how many layers this is.
        self.layer: LentLayer = LentLayer(jnp.zeros((), jnp.int32))

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
        pool = self.pool.get_value()
        if pool is None:
            raise ValueError("a PagedCache has no pages outside of a step: use paged_step(model).")
        out, pool, layer = self.layer.get_value().attend(
            pool, query, key, value, mask,
            scale=self.scale, window=self.window, soft_cap=self.soft_cap, sinks=sinks,
            implementation=self.implementation,
        )  # fmt: skip
        self.pool.set_value(pool)
        self.layer.set_value(layer)
        return out


def paged_step(model: nnx.Module, call: Call = lambda model, tokens, metadata: model(tokens, metadata)) -> Step:
    """Splits a model once and makes it the pure step of a decode loop.

    The pool's layers belong to the model's `PagedCache`s in the order of their paths; one under a scan takes as many
    layers as the scan has steps, one after the other. State other than the pool is read and never updated.

    Args:
        model: holds a `PagedCache` in every attention layer.
        call: `(model, tokens, metadata) -> logits [Z, V]` at the tokens `metadata.logits_at`, for a model that wants
            to be called in another way.

    Returns:
        The step; its `params` are those of `weights(model)`.

    Raises:
        ValueError: the model has no `PagedCache`, or an attention layer has one and `decode=True`.

    Examples:
        >>> class Decoder(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.embed = nnx.Embed(16, 8, rngs=rngs)
        ...         self.attn = nnx.MultiHeadAttention(1, 8, decode=False, attention_fn=PagedCache(), rngs=rngs)
        ...
        ...     def __call__(self, tokens, metadata):
        ...         x = self.embed(tokens)
        ...         return self.embed.attend((x + self.attn(x, mask=metadata))[metadata.logits_at])
        >>> step = paged_step(Decoder(nnx.Rngs(0)))
        >>> cache, active = KVCache.create(config).reserve(jnp.array([3, 0]))
        >>> metadata = AttentionMetadata.ragged(cache.tables, jnp.array([3, 0]), num_tokens=3, active=active)
        >>> logits, pool = step(jnp.array([5, 6, 7]), cache.pool, metadata)
        >>> logits.shape  # [Z, V]: a place for each row; that of row 1 has no meaning, since it computes nothing
        (2, 16)
    """
    shapes = {name: cache.layer.get_value().shape for name, cache in _caches(model).items()}
    if not shapes:
        raise ValueError(
            f"{type(model).__name__} has no PagedCache: give every attention layer one, for example "
            "nnx.MultiHeadAttention(..., decode=False, attention_fn=PagedCache())."
        )
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention) and module.decode and _name((*path, "attention_fn")) in shapes:
            raise ValueError(
                f"{_name(path)} has decode=True, so Flax would fill its own dense cache first: a PagedCache needs "
                "decode=False."
            )
    graph, _, lent = nnx.split(model, nnx.Not(LENT), LENT)

    def forward(params, tokens: Int32[Array, " T"], pool: PagePool, metadata: AttentionMetadata):
        model = nnx.merge(graph, params, lent)
        caches, shared = _caches(model), LentPool(pool)
        for name, use in _layers(pool, shapes).items():
            caches[name].pool = shared
            caches[name].layer = LentLayer(use)
        try:
            logits = call(model, tokens, metadata)
        except Exception as error:
            if any(shapes.values()):
                error.add_note(SCAN_ADVICE)
            raise
        logits = finish(logits, {name: cache.layer.get_value() for name, cache in caches.items()}, metadata)
        written = shared.get_value()
        if any(new.data is old.data for new, old in zip(written.arrays, pool.arrays, strict=True)):
            raise ValueError(f"a transform around the layers lost what they wrote to the pool. {SCAN_ADVICE}")
        return logits, written

    return Step(forward, weights(model))


def weights(model: nnx.Module) -> dict:
    """The weights of a model as `Step.params` has them: pass them to `Step.forward` when the model has learned more.

    Examples:
        >>> weights(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))["kernel"].shape
        (2, 3)
    """
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(LENT)))


def _layers(pool: PagePool, shapes: dict[str, tuple[int, ...]]) -> dict[str, LayerUse]:
    """The layers of the pool by the name of the PagedCache that they belong to."""
    check_pool(pool, {name: math.prod(shape) for name, shape in shapes.items()})
    uses, next_layer = {}, 0
    for name, shape in shapes.items():
        num_layers = math.prod(shape)
        places = [pool.place(layer) for layer in range(next_layer, next_layer + num_layers)]
        next_layer += num_layers
        if not shape:
            uses[name] = LayerUse(places[0])
            continue
        if pool.array_per_layer or len({place.group for place in places}) > 1:
            raise ValueError(
                f"{name} is {num_layers} layers that run in a scan, so their pages must lie in one array: create the "
                f"pool without array_per_layer, and with the same window for the layers {next_layer - num_layers} to "
                f"{next_layer - 1}."
            )
        uses[name] = LayerUse(places[0], jnp.arange(num_layers, dtype=jnp.int32).reshape(shape))
    return uses


def _caches(model: nnx.Module) -> dict[str, PagedCache]:
    return {_name(path): module for path, module in nnx.iter_modules(model) if isinstance(module, PagedCache)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
