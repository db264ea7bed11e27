"""A paged KV cache for any JAX decoder: pages on the device, their table inside jit, prefixes shared.

`CacheConfig` sizes a `KVCache`: the pool of pages, and the page tables that say who owns what. A step reserves pages,
builds an `AttentionMetadata`, and each layer calls `paged_attention`. `rollout` draws many samples of many prompts in
one XLA program, `score` measures given ones; `Engine` serves requests that come and go.
"""

from paged_jax.attention import paged_attention
from paged_jax.cache.config import CacheConfig
from paged_jax.cache.fault import Fault
from paged_jax.cache.handle_book import HandleBook
from paged_jax.cache.handles import PageHandle
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_tables import PageTables
from paged_jax.cache.pool import LayerPlace, PagePool
from paged_jax.cache.step_check import StepCheck
from paged_jax.decoding.beam import Beams, beam_search
from paged_jax.decoding.draft import Drafter, Drafts, Lookup
from paged_jax.decoding.draft_model import DraftModel
from paged_jax.decoding.prefill import prefill
from paged_jax.decoding.rollout import Rollout, rollout
from paged_jax.decoding.rows import Finish
from paged_jax.decoding.score import Score, score
from paged_jax.decoding.stepper import Stepper, token_counts_for
from paged_jax.engine import Completion, Engine, Piece
from paged_jax.forward import Forward
from paged_jax.memory import CacheReport, MemoryReport
from paged_jax.prefix.prefix_cache import PrefixCache
from paged_jax.sampling import Automaton, BeamParams, Processor, SamplingParams, SamplingState

__version__ = "0.1.0"
__all__ = [
    "AttentionMetadata",
    "Automaton",
    "BeamParams",
    "Beams",
    "CacheConfig",
    "CacheReport",
    "Completion",
    "DraftModel",
    "Drafter",
    "Drafts",
    "Engine",
    "Fault",
    "Finish",
    "Forward",
    "HandleBook",
    "KVCache",
    "LayerPlace",
    "Lookup",
    "MemoryReport",
    "PageHandle",
    "PagePool",
    "PageTables",
    "Piece",
    "PrefixCache",
    "Processor",
    "Rollout",
    "SamplingParams",
    "SamplingState",
    "Score",
    "StepCheck",
    "Stepper",
    "beam_search",
    "paged_attention",
    "prefill",
    "rollout",
    "score",
    "token_counts_for",
]
