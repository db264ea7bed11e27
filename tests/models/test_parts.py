"""The parts of a layer that XLA is told how to compute: products of weights, and rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.models.parts import FEW_TOKENS, product
from paged_jax.models.rope import Rope, rotate


@pytest.mark.parametrize("shape", [(), (1,), (FEW_TOKENS,), (FEW_TOKENS + 1,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_those_of_numpy(shape, dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=size), dtype) for size in ((*shape, 24), (40, 24)))
    grown = jnp.asarray(rng.normal(size=(*shape, 40)), dtype)
    y, gradients = jax.vjp(jax.jit(product), x, weight)
    dx, dweight = gradients(grown)
    wide_x, wide_weight, wide_grown = (np.asarray(a, np.float64) for a in (x, weight, grown))
    # Sums of up to 65 products of unit scale: 1e-6 of them in float32, 2**-8 of each in bfloat16, which rounds them.
    rtol, atol = (1e-5, 1e-5) if dtype == jnp.float32 else (0.02, 0.2)
    assert y.shape == (*shape, 40) and y.dtype == dx.dtype == dweight.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), wide_x @ wide_weight.T, rtol=rtol, atol=atol)
    np.testing.assert_allclose(np.asarray(dx, np.float64), wide_grown @ wide_weight, rtol=rtol, atol=atol)
    expected = wide_grown.reshape(-1, 40).T @ wide_x.reshape(-1, 24)
    np.testing.assert_allclose(np.asarray(dweight, np.float64), expected, rtol=rtol, atol=atol)


def test_a_number_of_tokens_may_be_unknown_in_an_export():
    (num_tokens,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((num_tokens, 24), jnp.float32)
    exported = jax.export.export(jax.jit(product))(x, jnp.ones((40, 24)))
    assert exported.call(jnp.ones((3, 24)), jnp.ones((40, 24))).tolist() == np.full((3, 40), 24.0).tolist()


def test_angles_are_computed_once_for_the_rotations_of_all_layers():
    def rotate_twice(x, positions):
        cos, sin = Rope().angles(positions, 16)
        return rotate(rotate(x, cos, sin) * 2, cos, sin)

    shapes = jax.ShapeDtypeStruct((8, 4, 16), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    program = jax.jit(rotate_twice).lower(*shapes).compile().as_text() or ""
    assert program.count(" cosine(") == program.count(" sine(") == 1


@pytest.mark.parametrize(("num_tokens", "is_swapped"), [(8, True), (FEW_TOKENS + 1, False)])
def test_on_a_cpu_the_weights_stand_on_the_left_of_few_tokens(num_tokens, is_swapped):
    x, weight = jnp.ones((num_tokens, 24)), jnp.ones((40, 24))
    program = jax.jit(product).lower(x, weight).compile().as_text() or ""
    assert (f"f32[40,{num_tokens}]" in program) == is_swapped
