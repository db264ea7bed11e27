"""Merging attention over two disjoint sets of keys."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_states(
    out_a: Float[Array, "*n H"],
    lse_a: Float[Array, "*n"],
    out_b: Float[Array, "*n H"],
    lse_b: Float[Array, "*n"],
) -> tuple[Float[Array, "*n H"], Float[Array, "*n"]]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    A side that saw no key has lse -inf and adds nothing, whatever its `out` holds. Count sinks on one side
    only. From FlashInfer (Ye et al. 2025, arXiv 2501.01005), section 2.2.

    Args:
        out_a: `[..., H]`, the result over the first set.
        lse_a: `[...]`, its log-sum-exp.
        out_b: `[..., H]`, the result over the second set.
        lse_b: `[...]`, its log-sum-exp.

    Returns:
        `(out, lse)` over both, in the dtypes of the first set; 0 and -inf where neither saw a key.

    Examples:
        One key was seen on the left and three on the right, all with the same score:

        >>> out, lse = merge_states(jnp.array([0.0]), jnp.log(1.0), jnp.array([4.0]), jnp.log(3.0))
        >>> out.round(2).tolist(), jnp.exp(lse).round(2).item()
        ([3.0], 4.0)
    """
    a, b = lse_a.astype(jnp.float32), lse_b.astype(jnp.float32)
    top = jnp.maximum(a, b)
    top = jnp.where(top == -jnp.inf, 0, top)
    weight_a, weight_b = jnp.exp(a - top), jnp.exp(b - top)
    total = weight_a + weight_b

    def weighted(weight, out):
        share = weight / jnp.where(total > 0, total, 1)
        return jnp.where((weight > 0)[..., None], share[..., None] * out.astype(jnp.float32), 0)

    out = weighted(weight_a, out_a) + weighted(weight_b, out_b)
    return out.astype(out_a.dtype), (top + jnp.log(total)).astype(lse_a.dtype)
