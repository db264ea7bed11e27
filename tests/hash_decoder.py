"""A decoder without attention: its next token is a hash of the tokens that its pages hold.

Keys and values are the token ids themselves, and logits follow from what the page table makes visible. So one stale,
foreign or missing page changes what is drawn; and it compiles in a second where attention takes many.
"""

import functools
import operator

import jax.numpy as jnp
import numpy as np

from paged_jax import AttentionMetadata, CacheConfig, PagePool
from paged_jax.cache.pool import layer_pages
from pallas_kernels import read_pages, write_pages

VOCAB, PAGE_SIZE, HEAD_DIM = 97, 4, 64


def config(
    num_pages: int, max_sequences: int = 4, max_pages_per_sequence: int = 16, windows=(None, None), **sizes
) -> CacheConfig:
    return CacheConfig(
        num_layers=len(windows), num_kv_heads=1, head_dim=HEAD_DIM, num_pages=num_pages, max_sequences=max_sequences,
        max_pages_per_sequence=max_pages_per_sequence, page_size=PAGE_SIZE, dtype="float32", windows=windows, **sizes,
    )  # fmt: skip


def _mix(tokens, positions):
    """What a visible token adds to its sequence's hash; below 2**20."""
    return (tokens + 1) * (positions * 31 + 17) % 1009 * (positions % 7 + 1)


def _logits(total, xp):
    """[.., V] from hashes: distinct numbers in [0, 3), whose order depends on the hash."""
    v = xp.arange(VOCAB, dtype=np.int32).reshape(*[1] * total.ndim, VOCAB)
    mixed = (total[..., None] % 7919 + 1) * (v * 7 + 3) % 997
    return mixed.astype(np.float32) * np.float32(3 / 997) + v.astype(np.float32) * np.float32(1e-5)


def forward(params, tokens, pool: PagePool, metadata: AttentionMetadata, windows=(None, None)):
    """Follows `paged_jax.Forward`; `params` is added to the hash."""
    at = metadata.logits_at
    row = jnp.minimum(metadata.sequences[at], len(metadata.lengths) - 1)
    length = metadata.positions[at][:, None] + 1
    totals = []
    for layer, window in enumerate(windows):
        place = pool.place(layer)
        array, first_page = pool.locate(place)
        table = layer_pages(metadata.page_tables[place.group], first_page)
        kv = jnp.broadcast_to((tokens + layer).astype(jnp.float32)[:, None, None], (len(tokens), 1, HEAD_DIM))
        pages = write_pages(pool.arrays[array], kv, kv, table, metadata.lengths, metadata.query_starts)
        pool = pool.replace(array, pages)
        keys, _ = read_pages(pages, table.reshape(-1))
        held = keys[:, :, 0, 0].reshape(len(table), -1).astype(jnp.int32)[row] - layer
        position = jnp.arange(held.shape[1], dtype=jnp.int32)[None, :]
        seen = (position < length) & (position >= (0 if window is None else length - window))
        totals.append(jnp.sum(jnp.where(seen, _mix(held, position), 0), axis=1, dtype=jnp.int32) * (layer + 1))
    return _logits(functools.reduce(operator.add, totals) + params, jnp), pool


@functools.cache
def forward_with(windows: tuple[int | None, ...]):
    """The decoder with layers of these windows: the same function object each time."""
    return functools.partial(forward, windows=windows)


def dense_logits(tokens: list[int], windows=(None, None), params: int = 0) -> np.ndarray:
    """The logits after some tokens, [V]."""
    total = params
    for layer, window in enumerate(windows):
        first = 0 if window is None else max(len(tokens) - window, 0)
        position = np.arange(first, len(tokens))
        total += int(np.sum(_mix(np.array(tokens[first:]), position))) * (layer + 1)
    return _logits(np.array(total), np)


def dense_greedy(prompt: list[int], num_tokens: int, windows=(None, None), stop: tuple[int, ...] = ()) -> list[int]:
    """The greedy continuation, up to and with the first stop token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_tokens:
        tokens.append(int(np.argmax(dense_logits(tokens, windows))))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def dense_logprobs(prompt: list[int], drawn: list[int], windows=(None, None), tokens=None) -> np.ndarray:
    """The log-probability of each drawn token, or of other `tokens` in its place, in float64."""
    out = []
    for i, token in enumerate(drawn if tokens is None else tokens):
        logits = dense_logits(prompt + drawn[:i], windows).astype(np.float64)
        out.append(logits[token] - np.log(np.sum(np.exp(logits))))
    return np.array(out)
