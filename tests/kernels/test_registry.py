"""Who runs an op, and what is said where nobody can."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels import copy_pages, init_pages, paged_attention, reference, write_pages
from pallas_kernels.platform import target_platform
from pallas_kernels.registry import BACKENDS, Backend


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
    attend = jax.jit(paged_attention)
    assert (attend(**arguments()).out == 42).all()
    two_heads = arguments(q=jnp.ones((3, 2, 64)))
    assert not (attend(**two_heads).out == 42).any()


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
