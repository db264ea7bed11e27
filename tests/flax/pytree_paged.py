"""A decoder as a function of a plain pytree of weights."""

import jax
import jax.numpy as jnp

from paged_jax import PagePool, paged_attention

WIDTH, HEADS, HEAD_DIM = 32, 4, 8


def init(key, vocab, num_layers):
    def weights(*shape):
        return jax.random.normal(jax.random.fold_in(key, shape[0]), shape) * shape[-2] ** -0.5

    names = {"qkv": (WIDTH, 3 * HEADS * HEAD_DIM), "out": (HEADS * HEAD_DIM, WIDTH), "up": (WIDTH, 128), "down": (128, WIDTH)}
    layers = {name: weights(num_layers, *shape) for name, shape in names.items()}
    return {"embed": weights(vocab, WIDTH), "position": weights(512, WIDTH), "layers": layers}


def forward(params, tokens, pool, metadata):
    x = params["embed"][tokens] + params["position"][metadata.positions]
    layers = []
    for i, pages in enumerate(pool.layers):
        layer = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        q, k, v = jnp.split((jnp.tanh(x) @ layer["qkv"]).reshape(-1, 3 * HEADS, HEAD_DIM), 3, axis=1)
        out, pages = paged_attention(q, k, v, pages, metadata)
        layers.append(pages)
        x = x + out.reshape(x.shape) @ layer["out"]
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x[metadata.last_tokens] @ params["embed"].T, PagePool(tuple(layers))
