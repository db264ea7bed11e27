"""Decoding inside one XLA program: slide, reserve, copy on write, forward, sample, stop, release, step after step.

    state = DecodeState.create(config, capacity=256)
    state = prefill(forward, params, state, tokens, query_lens)     # all tokens of a prompt but its last
    state = start(state, slot, last_token, ...)                     # the last one is fed by the first decode step
    state, stop = decode_loop(forward, params, state)               # until all are finished or pages ran short

Every function is pure: jit it at your outermost boundary and donate the state there. A prompt's last token is never
part of the prefill. So sampling happens in one place, parallel samples are forks made before it, and a prefix that is
entirely cached still leaves one token to compute.
"""

import dataclasses
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.mesh import everywhere
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_tables import PageTables
from paged_jax.cache.pool import PagePool
from paged_jax.sampling import SamplingState, draw

Forward = Callable[[Any, Int32[Array, " T"], PagePool, AttentionMetadata], tuple[Float[Array, "B V"], PagePool]]
"""A decoder: (params, tokens, pool, metadata) -> (logits at each sequence's last new token, pool)."""


class Finish(IntEnum):
    """Why a row stopped; UNFINISHED rows may go on."""

    UNFINISHED = 0
    STOP_TOKEN = 1
    MAX_TOKENS = 2
    ROW_FULL = 3  # the sequence fills every page that its row can hold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch in flight. The first three fields own the memory: donate them, and nothing is copied.

    `tokens[b, :num_tokens[b]]` are the tokens that row b drew since the host last emptied the buffer; `feed[b]` is the
    token that its next step computes; `remaining[b]` is how many more it may draw.
    """

    pool: PagePool
    tables: PageTables
    tokens: Int32[Array, "B C"]
    num_tokens: Int32[Array, " B"]
    feed: Int32[Array, " B"]
    remaining: Int32[Array, " B"]
    active: Bool[Array, " B"]
    finish: Int32[Array, " B"]
    sampler: SamplingState

    @classmethod
    def create(
        cls, config: CacheConfig, capacity: int, max_stop_tokens: int = 4, mesh: Mesh | None = None
    ) -> "DecodeState":
        """An empty batch of `config.max_sequences` rows; each can draw `capacity` tokens before the host must read.

        With a mesh, the pool is split over it as in `PagePool.create`, and each device holds all else.
        """
        num_rows = config.max_sequences
        zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731  distinct buffers: each is donated
        state = cls(
            pool=PagePool.create(config, mesh),
            tables=PageTables.create(config),
            tokens=zeros(num_rows, capacity),
            num_tokens=zeros(num_rows),
            feed=zeros(num_rows),
            remaining=zeros(num_rows),
            active=jnp.zeros(num_rows, bool),
            finish=zeros(num_rows),
            sampler=SamplingState.create(num_rows, max_stop_tokens=max_stop_tokens),
        )
        return state.settle()

    def settle(self) -> "DecodeState":
        """All but the pages on every device of their mesh, whatever the decoder split; nothing without a mesh."""
        others = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "pool"}
        return dataclasses.replace(self, **everywhere(others, self.pool))

    def empty_buffer(self) -> "DecodeState":
        """Forget the drawn tokens, which the host has read."""
        return dataclasses.replace(self, num_tokens=jnp.zeros_like(self.num_tokens))


def prefill(
    forward: Forward,
    params: Any,
    state: DecodeState,
    tokens: Int32[Array, " T"],
    query_lens: Int32[Array, " B"],
    max_query_len: int | None = None,
) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Compute and cache the next tokens of some sequences; nothing is sampled.

    Args:
        forward: the decoder. Its logits are not used, so XLA drops the vocabulary projection.
        tokens: the new tokens of all sequences, packed in the order of the rows; padding behind them.
        query_lens: new tokens of each row; 0 leaves a row alone.
        max_query_len: static bound on `query_lens`, T when None.

    Returns:
        The state, and which rows were granted their pages. A refused row is as it was.
    """
    tables, reservation = state.tables.slide().reserve(query_lens)
    pool = state.pool.copy(reservation)
    metadata = AttentionMetadata.ragged(
        tables, query_lens, len(tokens), max_query_len=max_query_len, active=reservation.granted
    )
    _, pool = forward(params, tokens, pool, metadata)
    return dataclasses.replace(state, pool=pool, tables=tables).settle(), reservation.granted


