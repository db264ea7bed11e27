"""What fits: weights, pages and sequences in the memory of a device, and the tokens a second that its bandwidth allows.

    plan = make_plan("Qwen3-8B/", "v6e", context=8192)
    print(plan)

    python -m paged_jax plan --model Qwen3-8B/ --memory v6e --context 8192

The numbers are those of the arrays that `models.load` and `KVCache.create` make, padding included; nothing is
allocated, and of a model's folder only config.json is read.
"""

from paged_jax.planner.chips import CHIPS, Chip, find_chip, measure_bandwidth
from paged_jax.planner.plan import Plan, alternatives, make_plan
from paged_jax.planner.sizes import ModelSizes, Weights, find_sizes, read_sizes

__all__ = [
    "CHIPS",
    "Chip",
    "ModelSizes",
    "Plan",
    "Weights",
    "alternatives",
    "find_chip",
    "find_sizes",
    "make_plan",
    "measure_bandwidth",
    "read_sizes",
]
