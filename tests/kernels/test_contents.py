"""Pages that leave and come back: bit for bit, whatever the layout, the padding and the dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageContents, Pages, export_pages, import_pages, init_pages, read_pages
from pallas_kernels.pages import PAGE_DTYPES

export, fill = jax.jit(export_pages), jax.jit(import_pages, donate_argnums=0)


def noise(pages: Pages) -> Pages:
    """Pages of random bytes, NaNs among them, but for bfloat16: XLA's code for these tests, which is not optimised, has
    other NaNs and no denormals there."""
    rng = np.random.default_rng(0)

    def bits(x):
        if x.dtype == jnp.bfloat16:
            return jnp.asarray(rng.standard_normal(x.shape) * 50, x.dtype)
        return jnp.asarray(
            rng.integers(0, 256, (*x.shape[:-1], x.shape[-1] * x.dtype.itemsize), np.uint8).view(x.dtype)
        )

    assert not pages.padding
    return jax.tree.map(bits, pages)


def as_bytes(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def assert_same(a: PageContents, b: PageContents):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(as_bytes(x), as_bytes(y))


@pytest.mark.parametrize(
    "dtype, head_dim, is_padded",
    [*((dtype, 80, True) for dtype in PAGE_DTYPES), ("int8", 64, True), ("bfloat16", 128, False)],
)
def test_pages_with_another_padding_take_them_bit_for_bit(dtype, head_dim, is_padded):
    plain = noise(init_pages(6, 2, 4, head_dim, dtype, is_padded=False))
    contents = export(plain, jnp.array([3, 5], jnp.int32))
    assert contents.keys.shape == contents.values.shape == (2, 4, 2, head_dim)
    other = init_pages(6, 2, 4, head_dim, dtype, is_padded=is_padded)
    there = export(fill(other, jnp.array([2, 4], jnp.int32), contents), jnp.array([2, 4], jnp.int32))
    assert_same(there, contents)
    before = as_bytes(plain.data)[[1, 2, 4]]
    back = fill(plain, jnp.array([0, 5], jnp.int32), there)  # a null page takes nothing
    assert_same(export(back, jnp.array([5], jnp.int32)), jax.tree.map(lambda x: x[1:], contents))
    np.testing.assert_array_equal(as_bytes(back.data)[[1, 2, 4]], before)


def test_contents_are_what_reading_gives():
    pages = init_pages(4, 2, 4, 64, "float32", is_padded=True)
    pages = jax.tree.map(lambda x: jnp.asarray(np.arange(x.size, dtype=x.dtype).reshape(x.shape)), pages)
    ids = jnp.array([3, 0, 9, 1], jnp.int32)
    contents = export(pages, ids)
    for got, wanted in zip((contents.keys, contents.values), jax.jit(read_pages)(pages, ids), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_the_pages_that_are_filled_are_those_that_came_in():
    pages = init_pages(64, 2, 16, 64, "int8")
    contents = export(pages, jnp.array([1, 2], jnp.int32))
    compiled = fill.lower(pages, jnp.array([1, 2], jnp.int32), contents).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes == pages.num_bytes and analysis.temp_size_in_bytes < pages.num_bytes / 4


def test_contents_of_other_pages_are_refused():
    pages, ids = init_pages(4, 2, 4, 64, "float32"), jnp.array([1, 2], jnp.int32)
    quantised = export(init_pages(4, 2, 4, 64, "int8"), ids)
    fix = "import what was exported from pages of the same sizes and dtype"
    message = rf"contents.keys is int8\[2, 4, 2, 64\], but 2 of these pages hold float32\[2, 4, 2, 64\]: {fix}"
    with pytest.raises(ValueError, match=message):
        import_pages(pages, ids, quantised)
    with pytest.raises(ValueError, match=r"contents.key_scales is float32\[2, 4, 2\], but .* hold None"):
        import_pages(pages, ids, export(pages, ids)._replace(key_scales=quantised.key_scales))
    with pytest.raises(ValueError, match=r"contents.keys is float32\[1, 4, 2, 64\], but 2"):
        import_pages(pages, ids, export(pages, ids[:1]))