def start(
    state: DecodeState,
    rows: Bool[Array, " B"],
    feed: Int32[Array, " B"],
    remaining: Int32[Array, " B"],
    sampler: SamplingState,
) -> DecodeState:
    """Let some rows decode: each feeds its prompt's last token next and may draw `remaining` tokens (at least 1)."""

    def choose(new, old):
        return jnp.where(rows.reshape(rows.shape + (1,) * (old.ndim - 1)), new, old)

    return dataclasses.replace(
        state,
        feed=choose(feed, state.feed),
        remaining=choose(remaining, state.remaining),
        active=state.active | rows,
        finish=choose(Finish.UNFINISHED, state.finish),
        sampler=jax.tree.map(choose, sampler, state.sampler),
    )


def stop(state: DecodeState, rows: Bool[Array, " B"]) -> DecodeState:
    """End some rows now and free their pages: aborted, preempted, or ended by something only the host can see."""
    return dataclasses.replace(state, active=state.active & ~rows, tables=state.tables.release(rows))


def decode_step(forward: Forward, params: Any, state: DecodeState) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Every active row computes the token it feeds and draws the next one.

    A row that ends frees its pages in this very step. A row that was refused its page is as it was, still active.

    Returns:
        The state, and which active rows were refused.
    """
    rows = jnp.arange(len(state.active))
    full = state.active & (state.tables.lengths >= state.tables.max_length)
    wants = state.active & ~full
    tables, reservation = state.tables.slide().reserve(wants.astype(jnp.int32))
    granted = wants & reservation.granted
    count = granted.astype(jnp.int32)
    pool = state.pool.copy(reservation)
    logits, pool = forward(params, state.feed, pool, AttentionMetadata.decode(tables, granted))
    drawn = draw(logits, state.sampler, state.tokens, tables.lengths, tables.lengths, active=granted).tokens

    capacity = state.tokens.shape[1]
    tokens = state.tokens.at[rows, jnp.where(granted, state.num_tokens, capacity)].set(drawn, mode="drop")
    remaining = state.remaining - count
    finish = jnp.select(
        [full, granted & state.sampler.is_stop(drawn), granted & (remaining <= 0)],
        [jnp.int32(Finish.ROW_FULL), jnp.int32(Finish.STOP_TOKEN), jnp.int32(Finish.MAX_TOKENS)],
        state.finish,
    )
    ended = state.active & (finish != Finish.UNFINISHED)
    state = dataclasses.replace(
        state,
        pool=pool,
        tables=tables.release(ended),
        tokens=tokens,
        num_tokens=state.num_tokens + count,
        feed=jnp.where(granted, drawn, state.feed),
        remaining=remaining,
        active=state.active & ~ended,
        finish=finish,
    )
    return state.settle(), wants & ~granted


def decode_loop(
    forward: Forward, params: Any, state: DecodeState, max_steps: int | Int32[Array, ""] | None = None
) -> tuple[DecodeState, Bool[Array, " B"]]:
    """Decode until every row has finished, pages ran short, a buffer is full, or `max_steps` steps were made.

    One `lax.while_loop`: no visit to the host between steps. When pages run short, every sequence is intact: rows
    that were granted theirs have made their step, the refused ones are as they were. Free some pages and call it again.

    Args:
        forward: the decoder, see `Forward`; static.
        params: its parameters.
        state: the batch; donate it at the jit boundary.
        max_steps: None for as many as the buffer holds; may be traced.

    Returns:
        The state, and which active rows were refused their pages (all False: no shortage).
    """
    capacity = state.tokens.shape[1]
    max_steps = capacity if max_steps is None else max_steps

    def goes_on(carry):
        steps, state, refused = carry
        room = jnp.all(~state.active | (state.num_tokens < capacity))
        return (steps < max_steps) & jnp.any(state.active) & room & ~jnp.any(refused)

    def step(carry):
        steps, state, _ = carry
        state, refused = decode_step(forward, params, state)
        return steps + 1, state, refused

    _, state, refused = lax.while_loop(goes_on, step, (jnp.int32(0), state, jnp.zeros_like(state.active)))
    return state.settle(), refused
