"""Dense attention against a plain numpy loop, at the edges of its tiles."""

import jax
import numpy as np
import pytest

from paged_jax.models.dense import dense_attention

attend = jax.jit(dense_attention, static_argnames=("scale", "window", "soft_cap", "tile"))


def attend_slowly(q, k, v, scale, window, soft_cap, sinks):
    """One query and head at a time, in float64."""
    length, num_heads, head_dim = q.shape
    out = np.zeros(q.shape)
    for t in range(length):
        first = 0 if window is None else max(0, t - window + 1)
        for n in range(num_heads):
            head = n // (num_heads // k.shape[1])
            scores = k[first : t + 1, head] @ q[t, n] * (head_dim**-0.5 if scale is None else scale)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            masses = np.exp(scores)
            out[t, n] = masses @ v[first : t + 1, head] / (masses.sum() + (0 if sinks is None else np.exp(sinks[n])))
    return out


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, scale, window, soft_cap, with_sinks",
    [
        (5, 1, 0.5, 3, None, True),
        (3, 3, None, 8, 2.0, False),
        (4, 2, 1.0, None, 1.5, True),
        (2, 2, None, 1, None, False),
    ],
)
def test_dense_attention_equals_a_loop(num_heads, num_kv_heads, scale, window, soft_cap, with_sinks):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((21, num_heads, 6))
    k, v = rng.standard_normal((2, 21, num_kv_heads, 6))
    sinks = rng.standard_normal(num_heads) if with_sinks else None
    expected = attend_slowly(q, k, v, scale, window, soft_cap, sinks)
    options = dict(scale=scale, window=window, soft_cap=soft_cap)
    options["sinks"] = None if sinks is None else sinks.astype(np.float32)
    narrow = [x.astype(np.float32) for x in (q, k, v)]
    np.testing.assert_allclose(attend(*narrow, **options, tile=128), expected, atol=3e-6)
    batched = attend(*(x[None] for x in narrow), **options, tile=8)
    np.testing.assert_allclose(batched[0], expected, atol=3e-6)
