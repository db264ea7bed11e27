"""A paged cache for models in Flax linen."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int32

from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool
from paged_jax.flax.step import Call, LayerPages, Step, check_pool, finish, refuse


class PagedCache(nn.Module):
    """The paged cache of one layer: `attention_fn` of a Flax attention layer, or called by attention of your own.

        attn = nn.MultiHeadDotProductAttention(num_heads, attention_fn=PagedCache())
        attn(x, mask=metadata)

    Its pages are a variable of the collection `cache`, which `paged_step` fills for the course of a step. It has no
    parameters: a model has the same `params` with and without it.

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
        pages: Any = self.variable("cache", "pages", lambda: None) if has_cache else None
        if self.is_initializing():
            return jnp.zeros_like(query)
        if pages is None or pages.value is None:
            raise ValueError("a PagedCache has no pages outside of a step: use paged_step(module, variables).")
        out, pages.value = pages.value.attend(
            query, key, value, mask,
            scale=self.scale, window=self.window, soft_cap=self.soft_cap, sinks=sinks,
            implementation=self.implementation,
        )  # fmt: skip
        return out


def _call(module: nn.Module, tokens: Int32[Array, " T"], metadata: AttentionMetadata) -> Float[Array, "B V"]:
    return module(tokens, metadata)  # pyright: ignore[reportCallIssue]  nn.Module itself has no __call__


def init(module: nn.Module, rngs: Any, call: Call = _call) -> dict[str, Any]:
    """Initial variables of a model that is called with tokens and metadata, as `paged_step` takes it.

    Args:
        module: the model.
        rngs: a key, or keys by name, as for `module.init`.
        call: see `paged_step`.
    """
    return _without_cache(_init(module, rngs, call))


def paged_step(module: nn.Module, variables: Any, call: Call = _call) -> Step:
    """Makes a model the pure step of a decode loop.

    The pool's layers belong to the model's `PagedCache`s in the order of their paths, numbers in names compared as
    numbers. Collections other than `cache` are read and never updated.

    Args:
        module: holds a `PagedCache` in every attention layer.
        variables: of the model, for example `{"params": ...}`; those of the collection `cache` are not used.
        call: `(module, tokens, metadata) -> logits [B, V]` at each sequence's last new token, for a model that wants
            to be called in another way.

    Returns:
        The step; its `params` are the variables.

    Raises:
        ValueError: the model has no `PagedCache`, or an attention layer has `decode=True`.
    """
    cache = flatten_dict(jax.eval_shape(lambda: _init(module, jax.random.key(0), call)).get("cache", {}))
    paths = [path for path in cache if path[-1] == "pages"]
    paths.sort(key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", ".".join(path))])
    if not paths:
        raise ValueError(
            f"{type(module).__name__} has no PagedCache: give every attention layer one, for example "
            "nn.MultiHeadDotProductAttention(num_heads, attention_fn=PagedCache())."
        )
    if dense := [path for path in cache if path[-1] == "cached_key"]:
        raise ValueError(
            f"{_name(dense[0])} has decode=True, so Flax would fill its own dense cache first: a PagedCache needs "
            "decode=False."
        )

    def forward(params, tokens: Int32[Array, " T"], pool: PagePool, metadata: AttentionMetadata):
        check_pool(pool, [_name(path) for path in paths])
        pages = {path: LayerPages(pages, i) for i, (path, pages) in enumerate(zip(paths, pool.layers, strict=True))}
        variables = {**params, "cache": unflatten_dict(pages)}
        logits, new = module.apply(variables, tokens, metadata, method=call, mutable=["cache"])
        written: dict[tuple[str, ...], Any] = flatten_dict(new["cache"])
        return finish(logits, {_name(path): written[path] for path in paths}, metadata)

    return Step(forward, _without_cache(variables))


def _without_cache(variables: Any) -> dict[str, Any]:
    return {name: collection for name, collection in variables.items() if name != "cache"}


def _init(module: nn.Module, rngs: Any, call: Call):
    """All variables, from a step of one sequence of one token."""
    one = jnp.zeros(1, jnp.int32)
    return module.init(rngs, one, AttentionMetadata(one[None], one, jnp.zeros(2, jnp.int32), one, 1), method=call)


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path[:-1])
