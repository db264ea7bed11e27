"""Block sizes of the TPU kernels: a short heuristic from shapes alone."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.pages import Pages
from pallas_kernels.tpu.decode import DecodeSizes
from pallas_kernels.tpu.heads import LANES, HeadPacking
from pallas_kernels.tpu.prefill import PrefillSizes

RING_BYTES = 12 << 20  # in flight or in use: more than a microsecond of any chip's bandwidth
MAX_PAGES = 32  # of an item: one bit each in a scalar


def decode_sizes(pages: Pages, max_pages: int, packing: HeadPacking) -> DecodeSizes:
    """Sizes of the decode kernel.

    An item holds about 256 tokens (with fewer KV heads more, so that its scalar work pays), a group as many items
    as make 4096 rows of 128 lanes a basic block can overlap, the ring what the bandwidth needs in flight.
    """
    width = pages.num_kv_heads * -(-packing.lanes // LANES)  # registers of a token's key
    target = max(128, min(1024, 2048 // width))
    pages_per_item = 1
    while pages_per_item < MAX_PAGES and (
        pages_per_item * pages.page_size < target or pages_per_item * pages.page_size % LANES
    ):
        pages_per_item *= 2
    tokens = pages_per_item * pages.page_size
    items_per_group = max(1, min(8, 4096 // (width * tokens)))
    item_bytes = tokens * 2 * width * LANES * jnp.dtype(pages.dtype).itemsize
    groups = max(4, min(8, RING_BYTES // (item_bytes * items_per_group)))
    return DecodeSizes(pages.page_size, pages_per_item, items_per_group, groups * items_per_group)


def prefill_sizes(pages: Pages, num_heads: int, max_query_len: int) -> PrefillSizes:
    """Sizes of the prefill kernel.

    A task holds at most 8192 rows of 128 lanes, whose state takes about 25 MiB of VMEM; a unit about 512 rows
    against 512 keys, or as many as one query head has.
    """
    registers = -(-pages.data.shape[3] // LANES)
    tokens = max(16, 1 << (min(256, max_query_len) - 1).bit_length())
    while tokens > 16 and tokens * num_heads * registers > 8192:
        tokens //= 2
    group = num_heads // pages.num_kv_heads
    heads = max(h for h in range(1, group + 1) if group % h == 0 and (h == 1 or h * tokens <= 512))
    pages_per_block = 1
    while pages_per_block < MAX_PAGES and (
        pages_per_block * pages.page_size < 512 or pages_per_block * pages.page_size % LANES
    ):
        pages_per_block *= 2
    return PrefillSizes(pages.page_size, pages_per_block, tokens, heads)
