"""Attention over a paged cache, as a layer sees it: new queries, keys and values, the pool, the step's metadata."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

import pallas_kernels
from paged_jax.cache.mesh import HEADS, MODEL_AXIS, WHOLE, find_mesh, split_heads
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import LayerPlace, PagePool, layer_pages
from pallas_kernels import Pages, Sharing
from pallas_kernels.sharing import step_pays as step_pays  # for steps, which import no kernels

__all__ = ["find_sharing", "paged_attention"]


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    pool: PagePool,
    metadata: AttentionMetadata,
    layer: int | LayerPlace,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], PagePool]:
    """Writes the new keys and values of a layer to their pages, then lets every query attend to its own sequence.

    Args:
        q: the queries of the new tokens, packed; `[T, N, H]`.
        k: their keys, `[T, K, H]`; None for k and v: attend without writing.
        v: their values, `[T, K, H]`.
        pool: the pages of all layers.
        metadata: where each token stands.
        layer: the number of the layer; or for layers that run in a loop its place (`PagePool.place`), whose index may
            be traced.
        scale: factor on the scores; None: H ** -0.5.
        window: a query at position p sees the keys in (p - window, p]; None: all before it.
        soft_cap: c in c * tanh(score / c); None: no cap.
        sinks: an extra logit for each query head that takes softmax mass and adds no value.
        implementation: the kernel, by its name in `pallas_kernels.registry.BACKENDS`; None: chosen by platform.

    Returns:
        The attention output in q's dtype, and the pool with the new keys and values in it.

    Raises:
        ValueError: at trace time, for shapes or options that do not fit together.
        NotImplementedError: the named implementation cannot do this, or a gradient is taken through the pages.

    Examples:
        >>> cache, granted = KVCache.create(config).reserve(jnp.array([3, 0]))
        >>> metadata = AttentionMetadata.ragged(cache.tables, jnp.array([3, 0]), num_tokens=3, active=granted)
        >>> q, k, v = jnp.ones((3, 3, 1, 8))
        >>> out, pool = paged_attention(q, k, v, cache.pool, metadata, layer=0)
        >>> out.shape
        (3, 1, 8)
    """
    check_layer(q, k, v, pool, metadata)
    place = layer if isinstance(layer, LayerPlace) else pool.place(layer)
    given_up = pool.groups[place.group].window
    if given_up is not None and (window is None or window > given_up):
        sees = "everything" if window is None else f"{window} tokens"
        raise ValueError(
            f"this layer sees {sees}, but its cache gives up pages before a window of {given_up}: the windows of the "
            "cache config must be those of the layers"
        )
    array, first_page = pool.locate(place)
    if isinstance(first_page, int) and first_page > 0:  # as data, so that all layers share what is compiled
        first_page = jax.lax.optimization_barrier(jnp.int32(first_page))
    q, k, v, pages = refuse_gradients((q, k, v, pool.arrays[array]))
    out, pages = attend_pages(
        q, k, v, pages, layer_pages(metadata.page_tables[place.group], first_page), metadata,
        scale=scale, window=window, soft_cap=soft_cap, sinks=sinks, implementation=implementation,
        sharing=None if metadata.sharing is None else metadata.sharing[place.group],
    )  # fmt: skip
    return out, pool.replace(array, pages)


def check_layer(q: Any, k: Any, v: Any, pool: Any, metadata: Any) -> None:
    """Raises ValueError, at trace time, where a layer's arrays are not those of the step."""
    if not isinstance(metadata, AttentionMetadata):
        raise ValueError(
            f"metadata is an object of type {type(metadata).__name__}: build it from the page tables, in each step "
            "after reserve, by AttentionMetadata.decode or AttentionMetadata.ragged"
        )
    if not isinstance(pool, PagePool):
        raise ValueError(f"pool is an object of type {type(pool).__name__}: pass the PagePool, which is cache.pool")
    num_tokens = metadata.positions.shape[0]
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x is None:
            continue
        if x.ndim != 3:
            raise ValueError(
                f"{name} has shape {x.shape}: the new tokens of all sequences lie packed in one axis, [tokens, heads, "
                "head size]; reshape [batch, length, heads, head size] to that"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}: queries, keys and values are floating-point numbers")
        if x.shape[0] != num_tokens:
            raise ValueError(
                f"{name} has {x.shape[0]} tokens, but the metadata of this step {num_tokens}: give it one for each "
                "token that the metadata was built for, padding included (num_tokens of AttentionMetadata.ragged)"
            )


def find_sharing(metadata: AttentionMetadata, pool: PagePool) -> AttentionMetadata:
    """The same step, with the pages that its sequences share read off the page tables.

        metadata = find_sharing(AttentionMetadata.decode(cache.tables, active), cache.pool)

    Do it once a step, before the layers. It pays where several sequences share hundreds of tokens: a system prompt, the
    samples of a prompt, beams (`pallas_kernels/sharing.py` has the measurements). A sequence that has given up its
    first pages before a window shares nothing in that group of layers.

    Args:
        metadata: of the step.
        pool: the pages of all layers.

    Examples:
        Eight rows share 150 tokens, two pages of 64 and a part of a third; whoever appends to that copies it.

        >>> config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=16, max_sequences=8,
        ...                      max_pages_per_sequence=4, page_size=64)
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([150] + [0] * 7))
        >>> tables, _ = tables.fork(jnp.zeros(7, jnp.int32), jnp.arange(1, 8))
        >>> cache, active = KVCache(tables, PagePool.create(config)).reserve(jnp.ones(8, jnp.int32))
        >>> metadata = find_sharing(AttentionMetadata.decode(cache.tables, active), cache.pool)
        >>> metadata.sharing[0].tokens[0].tolist()
        [128, 128, 128, 128, 128, 128, 128, 128]
    """
    page_size = pool.arrays[0].page_size
    groups = (pallas_kernels.find_groups(table, metadata.lengths, page_size) for table in metadata.page_tables)
    return dataclasses.replace(metadata, sharing=tuple(groups))


def attend_pages(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    pages: Pages,
    page_table: Int32[Array, "R M"],
    metadata: AttentionMetadata,
    *,
    sinks: Float[Array, " N"] | None,
    sharing: Sharing | None,
    **options,
) -> tuple[Float[Array, "T N H"], Pages]:
    """`paged_attention` over one array of pages, by each device on the KV heads that it holds."""

    def attend(sinks, sharing, q, k, v, pages, *where):
        result = pallas_kernels.paged_attention(
            q, k, v, pages, *where, sinks=sinks, sharing=sharing, max_query_len=metadata.max_query_len, **options
        )
        return result.out, result.pages

    specs = PartitionSpec(MODEL_AXIS), WHOLE, HEADS, HEADS, HEADS, HEADS, WHOLE, WHOLE, WHOLE
    attend_split = split_heads(attend, find_mesh((pages, q)), pages.num_kv_heads, specs, (HEADS, HEADS))
    return attend_split(sinks, sharing, q, k, v, pages, page_table, metadata.lengths, metadata.query_starts)


@jax.custom_jvp
def refuse_gradients(arrays: Any) -> Any:
    """The arrays themselves; whoever differentiates what is computed with them gets one sentence that says what to do.

    Without it, the first loop or scatter of a kernel that has no derivative would raise, in its own words.
    """
    return arrays


@refuse_gradients.defjvp
def _raise(primals, tangents):
    raise NotImplementedError(
        "attention over pages has no gradient: differentiate a pass over the whole sequence instead, which needs no "
        "cache (for the decoders of paged_jax.models that is `dense_forward`), and pass parameters that are only "
        "sampled with through jax.lax.stop_gradient."
    )
