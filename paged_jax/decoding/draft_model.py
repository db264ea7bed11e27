"""Drafts of a smaller decoder, with a cache of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.decoding.draft import Drafts
from paged_jax.decoding.rows import Rows
from paged_jax.forward import Forward
from paged_jax.sampling import draw


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftState:
    """What a `DraftModel` keeps: its parameters, and for each row of the batch the tokens that it has cached."""

    params: Any
    cache: KVCache
    tokens: Int32[Array, "B C"]  # of row b, the first `cache.tables.lengths[b]` are cached


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts what a smaller decoder of the same vocabulary would draw in the place of the row (Leviathan et al. 2023).

    It draws with the row's own sampling parameters and noise. So the closer the two decoders are, the more drafts are
    accepted, more than if they drew independently (Daliri et al. 2024). A decoder that drafts for itself is always
    right.

    It has a cache of its own, in which row b follows the tokens of row b of the batch: tokens that both have in common
    stay cached, and the others are computed, in passes of at most `num_tokens`. A row that is too far behind, or finds
    no pages, drafts nothing in this step and tries again in the next.

        drafter = DraftModel(small.forward)
        stepper = Stepper(large.forward, token_counts_for(8, num_drafts=4), drafter=drafter)
        state = drafter.create(small.params, KVCache.create(small_config), capacity=prompts.shape[1] + 64)
        rollout(stepper, large.params, prompts, lengths, cache, max_new_tokens=64, drafter_state=state)

    Args:
        forward: the decoder that drafts.
        num_drafts: D, from 1 to 7.
        num_tokens: T of the pass in which rows catch up; at least one token a row.

    Examples:
        A decoder that drafts for itself: every draft is drawn, so that 6 tokens take a prefill and a few steps.

        >>> drafter = DraftModel(forward, num_drafts=2, num_tokens=8)
        >>> stepper = Stepper(forward, token_counts=(8, 16), drafter=drafter)
        >>> @jax.jit
        ... def sample(params, cache, drafts, prompts, prompt_lens):
        ...     return rollout(stepper, params, prompts, prompt_lens, cache, max_new_tokens=6, drafter_state=drafts)
        >>> drafts = drafter.create(params, KVCache.create(config), capacity=2 + 6)
        >>> drawn, cache = sample(params, KVCache.create(config), drafts, jnp.array([[1, 2]]), jnp.array([2]))
        >>> int(drawn.counters.accepted_tokens), int(drawn.counters.drafted_tokens)
        (3, 3)
    """

    forward: Forward
    num_drafts: int = 4
    num_tokens: int = 64

    def create(self, params: Any, cache: KVCache, capacity: int) -> DraftState:
        """The state before anything is drafted.

        Args:
            params: of the decoder that drafts.
            cache: its own, empty, with as many rows as the batch.
            capacity: C, tokens that a row of the batch can know: in a rollout those of the longest prompt and the most
                new ones, in an engine `config.max_length + 1`.

        Raises:
            ValueError: `num_tokens` does not hold one token of each row.
        """
        num_rows = cache.tables.num_rows
        if self.num_tokens < num_rows:
            raise ValueError(f"num_tokens={self.num_tokens} must hold a token of each of {num_rows} rows: raise it")
        return DraftState(params, cache, jnp.zeros((num_rows, capacity), jnp.int32))

    def propose(self, state: DraftState | None, rows: Rows, asks: Int32[Array, " B"]) -> tuple[Drafts, DraftState]:
        if state is None:
            raise ValueError("a DraftModel needs its state: pass drafter_state=drafter.create(params, cache, capacity)")
        if state.tokens.shape != rows.tokens.shape:
            raise ValueError(
                f"the draft model's state is for rows and tokens of {state.tokens.shape}, the batch has "
                f"{rows.tokens.shape}: create it with its rows and its capacity"
            )
        cache, counts = self._follow(state, rows, asks > 0)
        logits, pool = self._catch_up(state.params, cache, rows, counts)
        caught_up = (asks > 0) & (cache.tables.lengths == rows.num_known)
        drafts = jnp.zeros((len(asks), self.num_drafts), jnp.int32)
        tokens, drafts = self._draw(logits, rows, rows.tokens, drafts, jnp.int32(0), caught_up)

        def draw_next(i: Array, carry: tuple[KVCache, Array, Array]) -> tuple[KVCache, Array, Array]:
            cache, tokens, drafts = carry
            goes_on = caught_up & (i < asks) & (cache.tables.lengths == rows.num_known + i - 1)
            cache, granted = cache.reserve(goes_on.astype(jnp.int32))
            metadata = AttentionMetadata.decode(cache.tables, granted & goes_on)
            logits, pool = self.forward(state.params, drafts[:, i - 1], cache.pool, metadata)
            tokens, drafts = self._draw(logits, rows, tokens, drafts, i, granted & goes_on)
            return KVCache(cache.tables, pool), tokens, drafts

        carry = KVCache(cache.tables, pool), tokens, drafts
        most = jnp.max(jnp.where(caught_up, asks, 0))
        cache, tokens, drafts = lax.fori_loop(1, most, draw_next, carry)
        num_drafts = jnp.where(caught_up, cache.tables.lengths - rows.num_known + 1, 0)
        return Drafts(drafts, num_drafts), DraftState(state.params, cache, tokens)

    def _follow(self, state: DraftState, rows: Rows, wants: Bool[Array, " B"]) -> tuple[KVCache, Int32[Array, " B"]]:
        """Keep what the cache has in common with the rows, and make room for what it lacks of those that want drafts.

        Returns:
            The cache, and how many tokens each row computes.
        """
        place = jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)[None, :]
        differs = (state.tokens != rows.tokens) | (place >= rows.num_known[:, None] - 1)
        common = jnp.argmax(differs, axis=1).astype(jnp.int32)
        tables = state.cache.tables
        kept = jnp.where(rows.active, jnp.minimum(tables.lengths, common), 0)
        kept = jnp.where(tables.can_cut(kept), kept, 0)
        cache = KVCache(tables.truncate(kept).slide(), state.cache.pool)
        lacks = jnp.where(wants, rows.num_known - kept, 0)
        left = self.num_tokens - (jnp.cumsum(lacks, dtype=jnp.int32) - lacks)
        counts = jnp.minimum(jnp.clip(left, 0, lacks), cache.tables.max_length - kept)
        cache, granted = cache.reserve(counts)
        return cache, jnp.where(granted, counts, 0)

    def _catch_up(
        self, params: Any, cache: KVCache, rows: Rows, counts: Int32[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        """Logits after the next tokens of each row."""
        metadata = AttentionMetadata.ragged(cache.tables, counts, self.num_tokens)
        tokens = rows.tokens.at[metadata.sequences, metadata.positions].get(mode="clip")
        return self.forward(params, tokens, cache.pool, metadata)

    def _draw(
        self, logits: Array, rows: Rows, tokens: Array, drafts: Array, i: Int32[Array, ""], draws: Bool[Array, " B"]
    ) -> tuple[Int32[Array, "B C"], Int32[Array, "B D"]]:
        """Draft i of each row that draws one, in its token buffer and among the drafts."""
        at = rows.num_known + i
        drawn = draw(logits, rows.sampling, tokens, rows.num_prompt, at, active=draws).tokens
        row = jnp.arange(len(drawn), dtype=jnp.int32)
        place = jnp.where(draws, at, tokens.shape[1])
        tokens = tokens.at[row, place].set(drawn, mode="drop", unique_indices=True)
        return tokens, drafts.at[:, i].set(drawn)
