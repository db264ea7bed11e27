"""The TPU kernels in the interpreter against the float64 oracle and the reference."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernels.cases import CASES, Case, expected, make_inputs, random_forest, share

from pallas_kernels import copy_pages, init_pages, paged_attention, write_pages
from pallas_kernels.pages import stored
from pallas_kernels.tpu import attention, decode, memory, page_advice, refusal, units, walk
from pallas_kernels.tpu.blocks import ALL_COUNTS
from pallas_kernels.tpu.tasks import PrefillSizes
from pallas_kernels.tpu.walk import DecodeSizes

# What the kernels take runs with -m long; the tests below have one of each kind.
ATTENTION_CASES = [
    pytest.param(case, id=case.name, marks=[] if case.tpu_refuses else pytest.mark.long) for case in CASES
]


def attend(case, inputs, implementation="pallas_tpu", **options):
    arrays = dict(sinks=inputs.sinks, sharing=options.pop("sharing", None))
    options = {**case.options, **options, "implementation": implementation}
    return jax.jit(partial(paged_attention, **options))(*inputs.arguments, **arrays)


def written(inputs, implementation):
    arguments = (inputs.pages, inputs.k, inputs.v, inputs.page_table, inputs.lengths, inputs.query_starts)
    return jax.jit(partial(write_pages, implementation=implementation))(*arguments)


def assert_same_pages(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))  # NaN == NaN


def check(case, inputs):
    if case.tpu_refuses:
        with pytest.raises(NotImplementedError, match=case.tpu_refuses):
            attend(case, inputs)
        return
    check_result(case, inputs, attend(case, inputs, return_lse=True))


def check_result(case, inputs, result):
    out, lse = expected(case, inputs)
    assert result.out.dtype == inputs.q.dtype
    np.testing.assert_allclose(np.asarray(result.out, np.float64), out, atol=case.tolerance, rtol=0)
    np.testing.assert_allclose(np.asarray(result.lse), lse, atol=case.tolerance, rtol=1e-6)
    # Not one slot differs but those of the new tokens.
    assert_same_pages(result.pages, inputs.pages if inputs.k is None else written(inputs, "reference"))


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_equals_the_oracle_whatever_unowned_slots_and_ids_hold(interpreter, small_blocks, case):
    check(case, make_inputs(case))


@pytest.mark.long  # short with groups of items, as transposed keys
@pytest.mark.parametrize(
    ("dtype", "page_size"),
    [("int8", 16), ("int8", 64), ("float8_e4m3fn", 16), ("float8_e4m3fn", 32)],
)
def test_quantised(interpreter, small_blocks, dtype, page_size):
    lengths = (0, 1, 64, 65, 130, 300)
    case = Case(
        dtype, lengths, (0, 1, 1, 1, 1, 1), (8, 2), 128, page_size, dtype, "bfloat16", holes=((5, 1),), is_padded=True
    )
    check(case, make_inputs(case))


@pytest.mark.long
@pytest.mark.parametrize(
    ("page_size", "transposed_passes", "heads", "head_dim", "query_dtype"),
    [
        (16, 1, (16, 4), 128, "bfloat16"),  # of two passes of two heads the last one
        (64, 2, (16, 4), 128, "float32"),
        (64, 1, (24, 6), 128, "bfloat16"),  # of three passes
        (16, 3, (32, 8), 128, "bfloat16"),  # of four
        (16, 1, (16, 2), 256, "bfloat16"),
    ],
)
def test_transposed_keys_give_the_same_scores(
    interpreter, monkeypatch, page_size, transposed_passes, heads, head_dim, query_dtype
):
    sizes = DecodeSizes(page_size, 128 // page_size, 2, 4, transposed_passes=transposed_passes)
    monkeypatch.setattr(attention, "decode_sizes", lambda *_: sizes)
    lengths = (0, 1, 64, 65, 130, 300)
    case = Case(
        "transposed", lengths, (0, 1, 1, 1, 1, 1), heads, head_dim, page_size, "int8", query_dtype, holes=((5, 1),),
        is_padded=True,
    )  # fmt: skip
    check(case, make_inputs(case))


@pytest.mark.parametrize(
    ("shape", "dtype", "tiled"),
    [
        ((3, 2, 32, 256), jnp.bfloat16, (3, 2, 4, 8, 256)),
        ((3, 2, 32, 128), jnp.bfloat16, (3, 2, 32, 128)),
        ((3, 2, 32, 256), jnp.int8, (3, 2, 32, 256)),
    ],
)
def test_scratch_for_rows_of_several_tiles_has_those_of_hbm(monkeypatch, shape, dtype, tiled):
    dtype = jnp.dtype(dtype)
    assert memory.tiled_as_in_hbm(shape, dtype).shape == shape  # in the interpreter
    monkeypatch.setattr(memory, "target_platform", lambda: "tpu")
    assert memory.tiled_as_in_hbm(shape, dtype).shape == tiled


@pytest.mark.long  # short beside a neighbour of NaN
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_two_heads_of_size_64_side_by_side(interpreter, small_blocks, dtype):
    page_size = 16 if dtype == "bfloat16" else 64
    case = Case("pairs", (0, 1, 16, 17, 40, 130), (0, 1, 1, 1, 1, 1), (8, 4), 64, page_size, dtype, "bfloat16")
    check(case, make_inputs(case))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "options"),
    [
        pytest.param("int8", 128, 16, dict(window=100), marks=pytest.mark.long),
        pytest.param("int8", 128, 64, dict(window=100), marks=pytest.mark.long),
        pytest.param("float8_e4m3fn", 64, 32, dict(window=100, soft_cap=5.0, sinks=True), marks=pytest.mark.long),
    ],
)
def test_mixed_batch_of_8_bit_pages(interpreter, small_blocks, dtype, head_dim, page_size, options):
    lengths, query_lens = (0, 1, 64, 130, 300), (0, 1, 16, 1, 40)
    case = Case(
        "8-bit", lengths, query_lens, (4, 2), head_dim, page_size, dtype, "bfloat16", holes=((4, 1),), is_padded=True
    )
    case = dataclasses.replace(case, **options)
    check(case, make_inputs(case))


@pytest.mark.parametrize(
    ("distance", "hides_copies", "heads", "head_dim", "dtype", "transposed_passes"),
    [
        (1, True, (16, 4), 128, "int8", 1),  # keys and values share a tile; the keys of the last two heads
        (2, True, (2, 1), 256, "bfloat16", 0),
        pytest.param(2, True, (4, 1), 128, "bfloat16", 0, marks=pytest.mark.long),
        pytest.param(1, True, (4, 2), 128, "int8", 0, marks=pytest.mark.long),
        pytest.param(1, True, (4, 2), 64, "bfloat16", 0, marks=pytest.mark.long),
        pytest.param(1, False, (4, 1), 128, "bfloat16", 0, marks=pytest.mark.long),
    ],
)
def test_groups_of_items_and_a_page_table_that_streams(
    interpreter, monkeypatch, distance, hides_copies, heads, head_dim, dtype, transposed_passes
):
    """Several items a basic block, several sequences a group, more pages in an item than bits in a word.

    Page ids are copied from HBM as they are needed.
    """
    monkeypatch.setattr(memory, "RESIDENT_BYTES", 0)
    for module in (decode, walk):
        monkeypatch.setattr(module, "WORD_BITS", 4)
    sizes = DecodeSizes(16, 8, 2, 2 + 2 * distance, distance, hides_copies, transposed_passes)
    monkeypatch.setattr(attention, "decode_sizes", lambda *_: sizes)
    lengths = (3, 130, 1, 128, 129, 7, 0, 260, 16, 2, 5)
    holes = ((1, 8), (7, 1), (7, 6), (7, 12))  # of row 1 the last page
    case = Case(
        "streams", lengths, (1,) * len(lengths), heads, head_dim, 16, dtype, "bfloat16", holes=holes, is_padded=True
    )
    check(case, make_inputs(case))


@pytest.mark.long
@pytest.mark.parametrize(("page_size", "pages_per_item"), [(128, 1), (64, 2), (16, 16)])
def test_slots_with_one_spare_page_and_with_three(interpreter, monkeypatch, page_size, pages_per_item):
    monkeypatch.setattr(attention, "decode_sizes", lambda *_: DecodeSizes(page_size, pages_per_item, 2, 6, 2, True))
    lengths = (3, 130, 1, 128, 300, 7, 0, 520)
    case = Case("spare", lengths, (1,) * 8, (4, 2), 128, page_size, "bfloat16", "bfloat16", holes=((4, 1),))
    check(case, make_inputs(case))


@pytest.mark.parametrize(
    ("pages_per_item", "page_size", "heads", "head_dim", "dtype", "transposed_passes", "window"),
    [
        (9, 16, (8, 2), 64, "bfloat16", 0, 130),
        pytest.param(3, 64, (4, 1), 128, "bfloat16", 0, None, marks=pytest.mark.long),
        pytest.param(10, 16, (16, 4), 128, "int8", 1, None, marks=pytest.mark.long),
        pytest.param(3, 64, (16, 4), 128, "int8", 2, 300, marks=pytest.mark.long),
        pytest.param(36, 16, (4, 1), 256, "bfloat16", 0, None, marks=pytest.mark.long),
    ],
)
def test_items_of_any_number_of_pages(
    interpreter, monkeypatch, pages_per_item, page_size, heads, head_dim, dtype, transposed_passes, window
):
    sizes = DecodeSizes(page_size, pages_per_item, 2, 6, 2, True, transposed_passes)
    monkeypatch.setattr(attention, "decode_sizes", lambda *_: sizes)
    lengths = (3, sizes.tokens, 1, sizes.tokens + 1, 0, 2 * sizes.tokens + 20)
    case = Case(
        "uneven", lengths, (1,) * 6, heads, head_dim, page_size, dtype, "bfloat16", holes=((5, 1), (3, 0)),
        window=window, is_padded=True,
    )  # fmt: skip
    check(case, make_inputs(case))


@pytest.mark.long
def test_more_pages_in_an_item_than_bits_in_a_word(interpreter, monkeypatch):
    monkeypatch.setattr(attention, "decode_sizes", lambda *_: DecodeSizes(16, 64, 1, 3, 1, True))
    lengths = (700, 20, 1030)
    holes = ((0, 3), (0, 35), (0, 43), (2, 40))  # of the first row the last page, too
    case = Case("words", lengths, (1, 1, 1), (2, 1), 128, holes=holes, is_padded=True)
    check(case, make_inputs(case))


@pytest.mark.parametrize(
    ("heads", "sizes", "options"),
    [
        ((16, 2), PrefillSizes(16, 8, 16, 2, products_per_unit=2, head_blocks=2), dict(sinks=True)),
        pytest.param((8, 2), PrefillSizes(16, 8, 16, 2, products_per_unit=2), dict(window=100), marks=pytest.mark.long),
        pytest.param((8, 8), PrefillSizes(16, 8, 16, 1, 2), dict(soft_cap=5.0), marks=pytest.mark.long),
        pytest.param((11, 1), PrefillSizes(16, 8, 16, 2, 2), dict(sinks=True), marks=pytest.mark.long),
    ],
    ids=["heads in blocks", "two products of a head", "a product of each head", "an odd group"],
)
def test_heads_side_by_side(interpreter, small_blocks, monkeypatch, heads, sizes, options):
    """Units of several products, tasks of some of the heads, and a group with a head of zeros.

    Each prompt goes to the kernel whose tasks have its size.
    """
    shorter = dataclasses.replace(sizes, query_tokens=8)
    kernels = [(shorter, ALL_COUNTS[:8]), (sizes, ALL_COUNTS[8:])]
    monkeypatch.setattr(attention, "prefill_kernels", lambda *_: kernels)
    monkeypatch.setattr(units, "WORDS_AT_ONCE", 24)  # of three tokens of 16 heads, which divide no task
    case = Case("side by side", (150, 20), (20, 3), heads, 128, 16, "bfloat16", "bfloat16", holes=((0, 1),))
    case = dataclasses.replace(case, **options)
    check(case, make_inputs(case))


@pytest.mark.parametrize(
    ("length", "window", "resident_bytes"),
    [
        (600, None, 0),
        pytest.param(600, 200, 0, marks=pytest.mark.long),
        pytest.param(2100, None, 0, marks=pytest.mark.long),  # more page ids than a chunk holds
        pytest.param(2100, None, 1 << 20, marks=pytest.mark.long),
    ],
)
def test_page_ids_of_prefill_stream_or_are_resident(
    late_copies, small_blocks, monkeypatch, length, window, resident_bytes
):
    monkeypatch.setattr(memory, "RESIDENT_BYTES", resident_bytes)
    lengths, holes = (length, 40, 150, 0), ((0, 8), (2, 1))
    case = Case("ids", lengths, (20, 3, 33, 0), (2, 1), 128, window=window, holes=holes, is_padded=True)
    check(case, make_inputs(case))


# A large group, in which there is a small one; another small one; a pair, which is too few. Row 1 is empty.
FOREST = [[((0, 2, 3, 4, 5, 8, 10), 32), ((6, 9, 11, 12), 48), ((7, 13), 16)], [((2, 4, 5, 10), 144)]]
FOREST_LENGTHS = (40, 0, 170, 33, 150, 145, 60, 20, 50, 49, 148, 49, 64, 18)


@pytest.mark.parametrize(
    ("levels", "dtype", "several"),
    [
        (FOREST, "float32", 1),
        pytest.param(FOREST, "int8", 1, marks=pytest.mark.long),
        pytest.param(FOREST, "float32", 5, marks=pytest.mark.long),  # queries of row 8
        pytest.param(FOREST[:1], "float32", 1, marks=pytest.mark.long),
        pytest.param([[((0,), 32)], []], "float32", 1, marks=pytest.mark.long),  # nobody to share with
    ],
)
def test_groups_that_share_change_nothing(interpreter, small_blocks, monkeypatch, levels, dtype, several):
    monkeypatch.setattr(attention, "SMALL_GROUP", 4)
    monkeypatch.setattr(attention, "prefill_sizes", lambda *_: PrefillSizes(16, 8, 8, 2))
    query_lens = (1, 0, *[1] * 6, several, *[1] * 5)
    check_forest(
        Case("forest", FOREST_LENGTHS, query_lens, (2, 1), 128, dtype=dtype, sinks=True, is_padded=True), levels
    )


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.long) for seed in range(4)])
def test_whatever_rows_share_changes_nothing(interpreter, small_blocks, monkeypatch, seed):
    monkeypatch.setattr(attention, "SMALL_GROUP", 4)
    monkeypatch.setattr(attention, "prefill_sizes", lambda *_: PrefillSizes(16, 8, 8, 2))
    check_forest(*random_forest(seed, heads=(2, 1), head_dim=128, sinks=True))


@pytest.mark.long
@pytest.mark.parametrize("short_rest", [5, 60])  # of rows that have 8 tokens of their own on average
def test_what_rows_have_of_their_own_is_read_in_small_items_where_it_is_short(
    interpreter, small_blocks, monkeypatch, short_rest
):
    monkeypatch.setattr(attention, "SHORT_REST", short_rest)
    monkeypatch.setattr(attention, "SMALL_GROUP", 4)
    monkeypatch.setattr(attention, "prefill_sizes", lambda *_: PrefillSizes(16, 8, 8, 2))
    check_forest(Case("forest", FOREST_LENGTHS, (1, 0, *[1] * 12), (2, 1), 128, is_padded=True), FOREST)


@pytest.mark.long
def test_tasks_of_groups_hold_half_of_the_heads(interpreter, small_blocks, monkeypatch):
    monkeypatch.setattr(attention, "SMALL_GROUP", 4)
    sizes = PrefillSizes(16, 8, 16, 1, products_per_unit=2, head_blocks=2)
    monkeypatch.setattr(attention, "prefill_sizes", lambda *_: sizes)
    levels = [[(tuple(range(10)), 64)], [(tuple(range(5)), 128)]]
    lengths = (*(130 + 7 * row for row in range(10)), 20, 3)
    check_forest(Case("heads in blocks", lengths, (1,) * 12, (16, 16), 128, 16, "bfloat16", "bfloat16"), levels)


def check_forest(case, levels):
    inputs, sharing = share(make_inputs(case), levels)
    check_result(case, inputs, attend(case, inputs, return_lse=True, sharing=sharing))


def test_a_neighbour_of_nan_changes_nothing(late_copies, monkeypatch):
    """With a window, a soft cap, two heads of size 64 side by side, and stages that are two items apart."""
    monkeypatch.setattr(attention, "decode_sizes", lambda *_: DecodeSizes(16, 8, 1, 5, distance=2))
    lengths = (40, 200, 30, 0, 130)
    case = Case("neighbour", lengths, (1,) * 5, (8, 4), 64, 16, "bfloat16", "bfloat16", window=100, soft_cap=3.0)
    inputs = make_inputs(case)
    run = jax.jit(partial(paged_attention, **case.options, return_lse=True, implementation="pallas_tpu"))
    result = run(*inputs.arguments)
    check_result(case, inputs, result)
    data = np.array(inputs.pages.data)
    data[np.asarray(inputs.page_table)[1, : -(-200 // 16)]] = np.nan
    poisoned = dataclasses.replace(inputs, pages=dataclasses.replace(inputs.pages, data=jnp.asarray(data)))
    again = run(*poisoned.arguments).out
    others = [0, 2, 3, 4]
    np.testing.assert_array_equal(np.asarray(again)[others], np.asarray(result.out)[others])


@pytest.mark.parametrize(
    ("head_dim", "dtype", "page_size"),
    [
        pytest.param(128, "bfloat16", 16, marks=pytest.mark.long),  # short with heads side by side
        (64, "float32", 16),
        (128, "int8", 16),
        pytest.param(64, "float8_e4m3fn", 64, marks=pytest.mark.long),
    ],
)
def test_write(interpreter, small_blocks, head_dim, dtype, page_size):
    # New tokens that start and end inside a tile, fill one, are none, are inert; the last row's page is missing.
    lengths, query_lens = (40, 5, 33, 16, 2, 17), (20, 5, 1, 0, 3, 17)
    q_dtype = dtype if dtype in ("bfloat16", "float32") else "bfloat16"
    case = Case("write", lengths, query_lens, (2, 2), head_dim, page_size, dtype, q_dtype, padding=3, holes=((5, 0),))
    case = dataclasses.replace(case, is_padded=True)
    inputs = make_inputs(case)
    assert_same_pages(written(inputs, "pallas_tpu"), written(inputs, "reference"))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("int8", marks=pytest.mark.long)])
def test_write_of_more_tiles_than_the_ring_has(late_copies, dtype):
    case = Case("laps", (300, 16, 288), (290, 3, 270), (1, 1), 128, 16, dtype, "bfloat16", is_padded=True)
    inputs = make_inputs(case)
    assert_same_pages(written(inputs, "pallas_tpu"), written(inputs, "reference"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param([1, 2, 3], [4, 5, 6], id="apart", marks=pytest.mark.long),
        pytest.param([1, 2, 0, -1, 7, 3], [2, 1, 5, 6, 99, 8], id="swapped, unmapped"),
    ],
)
def test_copy_reads_before_it_writes(interpreter, source, target, dtype):
    rng = np.random.default_rng(0)
    shape = init_pages(10, 2, 16, 128, dtype)
    pages = jax.tree.map(lambda x: jnp.asarray(rng.integers(-9, 9, x.shape), x.dtype), shape)
    pairs = jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)
    got = jax.jit(partial(copy_pages, implementation="pallas_tpu"))(pages, *pairs)
    assert_same_pages(got, jax.jit(partial(copy_pages, implementation="reference"))(pages, *pairs))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(page_size=8), "does not take page size 8: copies move tiles of 16 rows"),
        (dict(dtype="int8", head_dim=64), "does not take page size 16: .* one tile of keys and values"),
        (dict(head_dim=80), "does not take head size 80: XLA would copy all pages"),
        (dict(dtype="int8"), "does not take int8 pages of 16 tokens: XLA would copy all their scales, 32 for"),
    ],
)
def test_refuses(change, sentence):
    case = Case("refusal", (3,), (1,), (2, 1), 128, dtype="bfloat16", q_dtype="bfloat16")
    case = dataclasses.replace(case, **change)
    with pytest.raises(NotImplementedError, match=sentence):
        attend(case, make_inputs(case))


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype", "page_size", "better"),
    [
        (8, 128, "bfloat16", 16, None),
        (1, 128, "bfloat16", 16, 64),
        (1, 128, "bfloat16", 64, None),
        (2, 64, "bfloat16", 8, 64),
        (1, 64, "float8_e4m3fn", 16, 128),
        (8, 64, "int8", 16, 32),
        (1, 256, "bfloat16", 16, 32),
        (16, 256, "bfloat16", 16, None),
    ],
)
def test_advice_names_a_page_size_that_the_kernels_take_and_keep_up_with(
    num_kv_heads, head_dim, dtype, page_size, better
):
    advice = page_advice(num_kv_heads, page_size, head_dim, dtype, "TPU7x")
    if better is None:
        assert advice is None
        return
    assert advice is not None and advice.endswith(f"Take page_size={better}.")
    assert page_advice(num_kv_heads, better, head_dim, dtype, "TPU7x") is None
    pages = init_pages(2, num_kv_heads, better, head_dim, dtype, is_padded=True)
    assert refusal("paged_attention", pages=stored(pages)) is None


def test_a_race_shows():
    """The interpreter does find a copy that nobody waits for before its target is read."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental import pallas as pl

    def kernel(x, out, scratch, sem):
        copy = pltpu.make_async_copy(x, scratch, sem)
        copy.start()
        out[...] = scratch[...]
        copy.wait()

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=params,
    )
    raised = False
    try:
        jax.block_until_ready(jax.jit(call)(jnp.ones((8, 128), jnp.float32)))
    except jax.errors.JaxRuntimeError as error:  # newer JAX raises at the race
        raised = "write of ('vmem'" in str(error)
    races = interpret_pallas_call.races
    assert raised or (races is not None and races.races_found)
