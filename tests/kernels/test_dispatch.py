"""Who runs an op, and every sentence with which one is refused."""

import inspect
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels import check_page_table, copy_pages, init_pages, paged_attention, reference, write_pages
from pallas_kernels.dispatch import BACKENDS, Backend, check_attention, check_tokens
from pallas_kernels.platform import target_platform


def arguments(**changes) -> dict[str, Any]:
    """Of `paged_attention` by name: 3 tokens of 2 sequences, 4 query heads over 2 KV heads."""
    tokens = jnp.ones((3, 2, 64))
    return dict(
        q=jnp.ones((3, 4, 64)), k=tokens, v=tokens, pages=init_pages(5, 2, 4, 64, "float32"),
        page_table=jnp.array([[1, 2], [3, 4]], jnp.int32), lengths=jnp.array([3, 5], jnp.int32),
        query_starts=jnp.array([0, 1, 3], jnp.int32),
    ) | changes  # fmt: skip


def mesh_of(platform):
    device = AbstractDevice(device_kind="some kind", num_cores=1, platform=platform)
    return AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)


@pytest.fixture
def fake(monkeypatch):
    """A backend that comes first on a CPU and refuses query heads other than 4."""
    module = types.ModuleType("fake_backend")

    def refusal(op, **arguments):
        return None if arguments["q"].shape[1] == 4 else f"it does not take {arguments['q'].shape[1]} query heads."

    def attend(**arguments):
        result = reference.paged_attention(**arguments)
        return result._replace(out=result.out * 0 + 42)

    module.__dict__.update(refusal=refusal, paged_attention=attend)
    monkeypatch.setitem(sys.modules, "fake_backend", module)
    others = dict(BACKENDS)
    BACKENDS.clear()
    BACKENDS.update(fake=Backend("fake_backend", ("cpu",)), **others)
    yield
    BACKENDS.clear()
    BACKENDS.update(others)


def test_the_first_backend_of_the_platform_that_does_not_refuse_runs(fake):
    assert (paged_attention(**arguments()).out == 42).all()
    two_heads = arguments(q=jnp.ones((3, 2, 64)))
    assert not (paged_attention(**two_heads).out == 42).any()


def test_a_named_implementation_never_falls_back(fake):
    two_heads = arguments(q=jnp.ones((3, 2, 64)))
    with pytest.raises(NotImplementedError, match="^fake paged_attention: it does not take 2 query heads.$"):
        paged_attention(**two_heads, implementation="fake")


def test_a_named_implementation_without_the_op_says_so(fake):
    ids = jnp.array([1], jnp.int32)
    with pytest.raises(NotImplementedError, match="^fake copy_pages: it does not have this op.$"):
        copy_pages(arguments()["pages"], ids, ids, implementation="fake")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation must be None or one of .*xla, reference, got 'cuda'"):
        paged_attention(**arguments(), implementation="cuda")


def test_a_platform_without_implementation_says_so():
    with use_abstract_mesh(mesh_of("abacus")):
        with pytest.raises(NotImplementedError, match='no implementation of write_pages on abacus: pass .*"xla"'):
            jax.eval_shape(lambda x: write_pages(**x), {k: v for k, v in arguments().items() if k != "q"})


@pytest.mark.parametrize("platform, wanted", [("tpu", "tpu"), ("cuda", "gpu"), ("gpu", "gpu"), ("cpu", "cpu")])
def test_the_mesh_in_context_names_the_platform(platform, wanted):
    assert target_platform() == "cpu"
    with use_abstract_mesh(mesh_of(platform)):
        assert target_platform() == wanted


def test_the_default_device_names_the_platform():
    with jax.default_device("cpu"):
        assert target_platform() == "cpu"
    with jax.default_device(jax.devices("cpu")[1]):
        assert target_platform() == "cpu"


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
        (dict(max_query_len=0), "max_query_len must be at least 1 or None, got 0"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changes, message):
    options: dict[str, Any] = dict(window=None, soft_cap=None, sinks=None, max_query_len=None)
    with pytest.raises(ValueError, match=message):
        # Not through the public function: in the test run its annotations refuse some of these first.
        check_attention(**arguments() | options | changes)


def test_attending_without_writing_checks_the_table_too():
    options: dict[str, Any] = dict(window=None, soft_cap=None, sinks=None, max_query_len=None)
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


def test_the_page_table_is_checked_on_the_host():
    pages = init_pages(9, 1, 4, 64)

    def check(row, length):
        check_page_table(np.array([[1, 0, 0], row], np.int32), np.array([4, length], np.int32), pages)

    check([2, 3, 4], 12)
    check([2, 2**31 - 1, -5], 4)  # columns behind the length may hold anything
    check([0, 3, 4], 12)  # leading pages behind a window
    check([-1, -1, -1], 0)
    with pytest.raises(ValueError, match=r"row 1: length 13 is outside 0 .. 12 \(M \* S\)"):
        check([2, 3, 4], 13)
    with pytest.raises(ValueError, match="row 1: length -1 is outside 0 .. 12"):
        check([2, 3, 4], -1)
    with pytest.raises(ValueError, match="row 1: page 9 is outside 0 .. 8"):
        check([2, 9, 4], 8)
    with pytest.raises(ValueError, match="row 1: page -2 is outside 0 .. 8"):
        check([2, -2, 4], 5)
    with pytest.raises(ValueError, match=r"row 1: length 9 needs 3 mapped pages, got \[2, 0, 4\]"):
        check([2, 0, 4], 9)
    with pytest.raises(ValueError, match=r"row 1: length 1 needs 1 mapped pages, got \[0\]"):
        check([0, 0, 4], 1)
    with pytest.raises(ValueError, match=r"row 1: a page stands twice in \[2, 3, 2\]"):
        check([2, 3, 2], 12)
