"""The public ops: every sentence with which arguments that contradict each other are refused; windows that are none."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Sharing, copy_pages, init_pages, paged_attention
from pallas_kernels.checks import check_attention, check_tokens


def arguments(**changes) -> dict[str, Any]:
    """Of `paged_attention` by name: 3 tokens of 2 sequences, 4 query heads over 2 KV heads."""
    tokens = jnp.ones((3, 2, 64))
    return dict(
        q=jnp.ones((3, 4, 64)), k=tokens, v=tokens, pages=init_pages(5, 2, 4, 64, "float32"),
        page_table=jnp.array([[1, 2], [3, 4]], jnp.int32), lengths=jnp.array([3, 5], jnp.int32),
        query_starts=jnp.array([0, 1, 3], jnp.int32),
    ) | changes  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k=None), r"k and v must both be arrays \(write, then attend\) or both None \(attend only\)"),
        (dict(v=jnp.ones((3, 1, 64))), r"k and v must have one shape, got \(3, 2, 64\) and \(3, 1, 64\)"),
        (
            dict(k=jnp.ones((3, 4, 64)), v=jnp.ones((3, 4, 64))),
            r"k has \(heads, head size\) \(4, 64\), the pages hold \(2, 64\): give init_pages the model's",
        ),
        (
            dict(lengths=jnp.zeros(3, jnp.int32)),
            r"a page table of 2 rows needs lengths \(2,\) and query_starts \(3,\), got \(3,\) and \(3,\)",
        ),
        (dict(q=jnp.ones((2, 4, 64))), "q has 2 tokens but k has 3: pack both alike"),
        (dict(q=jnp.ones((3, 4, 80))), "q has head size 80, the pages hold 64"),
        (dict(q=jnp.ones((3, 3, 64))), "the 3 query heads must be a multiple of the pages' 2 KV heads"),
        (dict(sinks=jnp.ones(2)), r"sinks must hold one logit for each of 4 query heads, got \(2,\)"),
        (dict(window=0), r"window must be at least 1 \(a query sees itself\) or None, got 0"),
        (dict(soft_cap=0.0), "soft_cap must be above 0 or None, got 0.0"),
        (
            dict(sharing=Sharing.of_all(jnp.ones(3, jnp.int32), 0)),
            r"sharing must hold a leader and tokens for each level and each of 2 rows, got \(1, 3\) and \(1, 3\)",
        ),
        (dict(max_query_len=0), "max_query_len must be at least 1 or None, got 0"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changes, message):
    options: dict[str, Any] = dict(window=None, soft_cap=None, sinks=None, sharing=None, max_query_len=None)
    with pytest.raises(ValueError, match=message):
        # Not through the public function: in the test run its annotations refuse some of these first.
        check_attention(**arguments() | options | changes)


@pytest.mark.parametrize("window", [8, 2**40])
def test_a_window_as_long_as_a_sequence_can_be_is_none(window):
    """Two pages of four tokens a row: no position is eight before another. No kernel sees numbers beyond int32."""
    attend = functools.partial(paged_attention, **arguments(), implementation="reference")
    run = jax.jit(lambda window: attend(window=window).out, static_argnums=0)
    np.testing.assert_array_equal(run(window), run(None))
    with_window, without = (jax.make_jaxpr(lambda w=w: attend(window=w))() for w in (window, None))
    assert str(with_window) == str(without)


def test_attending_without_writing_checks_the_table_too():
    options: dict[str, Any] = dict(window=None, soft_cap=None, sinks=None, sharing=None, max_query_len=None)
    with pytest.raises(ValueError, match="a page table of 2 rows needs"):
        check_attention(**arguments(k=None, v=None, query_starts=jnp.zeros(2, jnp.int32)) | options)


def test_writing_checks_its_arguments():
    given = {name: x for name, x in arguments(v=jnp.ones((2, 2, 64))).items() if name != "q"}
    with pytest.raises(ValueError, match="k and v must have one shape"):
        check_tokens(**given)


def test_copies_must_pair_up():
    ids = jnp.array([1], jnp.int32)
    # Past the annotations of the test run.
    with pytest.raises(ValueError, match=r"source and target must pair up, got \(1,\) and \(2,\)"):
        unchecked: Any = inspect.unwrap(copy_pages)
        unchecked(arguments()["pages"], ids, jnp.array([2, 3], jnp.int32))
