"""Block sizes of the TPU kernels: a short heuristic that depends only on shapes."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pages import LANES, Pages
from pallas_kernels.tpu.heads import HeadPacking
from pallas_kernels.tpu.tasks import PrefillSizes
from pallas_kernels.tpu.walk import DecodeSizes

ITEM_BYTES = 1 << 20
AHEAD_BYTES = 6 << 20  # more than a microsecond of any chip's bandwidth
BLOCK_BYTES = 4 << 20
MAX_PAGES = 32  # of a block of prefill: one bit each in a scalar
MAX_ITEM_PAGES = 64  # each copy is code of its own
MAX_ITEM_TOKENS = 2048
MAX_ITEM_SCORES = 1 << 18  # 1 MiB
MANY_ROWS = 64  # of queries: their softmax fills the time of an item
SHORT_TASK = 64  # tokens
SMALL_GROUP = 32  # rows that share pages: up to this many, the decode kernel takes some of them at a time
ALL_COUNTS = range(1, 1 << 30)  # of a row's new tokens
MANY_PAGES = 16  # of an item: their copies take long to start


def decode_sizes(pages: Pages, max_pages: int, packing: HeadPacking) -> DecodeSizes:
    """Sizes of the decode kernel.

    An item holds about 1 MiB, but at most what the page table can hold: 256 tokens of 8 heads of 128 bfloat16 numbers.
    It costs about 120 cycles of scalar work beside 4 for each copy, so few heads take up to 2048 tokens in 64 pages.
    A group is a basic block, at whose end the matrix unit idles: it has 2 MiB, or 4 MiB where a byte of the pages takes
    twice the work or its copies are strided. The ring holds the items at work and what the bandwidth needs in flight.
    """
    width = pages.num_kv_heads * -(-packing.lanes // LANES)  # registers of a token's row
    rows = pages.data.shape[2] // pages.page_size  # of a token
    token_bytes = width * rows * LANES * jnp.dtype(pages.dtype).itemsize
    longest = pl.next_power_of_2(max_pages * pages.page_size)
    most = min(MAX_ITEM_TOKENS, MAX_ITEM_SCORES // packing.rows)
    target = max(LANES, min(most, longest, ITEM_BYTES // token_bytes))
    pages_per_item = 1
    while pages_per_item < MAX_ITEM_PAGES and (
        pages_per_item * pages.page_size < target or pages_per_item * pages.page_size % LANES
    ):
        pages_per_item *= 2
    item_bytes = pages_per_item * pages.page_size * token_bytes
    items_per_mib = max(1, ITEM_BYTES // item_bytes)
    needs_room = pages.scales is not None or packing.shares_lanes or packing.lanes > LANES
    items_per_group = min(8, items_per_mib * (4 if needs_room else 2)) if item_bytes <= ITEM_BYTES else 1
    # The softmax of an item must not wait for its scores; the scores of many rows do not fit into registers twice.
    distance = 1 if item_bytes >= ITEM_BYTES or packing.rows >= MANY_ROWS else 2
    groups = -(-2 * distance // items_per_group) + max(2, min(3, -(-AHEAD_BYTES // (items_per_group * item_bytes))))
    # Beside the products, few copies cost more than behind them, and strided ones let no load or store pass.
    hides_copies = pages_per_item >= MANY_PAGES and packing.lanes <= LANES
    ring = groups * items_per_group
    return DecodeSizes(pages.page_size, pages_per_item, items_per_group, ring, distance, hides_copies)


def prefill_kernels(
    pages: Pages, num_heads: int, num_rows: int, max_query_len: int, dtype=jnp.bfloat16
) -> list[tuple[PrefillSizes, range]]:
    """The prefill kernels of a step, and how many new tokens the rows have that each takes.

    A kernel computes whole tasks. Where several rows share a step, those with few new tokens get one with short tasks.
    """
    sizes = prefill_sizes(pages, num_heads, max_query_len, dtype)
    if num_rows == 1 or sizes.query_tokens <= SHORT_TASK:
        return [(sizes, ALL_COUNTS)]
    short = prefill_sizes(pages, num_heads, SHORT_TASK, dtype)
    return [(short, ALL_COUNTS[:SHORT_TASK]), (sizes, ALL_COUNTS[SHORT_TASK:])]


def prefill_sizes(pages: Pages, num_heads: int, max_query_len: int, dtype=jnp.bfloat16) -> PrefillSizes:
    """Sizes of the prefill kernel.

    A task holds at most 8192 rows of 128 lanes (4096 of float32), whose state takes about 25 MiB of VMEM; a unit about
    1024 rows against 512 keys, or as many as one query head has. The keys and values of a block take at most 4 MiB.

    Args:
        dtype: of the products.
    """
    num_kv_heads = pages.num_kv_heads
    registers = -(-pages.data.shape[3] // LANES)
    tokens = max(16, 1 << (min(256, max_query_len) - 1).bit_length())
    while tokens > 16 and tokens * num_heads * registers * jnp.dtype(dtype).itemsize > 2 * 8192:
        tokens //= 2
    group = num_heads // num_kv_heads
    heads = max(h for h in range(1, group + 1) if group % h == 0 and (h == 1 or h * tokens <= 1024))
    page_bytes = pages.data.size // pages.num_pages * pages.data.dtype.itemsize
    pages_per_block = 1
    while pages_per_block < MAX_PAGES and (
        pages_per_block * pages.page_size % LANES
        or (pages_per_block * pages.page_size < 512 and 2 * pages_per_block * page_bytes <= BLOCK_BYTES)
    ):
        pages_per_block *= 2
    return PrefillSizes(pages.page_size, pages_per_block, tokens, heads)
