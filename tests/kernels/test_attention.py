"""Attention of every implementation against the float64 oracle, on hostile inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.cases import CASES, IMPLEMENTATIONS, Case, attend, expected, make_inputs, traces

# What they have, other cases have, too: these only in other pairs, and with -m long.
LONG = (
    "decode: bf16, head size 128",
    "decode: padded head size 96",
    "decode: int8",
    "decode: int8, head size 128",
    "decode: window of a page",
    "mixed: int8",
    "mixed: int8, head size 128",
    "mixed: fp8, head size 128",
    "mixed: heads 5, 1; head size 80",
    "mixed: heads 3, 3",
    "mixed: heads 12, 2; head size 256",
    "mixed: window in a page",
    "query length is KV length, window, cap",
    "no page at all, sinks",
    "f32 pages, bf16 queries",
)
ATTENTION_CASES = [
    pytest.param(case, id=case.name, marks=pytest.mark.long if case.name in LONG else ()) for case in CASES
]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def run(case, inputs, implementation, **options):
    options = {**case.options, "return_lse": True, **options}
    return attend(*inputs.arguments, sinks=inputs.sinks, implementation=implementation, **options)


def case_named(name):
    return next(case for case in CASES if case.name == name)


@each_implementation
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_equals_the_oracle_whatever_unowned_slots_and_ids_hold(case, implementation):
    inputs = make_inputs(case)
    result = run(case, inputs, implementation)
    out, lse = expected(case, inputs)
    assert result.out.dtype == inputs.q.dtype
    np.testing.assert_allclose(np.asarray(result.out, np.float64), out, atol=case.tolerance, rtol=0)
    np.testing.assert_allclose(result.lse, lse, atol=case.tolerance, rtol=1e-6)


@each_implementation
def test_a_context_above_32767_tokens(implementation):
    holes = tuple((0, column) for column in range(1, 500))
    case = Case("long context", (33_000, 3), (1, 1), (1, 1), 64, 64, sinks=True, holes=holes)
    inputs = make_inputs(case)
    out, _ = expected(case, inputs)
    np.testing.assert_allclose(run(case, inputs, implementation).out, out, atol=case.tolerance, rtol=0)


@each_implementation
@pytest.mark.parametrize("name", ["decode", "mixed", "mixed: int8, padded scales"])
@pytest.mark.parametrize("what", ["other numbers", "NaN"])
def test_neighbours_cannot_change_my_output(name, what, implementation):
    case = case_named(name)
    inputs = make_inputs(case)
    mine = len(case.lengths) - 1  # the row whose output must not change
    starts, table = np.asarray(inputs.query_starts), np.asarray(inputs.page_table)
    own_pages = table[mine, : -(-case.lengths[mine] // case.page_size)]
    own_tokens = slice(starts[mine], starts[mine + 1])

    def perturbed(x, own):
        x = np.array(x)
        others = np.ones(len(x), bool)
        others[own] = False
        if np.issubdtype(x.dtype, np.signedinteger):
            x[others] = -3 - x[others]
        else:
            x[others] = np.nan if what == "NaN" else 7 * x[others] + 1
        return jnp.asarray(x)

    pages = jax.tree.map(lambda x: perturbed(x, own_pages), inputs.pages)
    tokens = {name: perturbed(getattr(inputs, name), own_tokens) for name in ("q", "k", "v")}
    changed = run(case, dataclasses.replace(inputs, pages=pages, **tokens), implementation)
    before = run(case, inputs, implementation)
    np.testing.assert_array_equal(changed.out[own_tokens], before.out[own_tokens])
    assert np.isfinite(np.asarray(before.out[own_tokens])).all()


@each_implementation
def test_lse_is_none_unless_asked_for(implementation):
    case = case_named("decode")
    inputs = make_inputs(case)
    assert jax.eval_shape(lambda: run(case, inputs, implementation, return_lse=False)).lse is None


@each_implementation
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_changing_lengths_and_tables_do_not_compile_again(name, implementation):
    case = case_named(name)
    inputs = make_inputs(case)
    run(case, inputs, implementation)
    before = traces[implementation]
    table, lengths, starts = inputs.page_table, inputs.lengths, inputs.query_starts
    for changes in (
        dict(page_table=table[::-1], lengths=lengths[::-1]),
        dict(page_table=table * 0, lengths=lengths * 0, query_starts=starts * 0),
        dict(lengths=lengths + 1),
    ):
        run(case, dataclasses.replace(inputs, **changes), implementation)
    assert traces[implementation] == before > 0


@each_implementation
def test_nothing_to_do(implementation):
    case = Case("decode", (0, 0, 0), (1, 1, 1), window=5, sinks=True)
    result = run(case, make_inputs(case), implementation)
    np.testing.assert_array_equal(result.out, 0)
    np.testing.assert_array_equal(result.lse, -np.inf)
