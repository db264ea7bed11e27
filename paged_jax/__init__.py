"""A paged KV cache for any JAX decoder: pages on the device, their table inside jit, prefixes shared.

`CacheConfig` sizes a `PagePool` (the memory) and a `PageTable` (who owns what). A step reserves pages in the table,
builds an `AttentionMetadata`, and each layer calls `paged_attention`. `decode_loop` runs many such steps in one XLA
program; `generate` serves prompts with it.
"""

from paged_jax.attention import paged_attention
from paged_jax.cache.config import CacheConfig
from paged_jax.cache.handle_book import HandleBook
from paged_jax.cache.handles import PageHandle
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_table import PageTable, Reservation
from paged_jax.cache.page_tables import PageTables, Reservations
from paged_jax.cache.pool import PagePool
from paged_jax.decoding import DecodeState, decode_loop, decode_step, prefill
from paged_jax.generator import Completion, Generator, generate
from paged_jax.memory import CacheReport, MemoryReport
from paged_jax.prefix.cache import PrefixCache
from paged_jax.sampling import SamplingParams
from pallas_kernels import Pages

__version__ = "0.1.0"
__all__ = [
    "AttentionMetadata",
    "CacheConfig",
    "CacheReport",
    "Completion",
    "DecodeState",
    "Generator",
    "HandleBook",
    "MemoryReport",
    "PageHandle",
    "PagePool",
    "PageTable",
    "PageTables",
    "Pages",
    "PrefixCache",
    "Reservation",
    "Reservations",
    "SamplingParams",
    "decode_loop",
    "decode_step",
    "generate",
    "paged_attention",
    "prefill",
]
