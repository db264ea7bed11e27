"""Block sizes of the TPU kernels: a short heuristic that depends on shapes and on the kind of chip."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pages import LANES, SUBLANES, Pages
from pallas_kernels.tpu.heads import HeadPacking
from pallas_kernels.tpu.memory import IDS
from pallas_kernels.tpu.tasks import PrefillSizes
from pallas_kernels.tpu.walk import DecodeSizes

V7X = "TPU7x"  # its HBM is so fast that other units become the limit
ITEM_BYTES = 1 << 20
AHEAD_BYTES = 6 << 20  # more than a microsecond of any chip's bandwidth
SMALL_COPY = 16 << 10  # bytes: of such copies two groups ahead do as well as three
BLOCK_BYTES = 4 << 20
MAX_BLOCK_PAGES = 32  # of prefill: one bit each in a scalar
KEYS_PER_BLOCK = 512  # of prefill
SHORT_TASK, MEDIUM_TASK = 64, 256  # tokens
MOST_ROWS = 9216  # of a task, of 128 lanes in bfloat16
MOST_PRODUCT_ROWS = 1152  # 9 heads and 128 tokens
MAX_ITEM_PAGES = 64  # of decode: each copy is code of its own
MAX_ITEM_TOKENS = 2048
MAX_ITEM_SCORES = 1 << 18  # 1 MiB
MANY_ROWS = 64  # of queries: two scores of so many do not fit into registers,
FEW_TOKENS = 192  # unless an item has so few
PUSHED_TOKENS = 1024  # of an item of 2 MiB: more would be wasted on short rows
SHORT_REST = 256  # tokens that rows have of their own, on average: up to so many, items of 128 tokens are faster
SMALL_GROUP = 32  # rows that share pages: up to this many, the decode kernel takes some of them at a time
ALL_COUNTS = range(1, 1 << 30)  # of a row's new tokens


def pushes_bound(pages: Pages, packing: HeadPacking, device_kind: str) -> bool:
    """Whether pushing keys and values into the matrix unit takes longest, and other units are free to help.

    That is so for int8 on v7x, unless the cross-lane unit is busy with heads of 64. More query rows than `MANY_ROWS`,
    those of groups that share pages, were not measured.
    """
    is_int8_on_v7x = pages.dtype == jnp.int8 and device_kind == V7X
    return is_int8_on_v7x and packing.rows <= MANY_ROWS and packing.head_dim > LANES // 2


def token_bytes(pages: Pages, packing: HeadPacking) -> int:
    """Of the keys and values of a token, in whole registers."""
    registers = pages.num_kv_heads * -(-packing.lanes // LANES)
    rows = pages.data.shape[2] // pages.page_size
    return registers * rows * LANES * jnp.dtype(pages.dtype).itemsize


def item_pages(pages: Pages, max_tokens: int, packing: HeadPacking, is_bound_by_pushes: bool) -> tuple[int, bool]:
    """The pages of an item of the decode kernel, and whether they were doubled.

    An item holds about 1 MiB (256 tokens of 8 heads of 128 bfloat16 numbers), but less than twice what a row can hold.
    It costs about 120 cycles of scalar work beside 4 for each copy, so few heads take up to 2048 tokens in 64 pages.
    Where pushing keys and values takes longest, an item of at most 1 MiB and 512 tokens is doubled.
    """
    longest = pl.next_power_of_2(max_tokens)
    most = min(MAX_ITEM_TOKENS, MAX_ITEM_SCORES // packing.rows)
    target = max(LANES, min(most, longest, ITEM_BYTES // token_bytes(pages, packing)))
    count = 1
    while count < MAX_ITEM_PAGES and (count * pages.page_size < target or count * pages.page_size % LANES):
        count *= 2
    tokens = count * pages.page_size
    is_doubled = (
        is_bound_by_pushes
        and tokens * token_bytes(pages, packing) <= ITEM_BYTES
        and 2 * tokens <= min(most, longest, PUSHED_TOKENS)
        and 4 <= 2 * count <= MAX_ITEM_PAGES  # fewer large ones would have spare ones as large
    )
    return (2 * count if is_doubled else count), is_doubled


def even_pages(pages: Pages, max_pages: int, pages_per_item: int) -> int:
    """Divides a full row evenly over its items, in whole tiles and 128 tokens at least, if that saves a quarter.

    So the last item of a window, or of a short table, is not half empty. The ids of an item lie in one chunk of the
    page table, which a power of two divides and other numbers do not: tables of more columns keep their items. Saving
    less would not make up for registers that are not full.
    """
    if max_pages > IDS:
        return pages_per_item
    tile_rows = SUBLANES * 4 // jnp.dtype(pages.dtype).itemsize
    count = max(pl.cdiv(max_pages, pl.cdiv(max_pages, pages_per_item)), pl.cdiv(LANES, pages.page_size))
    while count * pages.page_size % tile_rows:
        count += 1
    return count if 4 * count <= 3 * pages_per_item else pages_per_item


def items_per_group(pages_per_item: int, item_bytes: int, is_doubled: bool, num_rows: int) -> int:
    """A group of the decode kernel is a basic block, at whose end the matrix unit idles, so it has four items.

    It has two where these are so large that the ring would leave little of VMEM, and one where a spare page is as large
    as the item, or the query rows are many.
    """
    if item_bytes <= ITEM_BYTES or is_doubled:
        return 4
    if item_bytes > 2 * ITEM_BYTES or num_rows > MANY_ROWS or pages_per_item == 1:
        return 1
    return 4 if 2 * item_bytes <= 3 * ITEM_BYTES else 2


def decode_sizes(
    pages: Pages, max_pages: int, packing: HeadPacking, device_kind: str, item_tokens: int | None = None
) -> DecodeSizes:
    """Sizes of the decode kernel.

    The softmax of an item must not wait for its scores: it follows by two items. By one, where two scores do not fit
    into registers: those of many rows and tokens, those of large items beside keys that are transposed, those
    beside the addresses of 128 copies.

    The ring holds the items at work and two groups in flight; three where groups are small, unless starting their
    copies takes as long as moving the bytes: nothing hides the copies of the first groups.

    Keys enter the matrix unit half as fast as values, since they are transposed on the way. Where that is the limit,
    the cross-lane unit transposes the keys of three quarters of an item's passes, rounded up, if the item is doubled;
    else of half, rounded up from 1 MiB on.

    Args:
        max_pages: of a row.
        item_tokens: the most in an item; None: as many as a row can have.
    """
    is_bound_by_pushes = pushes_bound(pages, packing, device_kind)
    max_tokens = min(max_pages * pages.page_size, item_tokens or MAX_ITEM_TOKENS)
    pages_per_item, is_doubled = item_pages(pages, max_tokens, packing, is_bound_by_pushes)
    pages_per_item = even_pages(pages, max_pages, pages_per_item)
    tokens = pages_per_item * pages.page_size
    item_bytes = tokens * token_bytes(pages, packing)
    copies = pages_per_item * (1 if pages.scales is None else 2)
    group = items_per_group(pages_per_item, item_bytes, is_doubled, packing.rows)
    fits_twice = (
        (packing.rows < MANY_ROWS or (packing.rows == MANY_ROWS and tokens <= FEW_TOKENS))
        and item_bytes <= ITEM_BYTES
        and not (is_bound_by_pushes and item_bytes > ITEM_BYTES // 2)
        and copies <= MAX_ITEM_PAGES
    )
    distance = 2 if fits_twice else 1
    two_suffice = item_bytes <= copies * SMALL_COPY or (group == 4 and 2 * group * item_bytes >= AHEAD_BYTES)
    ring = ((2 if two_suffice else 3) + -(-2 * distance // group)) * group
    transposed, passes = 0, packing.num_passes
    if is_bound_by_pushes:
        transposed = passes - passes // 4 if is_doubled else (passes + (item_bytes >= ITEM_BYTES)) // 2
    return DecodeSizes(pages.page_size, pages_per_item, group, ring, distance, group > 1, transposed)


def prefill_kernels(
    pages: Pages, num_heads: int, num_rows: int, max_query_len: int, max_pages: int, window: int | None = None,
    dtype=jnp.bfloat16,
) -> list[tuple[PrefillSizes, range]]:  # fmt: skip
    """The prefill kernels of a step, and how many new tokens the rows have that each takes.

    A kernel computes whole tasks, so chunks that are much shorter than the longest have a kernel with shorter tasks.
    """
    sizes = prefill_sizes(pages, num_heads, max_query_len, max_pages, window, dtype)
    shorter = [n for n in (SHORT_TASK if num_rows > 1 else 0, MEDIUM_TASK) if 0 < n < sizes.query_tokens]
    kernels, longest = [], 0
    for tokens in shorter:
        shorter_sizes = prefill_sizes(pages, num_heads, tokens, max_pages, window, dtype)
        kernels.append((shorter_sizes, ALL_COUNTS[longest:tokens]))
        longest = tokens
    return [*kernels, (sizes, ALL_COUNTS[longest:])]


def whole_heads(num_heads: int, num_kv_heads: int) -> int:
    """The query heads that the prefill kernel works on: a large odd group gets one more, of zeros."""
    return num_heads + num_heads % 2 if num_kv_heads == 1 and num_heads > SUBLANES else num_heads


def keys_per_block(max_keys: int, window: int | None, query_tokens: int) -> int:
    """The keys of a block of the prefill kernel: 512, or fewer down to 128 where a task sees fewer.

    Blocks begin at multiples of their keys, so a window hardly ever lies in one: it takes two or three smaller ones.
    """
    keys = KEYS_PER_BLOCK
    while keys > LANES and keys // 2 >= max_keys:
        keys //= 2
    while keys > LANES and window is not None and keys >= window + query_tokens - 1:
        keys //= 2
    return keys


def prefill_sizes(
    pages: Pages, num_heads: int, max_query_len: int, max_pages: int, window: int | None = None, dtype=jnp.bfloat16
) -> PrefillSizes:
    """Sizes of the prefill kernel.

    A block has up to 512 keys and at most 4 MiB. Where all heads are more, a task has some of them, if K is a multiple
    of 16; else blocks have fewer keys. A task holds up to 512 tokens and about 8192 rows of 128 lanes (4096 of
    float32), whose state takes about 25 MiB of VMEM. A product has about 1024 rows, all of a KV head; a unit has
    several of small ones, since each basic block waits 400 cycles for its results.

    Args:
        max_pages: of a row.
        dtype: of the products.
    """
    num_kv_heads = pages.num_kv_heads
    registers = -(-pages.data.shape[3] // LANES)
    page_bytes = pages.data.size // pages.num_pages * pages.data.dtype.itemsize
    heads, kv_heads, blocks = whole_heads(num_heads, num_kv_heads), num_kv_heads, 1
    while KEYS_PER_BLOCK // pages.page_size * page_bytes > blocks * BLOCK_BYTES and kv_heads % (2 * SUBLANES) == 0:
        heads, kv_heads, blocks = heads // 2, kv_heads // 2, 2 * blocks
    group = heads // kv_heads
    tokens = max(16, 1 << (min(512, max_query_len) - 1).bit_length())
    while tokens > 16 and tokens * heads * registers * jnp.dtype(dtype).itemsize > 2 * MOST_ROWS:
        tokens //= 2

    def per_product(tokens: int) -> int:
        """Query heads of a product, of which a task has two at least."""
        fits = [h for h in range(1, group + 1) if group % h == 0 and h * tokens <= MOST_PRODUCT_ROWS and 2 * h <= heads]
        return max(fits, default=1)

    while group * tokens >= 1024 and per_product(tokens) * tokens < 512:  # of a group that has few divisors
        tokens //= 2
    rows, products = per_product(tokens) * tokens, heads // per_product(tokens)
    most = max(2, 1024 // rows)
    per_unit = max(n for n in (1, 2, 4, 8) if n == 1 or (n <= most and products % (2 * n) == 0 and products >= 4 * n))
    most_keys = keys_per_block(max_pages * pages.page_size, window, tokens)
    pages_per_block = 1
    while pages_per_block < MAX_BLOCK_PAGES and (
        pages_per_block * pages.page_size % LANES
        or (pages_per_block * pages.page_size < most_keys and 2 * pages_per_block * page_bytes <= blocks * BLOCK_BYTES)
    ):
        pages_per_block *= 2
    return PrefillSizes(pages.page_size, pages_per_block, tokens, per_product(tokens), per_unit, blocks)
