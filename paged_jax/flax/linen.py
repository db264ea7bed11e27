"""A paged cache for models in Flax linen."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int32

from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import LayerPlace, PagePool
from paged_jax.flax.step import Call, LayerUse, Step, check_pool, finish, refuse

__all__ = ["PagedCache", "init", "paged_step"]

SCAN_ADVICE = (
    "Layers under nn.scan cannot own pages: run them in a Python loop, with their weights taken apart, for example "
    "{f'Block_{i}': jax.tree.map(lambda w: w[i], params['ScanBlock_0']) for i in range(num_layers)}."
)


class PagedCache(nn.Module):
    """The paged cache of one layer, for a model that `paged_step` runs.

    It is the `attention_fn` of a Flax attention layer, or is called by attention of your own:

        attn = nn.MultiHeadDotProductAttention(num_heads, attention_fn=PagedCache())
        attn(x, mask=metadata)

    Its pages are a variable of the collection `cache`, which `paged_step` fills for the course of a step, so the pool
    must have an array for each layer: `CacheConfig(..., array_per_layer=True)`. It has no parameters: a model has the
    same `params` with and without it.

    Args:
        scale: factor on the scores; None: H ** -0.5.
        window: a query at position p sees the keys in (p - window, p]; None: all before it.
        soft_cap: c in c * tanh(score / c); None: no cap.
        implementation: which kernel; None: by platform.
    """

    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "*T N H"],
        key: Float[Array, "... K H"],
        value: Float[Array, "... K H"],
        mask: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        module: Any = None,
        sinks: Float[Array, " N"] | None = None,
    ) -> Float[Array, "*T N H"]:
        """Writes the new keys and values to their pages, then lets every query attend to its own sequence.

        Args:
            query: of the new tokens, whose leading axes, flattened, are the packed tokens of the step.
            key: their keys.
            value: their values.
            mask: the step's `AttentionMetadata`, which is what says who sees whom; always causal.
            dropout_rate, deterministic, module: what Flax passes; dropout and `sow_weights` are refused.
            sinks: an extra logit for each query head that takes softmax mass and adds no value.

        Returns:
            The attention output, shaped as `query`; zeros while the model is initialised.

        Raises:
            ValueError: at trace time, naming what does not fit.
        """
        refuse(dropout=dropout_rate > 0 and not deterministic, weights=module is not None)
        has_cache = self.is_mutable_collection("cache")
        # In a step (pool, layer); before, a number that nn.scan would stack, so that it can be found.
        lent: Any = self.variable("cache", "lent", lambda: jnp.zeros((), jnp.int32)) if has_cache else None
        if self.is_initializing():
            return jnp.zeros_like(query)
        if lent is None or not isinstance(lent.value, tuple):
            raise ValueError("a PagedCache has no pages outside of a step: use paged_step(module, variables).")
        pool, layer = lent.value
        out, pool, layer = layer.attend(
            pool, query, key, value, mask,
            scale=self.scale, window=self.window, soft_cap=self.soft_cap, sinks=sinks,
            implementation=self.implementation,
        )  # fmt: skip
        lent.value = pool, layer
        return out


def _call(module: nn.Module, tokens: Int32[Array, " T"], metadata: AttentionMetadata) -> Float[Array, "Z V"]:
    return module(tokens, metadata)  # pyright: ignore[reportCallIssue]  nn.Module itself has no __call__


def init(module: nn.Module, rngs: Any, call: Call = _call) -> dict[str, Any]:
    """Initial variables of a model that is called with tokens and metadata, as `paged_step` takes it.

    Args:
        module: the model.
        rngs: a key, or keys by name, as for `module.init`.
        call: see `paged_step`.

    Examples:
        >>> class Bigram(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, tokens, metadata):
        ...         return nn.Embed(16, 16)(tokens[metadata.logits_at])
        >>> init(Bigram(), jax.random.key(0))["params"]["Embed_0"]["embedding"].shape
        (16, 16)
    """
    return _without_cache(_init(module, rngs, call))


def paged_step(module: nn.Module, variables: Any, call: Call = _call) -> Step:
    """Makes a model the pure step of a decode loop.

    The pool's layers belong to the model's `PagedCache`s in the order of their paths, numbers in names compared as
    numbers. Collections other than `cache` are read and never updated.

    Args:
        module: holds a `PagedCache` in every attention layer.
        variables: of the model, for example `{"params": ...}`; those of the collection `cache` are not used.
        call: `(module, tokens, metadata) -> logits [Z, V]` at the tokens `metadata.logits_at`, for a model that wants
            to be called in another way.

    Returns:
        The step; its `params` are the variables.

    Raises:
        ValueError: the model has no `PagedCache`, or one under `nn.scan`, or an attention layer has `decode=True`.

    Examples:
        >>> class Decoder(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, tokens, metadata):
        ...         embed = nn.Embed(16, 8)
        ...         x = embed(tokens)
        ...         x = x + nn.MultiHeadDotProductAttention(1, attention_fn=PagedCache())(x, mask=metadata)
        ...         return embed.attend(x[metadata.logits_at])
        >>> variables = init(Decoder(), jax.random.key(0))
        >>> step = paged_step(Decoder(), variables)
        >>> cache = KVCache.create(dataclasses.replace(config, array_per_layer=True))
        >>> cache, active = cache.reserve(jnp.array([1, 1]))
        >>> logits, pool = step(jnp.array([5, 6]), cache.pool, AttentionMetadata.decode(cache.tables, active))
        >>> logits.shape
        (2, 16)
    """
    variables_of_init = jax.eval_shape(lambda: _init(module, jax.random.key(0), call))
    cache: dict[tuple[str, ...], Any] = flatten_dict(variables_of_init.get("cache", {}))
    paths = [path for path in cache if path[-1] == "lent"]
    paths.sort(key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", ".".join(path))])
    if not paths:
        raise ValueError(
            f"{type(module).__name__} has no PagedCache: give every attention layer one, for example "
            f"nn.MultiHeadDotProductAttention(num_heads, attention_fn=PagedCache()). {SCAN_ADVICE}"
        )
    if scanned := [_name(path) for path in paths if cache[path].shape]:
        raise ValueError(f"{', '.join(scanned)} runs under nn.scan. {SCAN_ADVICE}")
    if dense := [path for path in cache if path[-1] == "cached_key"]:
        raise ValueError(
            f"{_name(dense[0])} has decode=True, so Flax would fill its own dense cache first: a PagedCache needs "
            "decode=False."
        )

    def forward(params, tokens: Int32[Array, " T"], pool: PagePool, metadata: AttentionMetadata):
        check_pool(pool, {_name(path): 1 for path in paths})
        if not pool.array_per_layer:
            raise ValueError(
                "this pool has one array for all layers of a group, but a linen module owns the pages of its layer: "
                "create the pool with CacheConfig(..., array_per_layer=True)."
            )
        lent = {path: _lend(pool, layer) for layer, path in enumerate(paths)}
        variables = {**params, "cache": unflatten_dict(lent)}
        logits, new = module.apply(variables, tokens, metadata, method=call, mutable=["cache"])
        returned: dict[tuple[str, ...], Any] = flatten_dict(new["cache"])
        logits = finish(logits, {_name(path): returned[path][1] for path in paths}, metadata)
        return logits, dataclasses.replace(pool, arrays=tuple(returned[path][0].arrays[0] for path in paths))

    return Step(forward, _without_cache(variables))


def _lend(pool: PagePool, layer: int) -> tuple[PagePool, LayerUse]:
    """A pool of one layer's pages, and the layer's place in it."""
    place = pool.place(layer)
    array, _ = pool.locate(place)
    layers = [(0,) if group == place.group else () for group in range(len(pool.groups))]
    groups = tuple(dataclasses.replace(group, layers=own) for group, own in zip(pool.groups, layers, strict=True))
    return PagePool((pool.arrays[array],), groups, array_per_layer=True), LayerUse(LayerPlace(place.group, 0))


def _without_cache(variables: Any) -> dict[str, Any]:
    return {name: collection for name, collection in variables.items() if name != "cache"}


def _init(module: nn.Module, rngs: Any, call: Call):
    """All variables, from a step of one sequence of one token."""
    one = jnp.zeros(1, jnp.int32)
    metadata = AttentionMetadata((one[None],), one, jnp.zeros(2, jnp.int32), one, one, 1)
    return module.init(rngs, one, metadata, method=call)


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path[:-1])
