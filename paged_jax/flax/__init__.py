"""Paged caches for Flax: `paged_jax.flax.nnx` and `paged_jax.flax.linen`, alike but for the Flax they speak.

A `PagedCache` is an `attention_fn` for Flax's own attention layers, one for each layer. The `AttentionMetadata` of a
step goes where the mask went: down through the model as an argument, into the layers' `mask`. `paged_step` makes the
model the pure function `(params, tokens, pool, metadata) -> (logits, pool)` that rollouts and `Engine` run.
"""

from paged_jax.flax.step import Step

__all__ = ["Step"]
