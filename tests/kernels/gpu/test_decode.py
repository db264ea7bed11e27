"""The decode kernel in the interpreter against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import make_problem

from pallas_kernels import paged_attention

BFLOAT16 = 2e-2  # absolute, on data of unit scale: the weights are rounded to bfloat16 for the tensor core


def check(problem, **options):
    def run(implementation):
        return jax.jit(
            lambda *arrays: paged_attention(*arrays, return_lse=True, implementation=implementation, **options)
        )(*problem)

    result, expected = run("pallas_gpu"), run("reference")
    out, expected_out = (np.asarray(x.out, np.float32) for x in (result, expected))
    assert np.all(np.isfinite(expected_out))
    np.testing.assert_allclose(out, expected_out, atol=BFLOAT16)
    np.testing.assert_allclose(result.lse, expected.lse, atol=1e-3, rtol=1e-3)
    return result


# Head size, page size, (query, KV) heads, window, soft cap, sinks: every pair of neighbouring choices occurs.
CASES = [
    (128, 16, (4, 2), None, None, False),
    (128, 8, (16, 2), 70, 5.0, True),
    (128, 64, (1, 1), 5, None, True),
    (128, 128, (12, 1), None, 5.0, False),
    (128, 32, (5, 5), 64, None, False),
    (64, 16, (8, 1), 130, None, True),
    (64, 64, (32, 2), None, 2.0, True),
    (64, 128, (3, 1), 16, None, False),
    (64, 192, (2, 2), None, None, True),
    (256, 16, (8, 2), None, None, True),
    (256, 64, (10, 1), 100, 5.0, False),
]


@pytest.mark.parametrize(("head_dim", "page_size", "heads", "window", "soft_cap", "has_sinks"), CASES)
def test_equals_the_reference(interpreter, head_dim, page_size, heads, window, soft_cap, has_sinks):
    lengths = [0, 1, page_size, page_size + 1, 197, 64, 129]
    problem = make_problem(lengths, heads=heads, head_dim=head_dim, page_size=page_size)
    sinks = jnp.linspace(-1, 2, heads[0], dtype=jnp.float32) if has_sinks else None
    check(problem, max_query_len=1, window=window, soft_cap=soft_cap, sinks=sinks)
