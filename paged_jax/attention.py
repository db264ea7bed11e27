"""Attention over a paged cache, as a layer sees it: new queries, keys and values, its pages, the step's metadata."""

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

import pallas_kernels
from paged_jax.cache.mesh import HEADS, MODEL_AXIS, WHOLE, find_mesh, split_heads
from paged_jax.cache.metadata import AttentionMetadata
from pallas_kernels import Pages


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    pages: Pages,
    metadata: AttentionMetadata,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Pages]:
    """Writes the new keys and values to their pages, then lets every query attend to its own sequence.

    Args:
        q: queries of the packed new tokens.
        k: their keys; None, with v: attend without writing.
        v: their values.
        pages: the layer's pages.
        metadata: where each token stands, as this layer sees it; see `AttentionMetadata.layer`.
        scale: factor on the scores; None: H ** -0.5.
        window: a query at position p sees the keys in (p - window, p]; None: all before it.
        soft_cap: c in c * tanh(score / c); None: no cap.
        sinks: an extra logit for each query head that takes softmax mass and adds no value.
        implementation: which kernel; None: by platform.

    Returns:
        The attention output in q's dtype, and the layer's pages with the new keys and values in them.

    Raises:
        ValueError: at trace time, for shapes or options that do not fit together.
        NotImplementedError: the named implementation cannot do this.
    """
    if isinstance(metadata.page_table, tuple):
        raise ValueError(
            f"the metadata is that of {len(metadata.groups)} groups of layers: give layer i its metadata.layer(i)"
        )
    given_up = metadata.groups[0].window if metadata.groups else None
    if given_up is not None and (window is None or window > given_up):
        sees = "everything" if window is None else f"{window} tokens"
        raise ValueError(
            f"this layer sees {sees}, but its cache gives up pages behind a window of {given_up}: the windows of the "
            "cache config must be those of the layers"
        )

    def attend(sinks, q, k, v, pages, *where):
        result = pallas_kernels.paged_attention(
            q,
            k,
            v,
            pages,
            *where,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            max_query_len=metadata.max_query_len,
            implementation=implementation,
        )
        return result.out, result.pages

    specs = PartitionSpec(MODEL_AXIS), HEADS, HEADS, HEADS, HEADS, WHOLE, WHOLE, WHOLE
    attend_split = split_heads(attend, find_mesh((pages, q)), pages.num_kv_heads, specs, (HEADS, HEADS))
    return attend_split(sinks, q, k, v, pages, metadata.page_table, metadata.lengths, metadata.query_starts)
