"""The pages: what is written where, and that everything else stays as it was, byte for byte."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.cases import CASES, IMPLEMENTATIONS, Case, Store, make_inputs

from pallas_kernels import Pages, copy_pages, init_pages, read_pages, write_pages
from pallas_kernels.pages import LARGEST, PAGE_DTYPES

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
write = jax.jit(write_pages, static_argnames="implementation")
copy = jax.jit(copy_pages, static_argnames="implementation")
read = jax.jit(read_pages)

NAMES = ("mixed", "tokens", "pages", "decode: int8", "decode: fp8")
# Their layouts, dtypes and places are those of others.
LONG = (
    "decode: int8",
    "decode: int8, head size 128",
    "mixed, padding, no bound",
    "mixed: int8, head size 128",
    "mixed: heads 5, 1; head size 80",
    "mixed: heads 12, 2; head size 256",
    "mixed: window in a page",
)
WRITTEN = [
    pytest.param(case, id=case.name, marks=pytest.mark.long if case.name in LONG else ())
    for case in CASES
    if case.write and case.name.startswith(NAMES)
]


def assert_same_bytes(pages: Pages, other: Pages):
    for a, b in zip(jax.tree.leaves(pages), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def random_pages(num_pages=9, num_kv_heads=2, page_size=4, head_dim=64, dtype="float32"):
    rng = np.random.default_rng(0)
    empty = init_pages(num_pages, num_kv_heads, page_size, head_dim, dtype)
    return jax.tree.map(lambda x: jnp.asarray((rng.standard_normal(x.shape) * 50).astype(x.dtype)), empty)


def test_what_pads_a_head_is_not_read_back():
    pages = init_pages(3, 2, 4, 80, "float32", is_padded=True)
    assert pages.head_dim == 80 and pages.data.shape == (3, 2, 8, 128)
    k, v = (jax.random.normal(jax.random.key(i), (3, 2, 80)) for i in range(2))
    table, lengths, starts = jnp.array([[2]]), jnp.array([3]), jnp.array([0, 3])
    pages = copy(write(pages, k, v, table, lengths, starts), jnp.array([2]), jnp.array([1]))
    keys, values = read(pages, jnp.array([1]))
    np.testing.assert_array_equal(keys[0, :3], k)
    np.testing.assert_array_equal(values[0, :3], v)


@each_implementation
@pytest.mark.parametrize("case", WRITTEN)
def test_a_write_fills_exactly_the_new_tokens_slots(case, implementation):
    inputs = make_inputs(case)
    arguments = inputs.pages, inputs.k, inputs.v, inputs.page_table, inputs.lengths, inputs.query_starts
    written = write(*arguments, implementation=implementation)

    store = Store(inputs.pages)
    store.data = np.array(inputs.pages.data).view(inputs.pages.dtype)
    store.scales = None if inputs.pages.scales is None else np.array(inputs.pages.scales)
    table, k, v = (np.asarray(x) for x in (inputs.page_table, inputs.k, inputs.v))
    for row, (length, num_queries) in enumerate(zip(case.lengths, case.query_lens, strict=True)):
        for position in range(max(length - num_queries, 0), length):
            token = int(inputs.query_starts[row]) + position - (length - num_queries)
            page = table[row, position // case.page_size]
            if 0 < page < inputs.pages.num_pages:
                store.put(page, position % case.page_size, k[token], v[token])
    if inputs.pages.scales is None:
        assert_same_bytes(written, store.pages())
        return
    # A value halfway between two steps may round either way, as a scale may in its last bit. Neighbouring float8
    # numbers are neighbouring bytes.
    leaves = (jax.tree.leaves(x) for x in (written, store.pages(), inputs.pages))
    for got, wanted, before in zip(*(map(np.asarray, x) for x in leaves), strict=True):
        touched = wanted != before
        np.testing.assert_array_equal(got[~touched], before[~touched])
        if got.dtype.itemsize == 1:
            got, wanted = got.astype(np.int32), wanted.astype(np.int32)
            assert np.mean(got != wanted) < 1e-3
        np.testing.assert_allclose(got, wanted, atol=1 if got.dtype == np.int32 else 0, rtol=1e-6)


@each_implementation
def test_a_write_of_more_tokens_than_go_at_once(implementation):
    case = Case("long write", (5, 600, 9), (1, 600, 1), (1, 1), 64, 8, padding=2)
    inputs = make_inputs(case)
    arguments = inputs.pages, inputs.k, inputs.v, inputs.page_table, inputs.lengths, inputs.query_starts
    written = write(*arguments, implementation=implementation)
    keys, values = read(written, inputs.page_table[1, :75])
    np.testing.assert_array_equal(keys.reshape(600, 1, 64), inputs.keys[1].astype(np.float32))
    np.testing.assert_array_equal(values.reshape(600, 1, 64), inputs.values[1].astype(np.float32))


@pytest.mark.parametrize("dtype", PAGE_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_reading_gives_back_what_was_written(dtype, head_dim):
    case = Case("read", (13,), (13,), (2, 2), head_dim, 4, dtype)
    inputs = make_inputs(case)
    arguments = inputs.pages, inputs.k, inputs.v, inputs.page_table, inputs.lengths, inputs.query_starts
    keys, values = read(write(*arguments), inputs.page_table[0, :4])
    assert keys.dtype == (jnp.float32 if dtype in LARGEST else dtype)
    for got, wanted, exact in ((keys, inputs.keys[0], inputs.k), (values, inputs.values[0], inputs.v)):
        got = np.asarray(got, np.float64).reshape(16, 2, head_dim)[:13]
        np.testing.assert_allclose(got, wanted, atol=1e-6)
        if dtype == "int8":  # half a step of amax / 127
            exact = np.asarray(exact, np.float64)[:13]
            step = np.abs(exact).max(-1, keepdims=True) / 127
            assert (np.abs(got - exact) <= step / 2 * 1.001).all()
        if dtype == "float8_e4m3fn":  # three bits of mantissa; below 2 ** -6 of a scale, steps of 2 ** -9
            exact = np.asarray(exact, np.float64)[:13]
            scale = np.abs(exact).max(-1, keepdims=True) / 448
            assert (np.abs(got - exact) <= np.maximum(np.abs(exact) / 16, scale / 1024) * 1.001).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_zeros_survive_quantisation(dtype):
    pages = init_pages(2, 1, 4, 64, dtype)
    where = jnp.ones((1, 1), jnp.int32), jnp.array([4], jnp.int32), jnp.array([0, 4], jnp.int32)
    zeros = jnp.zeros((4, 1, 64))
    keys, _ = read(write(pages, zeros, zeros, *where), jnp.array([1], jnp.int32))
    np.testing.assert_array_equal(keys, 0)


def test_reading_an_unmapped_page_gives_zeros():
    pages = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), random_pages())
    keys, values = read(pages, jnp.array([0, -1, 9, 2**31 - 1, -(2**31)], jnp.int32))
    np.testing.assert_array_equal(keys, 0)
    np.testing.assert_array_equal(values, 0)


@each_implementation
@pytest.mark.parametrize("dtype, head_dim", [("float32", 64), ("bfloat16", 128), ("int8", 64), ("float8_e4m3fn", 64)])
def test_copying_reads_every_page_before_it_writes_any(dtype, head_dim, implementation):
    pages = random_pages(dtype=dtype, head_dim=head_dim)
    # A chain, a swap, a page to itself, and pairs that do nothing.
    source = [1, 2, 3, 5, 6, 7, 0, 8, 8, 9, -1, 4, 8]
    target = [2, 3, 4, 6, 5, 7, 8, 0, 9, 8, 8, 2**31 - 1, -(2**31)]
    copied = copy(pages, jnp.array(source, jnp.int32), jnp.array(target, jnp.int32), implementation=implementation)

    def expected(x):
        x, before = np.array(x), np.array(x)
        for s, t in zip(source, target, strict=True):
            if 0 < s < 9 and 0 < t < 9:
                x[t] = before[s]
        return jnp.asarray(x)

    assert_same_bytes(copied, jax.tree.map(expected, pages))


def test_sizes():
    cases = (64, "bfloat16", 2), (128, "float32", 4), (80, "int8", 1), (64, "float8_e4m3fn", 1)
    for head_dim, dtype, num_bytes in cases:
        pages = init_pages(5, 3, 16, head_dim, dtype)
        assert (pages.num_pages, pages.num_kv_heads, pages.page_size, pages.head_dim) == (5, 3, 16, head_dim)
        assert pages.dtype == dtype
        scales = 5 * 3 * 16 * 2 * 4 if dtype in LARGEST else 0
        assert pages.num_bytes == 5 * 3 * 16 * 2 * head_dim * num_bytes + scales


def test_pages_of_shapes_are_pages_too():
    shapes = jax.eval_shape(functools.partial(init_pages, 5, 3, 16, 64))
    assert shapes.num_bytes == init_pages(5, 3, 16, 64).num_bytes
    assert jax.tree.structure(shapes) == jax.tree.structure(init_pages(5, 3, 16, 64))


@pytest.mark.parametrize("name", ["num_pages", "num_kv_heads", "page_size", "head_dim"])
def test_sizes_below_one_are_refused(name):
    sizes: dict[str, Any] = dict(num_pages=2, num_kv_heads=1, page_size=4, head_dim=64) | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        init_pages(**sizes)


@pytest.mark.parametrize("dtype", ["float16", "float8_e5m2", "int4"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"pages hold float32, .*, float8_e4m3fn, got {dtype}: choose one of these"):
        init_pages(2, 1, 4, 64, dtype)


def test_more_rows_than_int32_counts_are_refused():
    def lay_out(num_pages):
        return jax.eval_shape(lambda: init_pages(num_pages, 8, 16, 128))

    assert lay_out(8_384_512).num_pages == 8_384_512
    with pytest.raises(
        ValueError, match=r"8384513 pages of 8 heads have 2146435328 rows .* up to 2146435072: take few"
    ):
        lay_out(8_384_513)
