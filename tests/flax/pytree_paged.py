"""A decoder as a function of a plain pytree of weights."""

import jax

from paged_jax import paged_attention


def init(key, vocab, width, num_layers):
    shapes = {"embed": (vocab, width), "position": (512, width)}
    for i in range(num_layers):
        shapes |= {f"qkv{i}": (width, 3 * width), f"up{i}": (width, 4 * width), f"down{i}": (4 * width, width)}
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shapes[name]) * width**-0.5 for name, k in zip(shapes, keys, strict=True)}


def forward(params, tokens, pool, metadata):
    x = params["embed"][tokens] + params["position"][metadata.positions]
    for i in range(pool.num_layers):
        qkv = (x @ params[f"qkv{i}"]).reshape(len(x), 3, 4, -1)
        out, pool = paged_attention(qkv[:, 0], qkv[:, 1], qkv[:, 2], pool, metadata, i)
        x = x + out.reshape(x.shape)
        x = x + jax.nn.gelu(x @ params[f"up{i}"]) @ params[f"down{i}"]
    return x[metadata.logits_at] @ params["embed"].T, pool
