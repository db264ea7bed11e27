"""What the GPU kernels do not do, each in one sentence."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import init_pages, paged_attention, write_pages
from pallas_kernels.gpu import hardware


def attend(q_dtype=jnp.bfloat16, heads=(4, 2), head_dim=128, page_size=16, dtype="bfloat16", **options):
    pages = init_pages(3, heads[1], page_size, head_dim, dtype)
    q = jnp.zeros((2, heads[0], head_dim), q_dtype)
    table, lengths, starts = jnp.ones((2, 1), jnp.int32), jnp.ones(2, jnp.int32), jnp.arange(3, dtype=jnp.int32)
    return paged_attention(q, None, None, pages, table, lengths, starts, implementation="pallas_gpu", **options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(q_dtype=jnp.float32), "take bfloat16 queries, got float32"),
        (dict(dtype="float32"), "take bfloat16 or int8 pages, got float32"),
        (dict(head_dim=80), "take head sizes 64, 128 and 256, got 80"),
        (dict(page_size=48), "take pages of 8, 16, 32 or a multiple of 64 tokens, got 48"),
        (dict(dtype="int8", head_dim=64), "int8 pages of head size 128 or 256 and at least 16 tokens, got 64 and 16"),
        (
            dict(dtype="int8", head_dim=256, max_query_len=2),
            "int8 pages of head size 256 for one .* got max_query_len 2",
        ),
    ],
)
def test_attention_refuses(arguments, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        attend(**arguments)


def test_writing_refuses_a_token_that_no_copy_can_hold():
    pages = init_pages(3, 1, 16, 64, jnp.int8)
    new = jnp.zeros((1, 1, 64), jnp.bfloat16)
    one = jnp.ones(1, jnp.int32)
    with pytest.raises(NotImplementedError, match="a token's keys in units of 128 bytes, got 64"):
        write_pages(pages, new, new, one[None], one, jnp.array([0, 1], jnp.int32), implementation="pallas_gpu")


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(hardware, "compute_capability", lambda: "8.0")
    with pytest.raises(NotImplementedError, match=r"for compute capability 9.0 \(Hopper\), got 8.0"):
        attend()


def test_what_the_kernels_refuse_xla_serves():
    jax.eval_shape(lambda: attend(heads=(4, 2)))  # not refused
    pages = init_pages(3, 2, 16, 80)
    q, one = jnp.zeros((1, 4, 80), jnp.bfloat16), jnp.ones(1, jnp.int32)
    result = paged_attention(q, None, None, pages, one[None], one, jnp.array([0, 1], jnp.int32))
    assert result.out.shape == q.shape
