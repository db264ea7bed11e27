"""Runs a model over a paged cache, step by step, from the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax import AttentionMetadata, PagePool, PageTables
from paged_jax.cache.mesh import find_mesh

PAGE_SIZE = 16


@functools.partial(jax.jit, static_argnames=("num_tokens", "max_query_len"), donate_argnums=0)
def grant(tables, query_lens, num_tokens, max_query_len=None):
    """Reserves the new tokens of every row: the tables, the copies to make, the metadata of the step."""
    tables, reservation = tables.slide().reserve(query_lens)
    metadata = AttentionMetadata.ragged(tables, query_lens, num_tokens, max_query_len=max_query_len)
    return tables, reservation, metadata


class PagedRun:
    """A batch of sequences over a paged cache of its own, on the devices of the model.

    Args:
        model: what `load` returned.
        num_rows: sequences.
        max_length: tokens that a sequence can hold.
        step_tokens: T of a prefill step.
        dtype: of the pages.
    """

    def __init__(self, model, num_rows: int, max_length: int, step_tokens: int, dtype: str = "float32"):
        pages_per_row = -(-max_length // PAGE_SIZE)
        config = model.cache_config(
            num_pages=num_rows * pages_per_row + 1,
            max_sequences=num_rows,
            max_pages_per_sequence=pages_per_row,
            page_size=PAGE_SIZE,
            dtype=dtype,
        )
        self.model, self.config, self.step_tokens = model, config, step_tokens
        self.pool, self.tables = PagePool.create(config, find_mesh(model.params)), PageTables.create(config)
        self.num_traces = 0

        def forward(*step):
            self.num_traces += 1
            return model.forward(*step)

        self.forward = jax.jit(forward, donate_argnums=2)

    def step(self, tokens: list[list[int]], num_tokens: int, max_query_len: int | None = None) -> np.ndarray:
        """Feeds new tokens to every row; logits [B, V] at each row's last one."""
        packed = np.zeros(num_tokens, np.int32)
        flat = [token for row in tokens for token in row]
        packed[: len(flat)] = flat
        lens = jnp.asarray([len(row) for row in tokens], jnp.int32)
        self.tables, reservation, metadata = grant(self.tables, lens, num_tokens, max_query_len)
        assert bool(jnp.all(reservation.granted | (lens == 0)))
        logits, self.pool = self.forward(self.model.params, jnp.asarray(packed), self.pool, metadata)
        return np.asarray(logits)

    def prefill(self, prompts: list[list[int]], chunk: int) -> np.ndarray:
        """Feeds whole prompts, `chunk` tokens of a row at a time, rows mixed; logits at each prompt's end."""
        rest = [list(prompt) for prompt in prompts]
        last: dict[int, np.ndarray] = {}
        while any(rest):
            room, now = self.step_tokens, []
            for row in rest:
                now.append(row[: min(chunk, room)])
                room -= len(now[-1])
            logits = self.step(now, self.step_tokens, chunk)
            for b, part in enumerate(now):
                del rest[b][: len(part)]
                if part and not rest[b]:
                    last[b] = logits[b]
        return np.stack([last[b] for b in range(len(prompts))])

    def greedy(self, logits: np.ndarray, num_new: int) -> np.ndarray:
        """Continues every row with its likeliest token; [B, num_new]."""
        tokens = [logits.argmax(-1)]
        for _ in range(num_new - 1):
            logits = self.step([[int(token)] for token in tokens[-1]], len(logits), 1)
            tokens.append(logits.argmax(-1))
        return np.stack(tokens, axis=1)
