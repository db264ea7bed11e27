"""What the GPU kernels do not do, each in one sentence."""

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from pallas_kernels import gpu, init_pages, paged_attention, xla
from pallas_kernels.gpu import hardware
from pallas_kernels.registry import BACKENDS, choose


def attend(q_dtype=jnp.bfloat16, heads=(4, 2), head_dim=128, page_size=16, dtype="bfloat16", is_padded=False):
    pages = init_pages(3, heads[1], page_size, head_dim, dtype, is_padded)
    q = jnp.zeros((2, heads[0], head_dim), q_dtype)
    table, lengths, starts = jnp.ones((2, 1), jnp.int32), jnp.ones(2, jnp.int32), jnp.arange(3, dtype=jnp.int32)
    return paged_attention(q, None, None, pages, table, lengths, starts, implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(q_dtype=jnp.float32), "take bfloat16 queries, got float32"),
        (dict(dtype="float32"), "take bfloat16, int8 or float8_e4m3fn pages, got float32"),
        (dict(head_dim=80), "take head sizes 64, 128 and 256, got 80"),
        (dict(page_size=48), "take pages of 8, 16, 32 or a multiple of 64 tokens, got 48"),
        (
            dict(dtype="int8", page_size=8, heads=(3, 3)),
            "take quantised pages of 8 tokens with an even number of KV heads, got 3",
        ),
        (dict(dtype="int8", is_padded=True), "take quantised pages whose scales are not padded: init_pages"),
    ],
)
def test_attention_refuses(arguments, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        attend(**arguments)


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(hardware, "compute_capability", lambda: "8.0")
    with pytest.raises(NotImplementedError, match=r"for compute capability 9.0 \(Hopper\), got 8.0"):
        attend()


def test_what_the_kernels_refuse_xla_serves(monkeypatch):
    """Where the GPU kernels may be chosen unasked."""
    monkeypatch.setitem(BACKENDS, "pallas_gpu", BACKENDS["pallas_gpu"]._replace(platforms=("gpu",)))

    def chosen(head_dim):
        pages = init_pages(3, 2, 16, head_dim, is_padded=False)
        return choose("paged_attention", None, dict(q=jnp.zeros((1, 4, head_dim), jnp.bfloat16), pages=pages))

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=1, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        assert chosen(128) is gpu.paged_attention
        assert chosen(80) is xla.paged_attention
