"""A decoder small enough for tests, as a plain pytree: once over the paged cache, once over the whole context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import AttentionMetadata, CacheConfig, PagePool, paged_attention

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 2, 4, 2, 16, 32, 61


def config(
    num_pages=64, max_sequences=4, max_pages_per_sequence=16, page_size=4, dtype="float32", **windows
) -> CacheConfig:
    return CacheConfig(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, num_pages=num_pages, max_sequences=max_sequences,
        max_pages_per_sequence=max_pages_per_sequence, page_size=page_size, dtype=dtype, **windows,
    )  # fmt: skip


def init_params(seed: int = 0, num_layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float32"):
    rng = np.random.default_rng(seed)

    def weight(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, dtype)

    def layer():
        return {
            "q": weight(WIDTH, heads, head_dim),
            "k": weight(WIDTH, kv_heads, head_dim),
            "v": weight(WIDTH, kv_heads, head_dim),
            "o": weight(heads * head_dim, WIDTH),
            "up": weight(WIDTH, 2 * WIDTH),
            "down": weight(2 * WIDTH, WIDTH),
        }

    return {
        "embed": weight(VOCAB, WIDTH) * 6,
        "position": weight(512, WIDTH) * 12,
        "layers": [layer() for _ in range(num_layers)],
        "head": weight(WIDTH, VOCAB) * 3,
    }


def _block(layer, x, attend):
    h = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6) * WIDTH**0.5
    q, k, v = (jnp.einsum("tw,wnh->tnh", h, layer[name]) for name in "qkv")
    x = x + attend(q, k, v).reshape(len(x), -1) @ layer["o"]
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"]


def forward(params, tokens, pool: PagePool, metadata: AttentionMetadata, windows=(None,) * LAYERS):
    x = params["embed"][tokens] + params["position"][metadata.positions]
    for i, layer in enumerate(params["layers"]):

        def attend(q, k, v, i=i):
            nonlocal pool
            out, pool = paged_attention(q, k, v, pool, metadata, i, window=windows[i])
            return out

        x = _block(layer, x, attend)
    return x[metadata.logits_at] @ params["head"], pool


@functools.partial(jax.jit, static_argnums=2)
def dense_logits(params, tokens, windows=(None,) * LAYERS):
    """Logits [T, V] of a whole context, without a cache."""
    x = params["embed"][tokens] + params["position"][: len(tokens)]
    position = jnp.arange(len(tokens))
    distance = position[:, None] - position[None, :]

    def attend(q, k, v, window):
        k, v = (jnp.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
        scores = jnp.einsum("tnh,snh->nts", q, k) * HEAD_DIM**-0.5
        is_seen = (distance >= 0) & (distance < (window or len(tokens)))
        scores = jnp.where(is_seen[None], scores, -jnp.inf)
        return jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores, axis=-1), v)

    for layer, window in zip(params["layers"], windows, strict=True):
        x = _block(layer, x, functools.partial(attend, window=window))
    return x @ params["head"]


def dense_greedy(params, prompt, num_tokens: int, windows=(None,) * LAYERS) -> list[int]:
    """Greedy continuation, the whole context computed again for each token."""
    tokens = list(prompt)
    padded = np.zeros(128, np.int32)  # one shape, one compilation
    for _ in range(num_tokens):
        padded[: len(tokens)] = tokens
        tokens.append(int(np.argmax(np.asarray(dense_logits(params, padded, windows))[len(tokens) - 1])))
    return tokens[len(prompt) :]
