"""Decoding inside one XLA program: rows that know and cache tokens, one step for everything, loops over it."""

from paged_jax.decoding.plan import Plan, first_come_first_served
from paged_jax.decoding.rollout import Rollout, rollout
from paged_jax.decoding.rows import Counters, DecodeState, Finish, Rows
from paged_jax.decoding.step import Stepper, run, start, step, token_counts_for

__all__ = [
    "Counters",
    "DecodeState",
    "Finish",
    "Plan",
    "Rollout",
    "Rows",
    "Stepper",
    "first_come_first_served",
    "rollout",
    "run",
    "start",
    "step",
    "token_counts_for",
]
