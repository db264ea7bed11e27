"""Block sizes of the TPU kernels: what the heuristic chooses for which shapes."""

import jax.numpy as jnp
import pytest

from pallas_kernels import init_pages
from pallas_kernels.pages import stored
from pallas_kernels.tpu import attention
from pallas_kernels.tpu.blocks import decode_sizes, prefill_kernels, prefill_sizes, whole_heads
from pallas_kernels.tpu.heads import pack_heads


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "device_kind", "max_pages", "item_tokens", "transposed_passes"),
    [
        ((32, 8), 128, jnp.int8, "TPU7x", 32, 1024, 3),  # of four passes
        ((32, 8), 128, jnp.int8, "TPU7x", 8, 512, 2),
        ((16, 8), 128, jnp.int8, "TPU7x", 32, 1024, 2),  # of two
        ((28, 4), 128, jnp.int8, "TPU7x", 32, 1024, 1),  # 1 MiB
        ((32, 8), 128, jnp.int8, "TPU v6 lite", 32, 512, 0),
        ((32, 8), 128, jnp.bfloat16, "TPU7x", 32, 256, 0),
        ((8, 1), 128, jnp.int8, "TPU7x", 32, 2048, 0),  # one pass
        ((64, 8), 64, jnp.int8, "TPU7x", 32, 1024, 0),
        ((256, 8), 128, jnp.int8, "TPU7x", 32, 512, 0),  # a group of rows that share pages
        ((40, 8), 128, jnp.int8, "TPU7x", 32, 1024, 1),  # one pass
        ((32, 2), 128, jnp.int8, "TPU7x", 32, 2048, 1),  # one pass of 1 MiB
    ],
)
def test_items_are_larger_and_keys_transposed_where_the_matrix_unit_is_the_limit(
    heads, head_dim, dtype, device_kind, max_pages, item_tokens, transposed_passes
):
    pages = init_pages(4, heads[1], 64, head_dim, dtype)
    packing = pack_heads(heads[0], heads[1], head_dim, pages.data.shape[3])
    sizes = decode_sizes(pages, max_pages, packing, device_kind)
    assert (sizes.tokens, sizes.transposed_passes) == (item_tokens, transposed_passes)


@pytest.mark.parametrize(
    ("heads", "dtype", "page_size", "max_tokens", "items_per_group", "groups", "distance"),
    [
        ((32, 8), "bfloat16", 16, 4096, 4, 3, 2),  # items of 1 MiB
        ((32, 8), "bfloat16", 16, 128, 4, 4, 2),  # smaller ones, so three groups are ahead
        ((32, 2), "bfloat16", 16, 512, 4, 3, 2),  # copies of 16 KB
        ((24, 12), "bfloat16", 16, 4096, 4, 3, 1),  # 1.5 MiB
        ((32, 32), "bfloat16", 16, 4096, 2, 4, 1),  # 2 MiB
        ((32, 32), "bfloat16", 128, 4096, 1, 5, 1),  # in one page
        ((256, 32), "bfloat16", 16, 4096, 1, 5, 1),  # for many query rows
        ((64, 64), "bfloat16", 16, 4096, 1, 5, 1),  # 4 MiB
        ((8, 1), "int8", 16, 4096, 4, 3, 1),  # beside the addresses of 128 copies
    ],
)
def test_items_make_groups_that_fit_into_vmem(heads, dtype, page_size, max_tokens, items_per_group, groups, distance):
    pages = stored(init_pages(2, heads[1], page_size, 128, dtype, is_padded=True))
    sizes = decode_sizes(pages, max_tokens // page_size, pack_heads(heads[0], heads[1], 128, 128), "TPU7x")
    found = sizes.items_per_group, sizes.items_in_ring // sizes.items_per_group, sizes.distance
    assert found == (items_per_group, groups, distance)
    page_bytes = pages.data.nbytes // pages.num_pages
    assert (sizes.pages_per_item + sizes.spare_pages) * sizes.items_in_ring * page_bytes <= 26 << 20


@pytest.mark.parametrize(
    ("heads", "page_size", "dtype", "max_tokens", "window", "pages_per_item"),
    [
        ((32, 8), 64, "bfloat16", 300, None, 3),  # five pages in two items
        ((8, 1), 16, "bfloat16", 2000, None, 64),  # 125 in two, which saves little
        ((32, 8), 16, "int8", 300, None, 20),  # 19 in one, of whole tiles
        ((8, 1), 16, "bfloat16", 20, None, 8),  # 128 tokens at least
        ((32, 16), 64, "int8", 4096, 1024, 6),  # 17 in three
        ((4, 1), 16, "bfloat16", 4096, 512, 33),
        ((4, 1), 16, "bfloat16", 4096, 2049, 64),  # 129 do not lie in one chunk of the table
    ],
)
def test_items_of_a_short_table_and_of_a_window_are_even(heads, page_size, dtype, max_tokens, window, pages_per_item):
    pages = stored(init_pages(2, heads[1], page_size, 128, dtype, is_padded=True))
    table = jnp.zeros((1, -(-max_tokens // page_size)), jnp.int32)
    if window is not None:
        _, table, _ = attention.in_window(jnp.zeros(1, jnp.int32), table, page_size, window)
    sizes = decode_sizes(pages, table.shape[1], pack_heads(heads[0], heads[1], 128, 128), "TPU7x")
    assert sizes.pages_per_item == pages_per_item


def test_every_prompt_has_one_kernel():
    pages = init_pages(9, 8, 16, 128)
    for num_rows in (1, 16):
        for max_query_len in (2, 64, 65, 512):
            counts = [counts for _, counts in prefill_kernels(pages, 32, num_rows, max_query_len, 64)]
            assert all(sum(n in some for some in counts) == 1 for n in range(1, 1025))
    assert len(prefill_kernels(pages, 32, 1, 512, 64)) == 1
    short, long = (sizes.query_tokens for sizes, _ in prefill_kernels(pages, 32, 16, 512, 64))
    assert short < long


@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (64, 64), (28, 4), (14, 2), (71, 1), (4, 1), (8, 1)])
def test_products_and_tasks_divide_the_heads(heads):
    pages = init_pages(2, heads[1], 16, 128)
    for max_query_len in (2, 64, 256, 512):
        sizes = prefill_sizes(pages, heads[0], max_query_len, max_pages=64)
        of_task, kv_heads = whole_heads(*heads) // sizes.head_blocks, heads[1] // sizes.head_blocks
        assert of_task % sizes.heads_per_unit == 0 and of_task // kv_heads % sizes.heads_per_product == 0
        assert sizes.head_blocks == 1 or (of_task % 8 == 0 and kv_heads % 8 == 0)
    assert sizes.head_blocks == {32: 2, 64: 4}.get(heads[1], 1)


@pytest.mark.parametrize(
    ("heads", "max_tokens", "window", "tokens"),
    [
        ((64, 8), 4096, None, 512),
        ((64, 8), 4096, 128, 128),  # tasks of 128 tokens see 255 keys
        ((32, 8), 4096, 128, 256),  # of 256 tokens 383
        ((32, 8), 4096, 512, 512),
        ((32, 8), 300, None, 512),
        ((32, 8), 256, None, 256),
        ((32, 8), 16, None, 128),
    ],
)
def test_prefill_blocks_have_the_keys_that_a_task_can_see(heads, max_tokens, window, tokens):
    sizes = prefill_sizes(init_pages(2, heads[1], 16, 128), heads[0], 512, max_tokens // 16, window)
    assert sizes.tokens == tokens
