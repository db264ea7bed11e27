"""merge_states: attention over two disjoint sets of keys is attention over their union."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import merge_states

merge = jax.jit(merge_states)


def attention(q, keys, values):  # [T, H], [n, H] -> [T, H], [T], in float64
    scores = q @ keys.T
    lse = np.log(np.exp(scores).sum(-1)) if len(keys) else np.full(len(q), -np.inf)
    out = np.exp(scores - lse[:, None]) @ values if len(keys) else np.zeros(q.shape)
    return out, lse


@pytest.mark.parametrize("split", [0, 1, 4, 9])
def test_two_parts_make_the_whole(split):
    rng = np.random.default_rng(split)
    q, keys, values = (rng.standard_normal((n, 8)) for n in (5, 9, 9))
    parts = [attention(q, keys[part], values[part]) for part in (slice(split), slice(split, None))]
    arguments = [jnp.asarray(x, jnp.float32) for part in parts for x in part]
    out, lse = merge(*arguments)
    whole_out, whole_lse = attention(q, keys, values)
    np.testing.assert_allclose(out, whole_out, atol=1e-5)
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)


def test_a_side_without_keys_adds_nothing_whatever_it_holds():
    out, lse = jnp.array([[1.0, 2.0]]), jnp.array([3.0])
    nan, none = jnp.full((1, 2), jnp.nan), jnp.array([-jnp.inf])
    for arguments in ((out, lse, nan, none), (nan, none, out, lse)):
        merged, merged_lse = merge(*arguments)
        np.testing.assert_array_equal(merged, out)
        np.testing.assert_array_equal(merged_lse, lse)
    merged, merged_lse = merge(nan, none, nan, none)
    np.testing.assert_array_equal(merged, 0)
    np.testing.assert_array_equal(merged_lse, -np.inf)


def test_large_scores_do_not_overflow():
    a, b = jnp.array([[1.0]], jnp.bfloat16), jnp.array([[3.0]], jnp.bfloat16)
    out, lse = merge(a, jnp.array([1000.0]), b, jnp.array([1000.0]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 2)
    np.testing.assert_allclose(lse, 1000 + np.log(2), rtol=1e-6)
