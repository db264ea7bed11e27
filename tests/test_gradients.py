"""Attention as a layer sees it: a gradient through the pages is refused, with what to differentiate instead."""

import jax
import jax.numpy as jnp
import pytest

from paged_jax import AttentionMetadata, CacheConfig, PagePool, PageTables, paged_attention

CONFIG = CacheConfig(1, 1, 8, num_pages=4, max_sequences=2, max_pages_per_sequence=2, page_size=4, dtype="float32")
MATCH = r"attention over pages has no gradient: differentiate a pass over the whole sequence .*`dense_forward`"


def loss(weight, implementation=None, writes=True):
    """Of one weight that scales queries, keys and values."""
    tables, _ = PageTables.create(CONFIG).reserve(jnp.array([1, 1]))
    metadata = AttentionMetadata.decode(tables, jnp.ones(2, bool))
    x = weight * jnp.ones((2, 1, 8))
    k, v = (x, x) if writes else (None, None)
    out, _ = paged_attention(x, k, v, PagePool.create(CONFIG), metadata, 0, implementation=implementation)
    return jnp.sum(out)


TRANSFORMS = {
    "grad": jax.grad(loss),
    "grad of jit": jax.grad(jax.jit(loss)),
    "grad of a loop": jax.grad(lambda w: jax.lax.fori_loop(0, 2, lambda _, x: loss(x), w)),
    "grad of remat": jax.grad(jax.checkpoint(loss)),
    "vmap of grad": jax.vmap(jax.grad(loss)),
    "jvp": lambda w: jax.jvp(loss, (w,), (w,)),
    "reference": jax.grad(lambda w: loss(w, "reference")),
    "attention without writes": jax.grad(lambda w: loss(w, writes=False)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_gradient_through_the_pages_is_refused(name):
    with pytest.raises(NotImplementedError, match=MATCH):
        jax.eval_shape(TRANSFORMS[name], jnp.ones(2) if name == "vmap of grad" else jnp.float32(1))


def test_a_gradient_past_the_pages_is_taken():
    """A training step in one program: sample with the parameters, then differentiate something else in them."""

    def both(weight):
        sampled = loss(jax.lax.stop_gradient(weight))
        return weight * sampled, sampled

    gradient, sampled = jax.jit(jax.grad(both, has_aux=True))(jnp.float32(2))
    assert gradient == sampled == 2 * 8 * 2


def test_the_refusal_costs_nothing(monkeypatch):
    def lowered():
        return jax.jit(lambda weight: loss(weight)).lower(jnp.float32(1)).as_text()

    refusing = lowered()
    monkeypatch.setattr("paged_jax.attention.refuse_gradients", lambda arrays: arrays)
    assert refusing == lowered()
