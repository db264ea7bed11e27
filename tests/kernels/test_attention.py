"""Attention of every implementation against the float64 oracle, on hostile inputs."""

import numpy as np
import pytest
from kernels.cases import CASES, IMPLEMENTATIONS, attend, expected, make_inputs


def run(case, inputs, implementation, **options):
    try:
        return attend(
            *inputs.arguments, sinks=inputs.sinks, implementation=implementation, **{**case.options, **options}
        )
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_whatever_unowned_slots_and_ids_hold(case, implementation):
    inputs = make_inputs(case)
    result = run(case, inputs, implementation, return_lse=True)
    out, lse = expected(case, inputs)
    assert result.out.dtype == inputs.q.dtype
    np.testing.assert_allclose(np.asarray(result.out, np.float64), out, atol=case.tolerance, rtol=0)
    np.testing.assert_allclose(result.lse, lse, atol=case.tolerance, rtol=1e-6)
