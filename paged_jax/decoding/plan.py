"""The policy that says how many tokens each row computes in a step."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from paged_jax.decoding.rows import DecodeState

Plan = Callable[[DecodeState, int], Int32[Array, " B"]]
"""(state, budget) -> tokens that each row computes: at most `state.behind[b]` of row b, at most `budget` in all.

Pure and static under jit. Rows that it gives nothing wait; the oldest active row must get some, or nobody may ever.
"""

OLDEST, YOUNGEST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


def first_come_first_served(state: DecodeState, budget: int) -> Int32[Array, " B"]:
    """Decoding rows compute their token; what is left of the budget goes to the others, the oldest first.

    A row that is further behind begins, or goes on, only if the pages that it and the older ones need to catch up are
    free, beside one for every row that decodes. The oldest of all rows always goes on.
    """
    behind, age = state.behind, state.rows.age
    decodes = behind == 1
    catches_up = (behind > 1) & _has_room(state, budget, decodes)
    order = jnp.argsort(jnp.where(catches_up, age, YOUNGEST))
    wanted = jnp.where(catches_up, behind, 0)[order]
    left = budget - jnp.sum(decodes, dtype=jnp.int32) - (jnp.cumsum(wanted, dtype=jnp.int32) - wanted)
    chunk = jnp.clip(left, 0, wanted)
    return jnp.zeros_like(behind).at[order].set(chunk, unique_indices=True) + decodes.astype(jnp.int32)


def _has_room(state: DecodeState, budget: int, decodes: Bool[Array, " B"]) -> Bool[Array, " B"]:
    """Whether the pages that a row needs to catch up are free once the older rows have theirs."""
    rows, tables, behind = state.rows, state.cache.tables, state.behind
    waiting_age = jnp.where(behind > 1, rows.age, YOUNGEST)
    order = jnp.argsort(waiting_age)
    ok = jnp.ones(behind.shape, bool)
    for table, group in zip(tables.groups, tables.layout, strict=True):
        most = -(-rows.num_known // table.page_size) - table.first_column
        if group.window is not None:  # a step reads window - 1 tokens and writes at most `budget`
            most = jnp.minimum(most, -(-(group.window + budget - 2) // table.page_size) + 1)
        mapped = -(-table.lengths // table.page_size) - table.first_column
        need = jnp.where(behind > 1, jnp.maximum(most - mapped, 0), 0)[order]
        fits = jnp.cumsum(need, dtype=jnp.int32) <= table.num_free - jnp.sum(decodes, dtype=jnp.int32)
        ok &= jnp.zeros_like(ok).at[order].set(fits, unique_indices=True)
    is_oldest = rows.age == jnp.min(jnp.where(behind > 0, rows.age, YOUNGEST))
    return ok | is_oldest
