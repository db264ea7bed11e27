"""The products of a decoder's weights, whichever operand XLA is given first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.models.parts import FEW_TOKENS, product


@pytest.mark.parametrize("shape", [(), (1,), (FEW_TOKENS,), (FEW_TOKENS + 1,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_those_of_numpy(shape, dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=size), dtype) for size in ((*shape, 24), (40, 24)))
    grown = jnp.asarray(rng.normal(size=(*shape, 40)), dtype)
    y, gradients = jax.vjp(jax.jit(product), x, weight)
    dx, dweight = gradients(grown)
    wide_x, wide_weight, wide_grown = (np.asarray(a, np.float64) for a in (x, weight, grown))
    rtol, atol = (1e-5, 1e-4) if dtype == jnp.float32 else (0.02, 0.2)
    assert y.shape == (*shape, 40) and y.dtype == dx.dtype == dweight.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), wide_x @ wide_weight.T, rtol=rtol, atol=atol)
    np.testing.assert_allclose(np.asarray(dx, np.float64), wide_grown @ wide_weight, rtol=rtol, atol=atol)
    expected = wide_grown.reshape(-1, 40).T @ wide_x.reshape(-1, 24)
    np.testing.assert_allclose(np.asarray(dweight, np.float64), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("num_tokens", "is_swapped"), [(8, True), (FEW_TOKENS + 1, False)])
def test_on_a_cpu_the_weights_stand_on_the_left_of_few_tokens(num_tokens, is_swapped):
    x, weight = jnp.ones((num_tokens, 24)), jnp.ones((40, 24))
    program = jax.jit(product).lower(x, weight).compile().as_text() or ""
    assert (f"f32[40,{num_tokens}]" in program) == is_swapped
