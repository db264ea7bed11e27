"""Plain attention over whole sequences, without a cache: for training, and as the meaning of the paged path."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dense_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B T K H"],
    v: Float[Array, "*B T K H"],
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    tile: int | None = None,
) -> Float[Array, "*B T N H"]:
    """Causal grouped-query attention over whole sequences; scores and softmax in float32.

    Args:
        q: queries; head n reads KV head n // (N // K).
        k: keys.
        v: values.
        scale: factor on the scores; None: H ** -0.5.
        window: a query at position p sees the keys in (p - window, p]; None: all before it.
        soft_cap: c in c * tanh(score / c); None: no cap.
        sinks: an extra logit for each query head that takes softmax mass and adds no value.
        tile: queries that meet the keys before them together, which bounds the scores kept at once; None: an
            eighth of the sequence, or 128.

    Returns:
        The attention output, in q's dtype.
    """
    length, num_heads, head_dim = q.shape[-3:]
    num_kv_heads = k.shape[-2]
    tile = tile or max(128, -(-length // 8))
    grouped = q.reshape(*q.shape[:-2], num_kv_heads, num_heads // num_kv_heads, head_dim)
    outs = []
    for start in range(0, length, tile):
        end = min(start + tile, length)
        scores = jnp.einsum(
            "...tkgh,...skh->...kgts",
            grouped[..., start:end, :, :, :],
            k[..., :end, :, :],
            preferred_element_type=jnp.float32,
        )
        scores = scores * (head_dim**-0.5 if scale is None else scale)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        distance = jnp.arange(start, end)[:, None] - jnp.arange(end)[None, :]
        visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        scores = jnp.where(jnp.broadcast_to(visible, scores.shape), scores, -jnp.inf)
        if sinks is not None:
            sink = sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1, 1)
            scores = jnp.concatenate([scores, jnp.broadcast_to(sink, (*scores.shape[:-1], 1))], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., :end].astype(v.dtype)
        out = jnp.einsum("...kgts,...skh->...tkgh", weights, v[..., :end, :, :], preferred_element_type=jnp.float32)
        outs.append(out.reshape(*out.shape[:-3], num_heads, head_dim).astype(q.dtype))
    return jnp.concatenate(outs, axis=-3)
