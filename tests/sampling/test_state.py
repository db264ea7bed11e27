"""The arrays that a row carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.sampling import SamplingParams, SamplingState

ASKED = SamplingParams(
    min_new_tokens=3,
    temperature=0.5,
    top_k=7,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.5,
    presence_penalty=0.25,
    frequency_penalty=-0.5,
    logit_bias={6: 2.0, 5: -1.0},
    forbidden_tokens=(9,),
    stop_tokens=(3, 7),
    seed=2**32 - 1,
)
SIZES = {"max_stop_tokens": 3, "max_bias_tokens": 4}


def shapes(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)


def test_each_row_carries_what_was_asked_for_it():
    state = SamplingState.of([None, (ASKED, 2)], **SIZES)
    for name in ("min_new_tokens", "top_k", "seed"):
        assert int(getattr(state, name)[1]) == getattr(ASKED, name)
        assert int(getattr(state, name)[0]) == getattr(SamplingParams(), name)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        np.testing.assert_array_equal(getattr(state, name)[1], np.float32(getattr(ASKED, name)))
        np.testing.assert_array_equal(getattr(state, name)[0], np.float32(getattr(SamplingParams(), name)))
    assert state.sample.tolist() == [0, 2]
    assert state.stop_tokens.tolist() == [[-1, -1, -1], [3, 7, -1]]
    assert state.bias_tokens.tolist() == [[-1] * 4, [5, 6, 9, -1]]
    assert state.bias_values.tolist()[1] == [-1, 2, -np.inf, 0]


@pytest.mark.parametrize("x64", [False, True])
def test_shapes_and_dtypes_are_the_same_whatever_is_asked_for(x64):
    with jax.enable_x64(x64):
        state = SamplingState.of([None, (ASKED, 2)], **SIZES)
        assert shapes(state) == shapes(SamplingState.create(2, **SIZES))
    assert shapes(state) == shapes(SamplingState.of([(ASKED, 0), (SamplingParams(), 1)], **SIZES))
    assert shapes(SamplingState.of([], **SIZES)).stop_tokens[0] == (0, 3)


def test_no_leaf_shares_memory_with_another_so_all_can_be_donated():
    state = SamplingState.create(2, **SIZES)
    leaves = jax.tree.leaves(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state))
    assert len(leaves) == 13


def test_rows_are_gathered_with_their_processor():
    state = SamplingState.of([None, (ASKED, 2)], **SIZES, processor={"node": jnp.array([4, 5], jnp.int32)})
    swapped = jax.tree.map(lambda x: x[jnp.array([1, 0])], state)
    assert swapped.sample.tolist() == [2, 0] and swapped.processor["node"].tolist() == [5, 4]


def test_stop_tokens_are_found_per_row():
    params = [SamplingParams(stop_tokens=(3, 7)), SamplingParams(stop_tokens=(0,)), SamplingParams()]
    state = SamplingState.of([(p, 0) for p in params])
    np.testing.assert_array_equal(state.is_stop(jnp.array([7, 7, 0], jnp.int32)), [True, False, False])
    np.testing.assert_array_equal(state.is_stop(jnp.array([1, 0, 3], jnp.int32)), [False, True, False])
    without = SamplingState.create(2, max_stop_tokens=0)
    np.testing.assert_array_equal(without.is_stop(jnp.array([0, -1], jnp.int32)), [False, False])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_stop_tokens": 1, "max_bias_tokens": 4}, "row 1 names 2 tokens in stop_tokens, .*=1: raise it to 2"),
        (
            {"max_bias_tokens": 2},
            "row 1 names 3 tokens in logit_bias and forbidden_tokens, but max_bias_tokens=2: .* 3",
        ),
    ],
)
def test_more_tokens_than_the_arrays_hold_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        SamplingState.of([None, (ASKED, 0)], **sizes)
