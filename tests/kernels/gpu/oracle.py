"""Compares the GPU kernels with the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention

BFLOAT16 = 2e-2  # absolute, on data of unit scale: the weights are rounded to bfloat16 for the tensor core
LSE = 1e-3  # the scores are exact but for the float32 sums and the chip's approximate exp2 and log2


def check(problem, **options):
    """Runs a problem both ways in one compilation each; returns what the kernels gave."""

    def run(implementation):
        function = jax.jit(
            lambda *arrays: paged_attention(*arrays, return_lse=True, implementation=implementation, **options)
        )
        return jax.block_until_ready(function(*problem))

    result, expected = run("pallas_gpu"), run("reference")
    out, expected_out = (np.asarray(x.out, np.float32) for x in (result, expected))
    assert np.all(np.isfinite(expected_out))
    np.testing.assert_allclose(out, expected_out, atol=BFLOAT16)
    np.testing.assert_allclose(result.lse, expected.lse, atol=LSE, rtol=1e-3)
    for got, want in zip(jax.tree.leaves(result.pages), jax.tree.leaves(expected.pages), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))
    return result


def expect_no_neighbours(problem, **options):
    """The first sequence's output is the same to the bit whatever the others hold and ask."""

    @jax.jit
    def run(*arrays):
        return paged_attention(*arrays, implementation="pallas_gpu", **options).out

    mine = int(problem.query_starts[1])
    pages = -(-int(problem.lengths[0]) // problem.pages.page_size)
    is_mine = np.isin(np.arange(problem.pages.num_pages), problem.page_table[0, :pages])
    data, q = np.array(problem.pages.data), np.array(problem.q)
    data[~is_mine] = 3
    q[mine:] *= -2
    pages = dataclasses.replace(problem.pages, data=jnp.asarray(data))
    changed = problem._replace(q=jnp.asarray(q), pages=pages)
    before, after = (np.asarray(jax.block_until_ready(run(*x)), np.float32) for x in (problem, changed))
    np.testing.assert_array_equal(before[:mine], after[:mine])
    assert not np.array_equal(before[mine:], after[mine:])
