"""A decode loop by hand: every step computes the next tokens of all sequences, packed in one axis of one length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import AttentionMetadata, CacheConfig, PagePool, PageTables

NUM_TOKENS = 32


@functools.partial(jax.jit, static_argnames="max_query_len")
def reserve(tables: PageTables, query_lens, max_query_len: int = 8):
    tables, _ = tables.slide().reserve(query_lens)
    return tables, AttentionMetadata.ragged(tables, query_lens, NUM_TOKENS, max_query_len=max_query_len)


def pack(pieces) -> jax.Array:
    packed = [token for piece in pieces for token in piece]
    return jnp.asarray(packed + [0] * (NUM_TOKENS - len(packed)), jnp.int32)


def lengths(pieces) -> jax.Array:
    return jnp.asarray([len(piece) for piece in pieces], jnp.int32)


def serve(step, config: CacheConfig, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, ...]]:
    """The greedy continuations of one prompt for each row of the table."""
    assert len(prompts) == config.max_sequences
    tables, pool = PageTables.create(config), PagePool.create(config)
    feed, drawn = prompts, []
    for _ in range(num_tokens):
        tables, metadata = reserve(tables, lengths(feed))
        logits, pool = step(pack(feed), pool, metadata)
        drawn.append(np.argmax(np.asarray(logits), axis=-1))
        feed = [[token] for token in drawn[-1].tolist()]
    return [tuple(tokens) for tokens in np.stack(drawn, axis=1).tolist()]


def without_cache(dense, prompt: list[int], num_tokens: int, longest: int = 64) -> tuple[int, ...]:
    """The greedy continuation where `dense` [T] -> [T, V] computes the whole context again for each token."""
    tokens, end = np.zeros(longest, np.int32), len(prompt)
    tokens[:end] = prompt
    for _ in range(num_tokens):
        tokens[end] = np.argmax(np.asarray(dense(tokens))[end - 1])
        end += 1
    return tuple(tokens[len(prompt) : end].tolist())
