"""A decoder as a function of a plain pytree of weights."""

import jax
import jax.numpy as jnp

from paged_jax import PagePool, paged_attention


def init(key, vocab, width, num_layers):
    shapes = {"embed": (vocab, width), "position": (512, width)}
    for i in range(num_layers):
        shapes |= {f"qkv{i}": (width, 3 * width), f"up{i}": (width, 4 * width), f"down{i}": (4 * width, width)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shapes[name]) * width**-0.5 for name, k in zip(shapes, keys, strict=True)}


def forward(params, tokens, pool, metadata):
    x = params["embed"][tokens] + params["position"][metadata.positions]
    layers = []
    for i, pages in enumerate(pool.layers):
        qkv = (x @ params[f"qkv{i}"]).reshape(len(x), -1, pages.head_dim)
        out, pages = paged_attention(*jnp.split(qkv, 3, axis=1), pages, metadata)
        layers.append(pages)
        x = x + out.reshape(x.shape)
        x = x + jax.nn.gelu(x @ params[f"up{i}"]) @ params[f"down{i}"]
    return x[metadata.last_tokens] @ params["embed"].T, PagePool(tuple(layers))
