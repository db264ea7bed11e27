"""The KV pages of one layer: their layout, and where a token's key and value lie in it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.platform import target_platform

NULL_PAGE = 0  # never owned by a sequence; like every id outside 1..P-1, it stands for "no page"
PAGE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
FP8 = jnp.dtype("float8_e4m3fn")
LARGEST = {"int8": 127, FP8.name: 448}  # a vector is scaled so that the largest of its stored numbers is this
MOST_ROWS = 2**31 - 2**20  # of a pool: ops count rows in int32, and send tokens that they drop past the last one
MOST_WRITTEN = 256  # tokens in one scatter
SUBLANES, LANES = 8, 128  # of a TPU register; key and value share the lanes where a head does not fill them
PADDED_TO = LANES // 2  # on a TPU, heads take a multiple of this many numbers


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Pages:
    """The KV pages of one layer; their layout is private to this package.

    Args:
        data: `[P, K, 2S, H]` where H is a multiple of 128 (for each KV head its S key rows, then its S value
            rows), else `[P, K, S, 2H]` (each row a key and its value side by side). float8 pages hold the bytes
            of their numbers as uint8, since XLA copies a float8 pool on a CPU.
        scales: float32 `[P, K, R]`, for each KV head the scales of its S keys, then of its S values; where pages are
            padded R is a multiple of 128, and the rest of a row has no meaning. For quantised pages (int8 and float8)
            only, else None.
        page_size: S, the tokens in a page.
        padding: zeros that follow the numbers of each key and each value. Implementations never see it: to them H
            includes it (`stored`).

    Examples:
        >>> pages = init_pages(num_pages=4, num_kv_heads=1, page_size=2, head_dim=8, dtype=jnp.float32, is_padded=False)
        >>> pages.num_pages, pages.page_size, pages.num_bytes
        (4, 2, 512)
    """

    data: Any
    scales: Any
    page_size: int
    padding: int = 0

    def tree_flatten_with_keys(self):
        keys = (jax.tree_util.GetAttrKey("data"), jax.tree_util.GetAttrKey("scales"))
        return tuple(zip(keys, (self.data, self.scales), strict=True)), (self.page_size, self.padding)

    @classmethod
    def tree_unflatten(cls, sizes, children):
        return cls(*children, *sizes)

    @property
    def num_pages(self) -> int:
        return self.data.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[1]

    @property
    def head_dim(self) -> int:
        stored = self.data.shape[3] if is_stacked(self) else self.data.shape[3] // 2
        return stored - self.padding

    @property
    def dtype(self):
        return FP8 if self.data.dtype == jnp.uint8 else self.data.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the pages take, scales included."""
        leaves = jax.tree.leaves(self)
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def is_stacked(pages: Pages) -> bool:
    """Whether values lie below their keys (`[P, K, 2S, H]`) rather than beside them (`[P, K, S, 2H]`)."""
    return pages.data.shape[2] == 2 * pages.page_size


def stored(pages: Pages) -> Pages:
    """The pages as implementations see them: what pads a head belongs to it."""
    return dataclasses.replace(pages, padding=0)


def page_bytes(num_kv_heads: int, page_size: int, head_dim: int, dtype: Any, is_padded: bool | None = None) -> int:
    """Bytes of one page of one layer, with its scales and padding. The arguments are those of `init_pages`.

    Examples:
        A key and a value of 128 numbers of two bytes, for 16 tokens and 8 heads:

        >>> page_bytes(num_kv_heads=8, page_size=16, head_dim=128, dtype=jnp.bfloat16)
        65536
    """
    page = jax.eval_shape(lambda: init_pages(1, num_kv_heads, page_size, head_dim, dtype, is_padded))
    return page.num_bytes


def init_pages(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: Any = jnp.bfloat16,
    is_padded: bool | None = None,
) -> Pages:
    """Empty pages.

    Args:
        num_pages: P, the null page included.
        num_kv_heads: K.
        page_size: S, tokens in a page.
        head_dim: H.
        dtype: float32, bfloat16, or one of the quantised int8 and float8_e4m3fn, which have a scale for each key and
            each value of a token and head.
        is_padded: whether zeros fill each key and value up to a multiple of 64 numbers, and the scales of a head in a
            page up to a multiple of 128. The TPU kernels need that. None: yes on a TPU, no elsewhere.

    Returns:
        Pages of zeros.

    Raises:
        ValueError: a size below 1, more rows than int32 counts, or another dtype.

    Examples:
        >>> init_pages(4, 2, 16, 64, "int8", is_padded=False).scales.shape  # [P, K, 2S]
        (4, 2, 32)
    """
    sizes = dict(num_pages=num_pages, num_kv_heads=num_kv_heads, page_size=page_size, head_dim=head_dim)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    dtype = jnp.dtype(dtype)
    if dtype.name not in PAGE_DTYPES:
        raise ValueError(f"pages hold {', '.join(PAGE_DTYPES)}, got {dtype.name}: choose one of these")
    if is_padded is None:
        is_padded = target_platform() == "tpu"
    width, scale_width = head_dim, 2 * page_size
    if is_padded:
        width, scale_width = (x + -x % unit for x, unit in ((width, PADDED_TO), (scale_width, LANES)))
    num_rows = num_pages * num_kv_heads * scale_width
    if num_rows > MOST_ROWS:
        raise ValueError(
            f"{num_pages} pages of {num_kv_heads} heads have {num_rows} rows of keys and values, and ops count up to "
            f"{MOST_ROWS}: take fewer pages, or several pools"
        )
    if width % LANES == 0:
        shape = (num_pages, num_kv_heads, 2 * page_size, width)
    else:
        shape = (num_pages, num_kv_heads, page_size, 2 * width)
    scales = None
    if dtype.name in LARGEST:
        scales = jnp.zeros((num_pages, num_kv_heads, scale_width), jnp.float32)
    data = jnp.zeros(shape, jnp.uint8 if dtype == FP8 else dtype)
    return Pages(data, scales, page_size, padding=width - head_dim)


def gather_pages(pages: Pages, page_ids: Int32[Array, "*n"]) -> tuple[Array, Array | None]:
    """Whole pages, `[*n, K, 2S, H]` or `[*n, K, S, 2H]`, and their scales `[*n, K, R]`; ids within `0 .. P-1`."""
    data = pages.data.at[page_ids].get(mode="promise_in_bounds")
    if pages.scales is None:
        return data, None
    if pages.num_kv_heads % SUBLANES == 0 or fill_lanes(pages.scales):
        return data, pages.scales.at[page_ids].get(mode="promise_in_bounds")
    scales = scale_rows(pages.scales).at[page_ids].get(mode="promise_in_bounds")
    return data, scales.reshape(*page_ids.shape, *pages.scales.shape[1:])


def put_pages(pages: Pages, target: Int32[Array, " n"], data: Array, scales: Array | None) -> Pages:
    """Puts whole pages, as `gather_pages` returns them, in the place of others; a target of P or more is dropped."""
    data = pages.data.at[target].set(data, mode="drop")
    if pages.scales is not None and scales is not None:
        if fill_lanes(scales):
            scales = pages.scales.at[target].set(scales, mode="drop")
        else:
            rows = scale_rows(pages.scales).at[target].set(scale_rows(scales), mode="drop")
            scales = rows.reshape(pages.scales.shape)
    return dataclasses.replace(pages, data=data, scales=scales)


def fill_lanes(scales: Float[Array, "P K R"]) -> bool:
    """Whether the scales of a page and head are whole registers of a TPU."""
    return scales.shape[2] % LANES == 0


def scale_rows(scales: Float[Array, "P K R"]) -> Float[Array, "rows width"]:
    """The scales with one row a page and head where these fill registers, else with one row a page, `[P, K * R]`.

    It is the view that XLA scatters to in place on CPU and TPU alike. A TPU copies all scales into another layout first
    for a scatter through the flat view, and, where they do not fill registers, for a gather of rows where KV heads fill
    the sublanes of a register and of `[K, R]` slices where they do not.
    """
    _, num_heads, width = scales.shape
    return scales.reshape(-1, width if fill_lanes(scales) else num_heads * width)


def split_kv(pages: Pages, data: Array) -> tuple[Array, Array]:
    """Parts whole pages `[..., K, 2S, H]` or `[..., K, S, 2H]` into keys and values `[..., K, S, H]`."""
    axis = -2 if is_stacked(pages) else -1
    key, value = jnp.split(data, 2, axis=axis)
    return key, value


def split_scales(pages: Pages, scales: Float[Array, "*n R"]) -> tuple[Float[Array, "*n S"], Float[Array, "*n S"]]:
    """Parts the scales of a page's head into those of its keys and those of its values."""
    return scales[..., : pages.page_size], scales[..., pages.page_size : 2 * pages.page_size]


def numbers(data: Array) -> Array:
    """What stored data means: the bytes of float8 pages as float8, anything else as it is."""
    return jax.lax.bitcast_convert_type(data, FP8) if data.dtype == jnp.uint8 else data


def is_mapped(page_ids: Int32[Array, "*n"], pages: Pages) -> Bool[Array, "*n"]:
    """Whether ids name a page that a sequence can own."""
    return (page_ids > NULL_PAGE) & (page_ids < pages.num_pages)


class Quantised(NamedTuple):
    data: Array  # as pages store it: int8, or the bytes of float8, [..., H]
    scale: Array  # float32 [...]


def quantise(x: Float[Array, "*n H"], dtype: Any) -> Quantised:
    """`x ~ numbers(data) * scale`, symmetric, with `scale = amax / LARGEST` over the last axis.

    int8 is wrong by `scale / 2` at most, float8_e4m3fn by a sixteenth of each number (and `scale / 1024` near zero).
    """
    dtype = jnp.dtype(dtype)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST[dtype.name]
    x = x / jnp.where(scale > 0, scale, 1)[..., None]
    if dtype == FP8:
        return Quantised(jax.lax.bitcast_convert_type(x.astype(FP8), jnp.uint8), scale)
    return Quantised(jnp.round(x).astype(dtype), scale)


def quotient(x: Array, size: int | Array) -> Array:
    """`x // size` of numbers that are not negative, in one operation of x's dtype where `//` takes ten."""
    return jax.lax.div(x, jnp.asarray(size, x.dtype))


def remainder(x: Array, size: int | Array) -> Array:
    """`x % size` of numbers that are not negative; see `quotient`."""
    return jax.lax.rem(x, jnp.asarray(size, x.dtype))


class TokenPlaces(NamedTuple):
    """Where the packed new tokens of a step belong."""

    sequence: Int32[Array, " T"]  # row of the page table
    position: Int32[Array, " T"]  # within the sequence; negative: the token is inert


def token_places(lengths: Int32[Array, " B"], query_starts: Int32[Array, " B+1"], num_tokens: int) -> TokenPlaces:
    """The sequence and position of each of `num_tokens` packed tokens; padding gets position -1."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    ends = query_starts[1:]
    sequence = jnp.sum(ends[None, :] <= token[:, None], axis=1, dtype=jnp.int32)
    is_padding = sequence >= lengths.size
    sequence = jnp.where(is_padding, 0, sequence)
    position = lengths[sequence] - ends[sequence] + token
    return TokenPlaces(sequence, jnp.where(is_padding, -1, position))


def token_slots(
    pages: Pages, page_table: Int32[Array, "B M"], places: TokenPlaces
) -> tuple[Int32[Array, " T"], Int32[Array, " T"]]:
    """The page and the slot in it of each token; the page is the null page where there is none."""
    position = jnp.maximum(places.position, 0)
    column, slot = quotient(position, pages.page_size), remainder(position, pages.page_size)
    max_pages = page_table.shape[1]
    page = page_table[places.sequence, jnp.minimum(column, max_pages - 1)]
    exists = (places.position >= 0) & (column < max_pages) & is_mapped(page, pages)
    return jnp.where(exists, page, NULL_PAGE), slot


def put_tokens(
    pages: Pages, k: Float[Array, "T K H"], v: Float[Array, "T K H"], page: Int32[Array, " T"], slot: Array
) -> Pages:
    """Writes each token's key and value to its page and slot; tokens of the null page are dropped.

    XLA copies what it scatters; so if there are many tokens, they go in pieces.
    """
    num_tokens = page.size
    if num_tokens <= MOST_WRITTEN:
        return put_piece(pages, k, v, page, slot)

    def put(i, pages):
        # The last piece starts early where the pieces do not fit evenly, and writes some tokens again.
        first = jnp.minimum(i * MOST_WRITTEN, num_tokens - MOST_WRITTEN)
        piece = (jax.lax.dynamic_slice_in_dim(x, first, MOST_WRITTEN) for x in (k, v, page, slot))
        return put_piece(pages, *piece)

    return jax.lax.fori_loop(0, -(-num_tokens // MOST_WRITTEN), put, pages)


def put_piece(
    pages: Pages, k: Float[Array, "T K H"], v: Float[Array, "T K H"], page: Int32[Array, " T"], slot: Array
) -> Pages:
    """`put_tokens` in one scatter.

    The scatter goes through the flat view of rows, which XLA updates in place on CPU and TPU alike, where
    `data.at[page, :, slot]` copies the pool on TPU. Dropped tokens aim past the last row, each at its own, so that no
    two tokens aim at one row.
    """
    num_pages, num_heads, page_size = pages.num_pages, pages.num_kv_heads, pages.page_size
    token = jnp.arange(page.size, dtype=jnp.int32)[:, None]
    head = jnp.arange(num_heads, dtype=jnp.int32)[None, :]
    is_dropped = (page == NULL_PAGE)[:, None]

    def put(array: Array, x: Array, slots: int, first: int) -> Array:
        """Puts x `[T, K, ...]` at row `first + slot` of the strip of `slots` rows that a head has in a page."""
        flat = array.reshape(num_pages * num_heads * slots, -1)
        row = (page[:, None] * num_heads + head) * slots + first + slot[:, None]
        row = jnp.where(is_dropped, flat.shape[0] + token * num_heads + head, row)
        flat = flat.at[row].set(x.astype(array.dtype), mode="drop", unique_indices=True)
        return row_major(flat.reshape(array.shape))

    def put_scale(scales: Array, x: Array, first: int) -> Array:
        rows = scale_rows(scales)
        place = (page[:, None] * num_heads + head) * scales.shape[2] + first + slot[:, None]
        row, column = jnp.divmod(place, rows.shape[1])
        row = jnp.where(is_dropped, rows.shape[0] + token * num_heads + head, row)
        return rows.at[row, column].set(x, mode="drop", unique_indices=True).reshape(scales.shape)

    scales = pages.scales
    if scales is not None:
        (k, k_scale), (v, v_scale) = (quantise(x, pages.dtype) for x in (k, v))
        scales = put_scale(scales, k_scale, 0)
        scales = put_scale(scales, v_scale, page_size)
    if is_stacked(pages):
        data = put(pages.data, k, 2 * page_size, 0)
        data = put(data, v, 2 * page_size, page_size)
    else:
        data = put(pages.data, jnp.concatenate([k, v], axis=-1), page_size, 0)
    return dataclasses.replace(pages, data=data, scales=scales)


def row_major(data: Array) -> Array:
    """Keeps the layout in which pages come in.

    The axis of a single KV head may stand anywhere in the same memory. jaxlib 0.11 moves it in a loop over layers on a
    CPU, and then copies the whole pool twice a step.
    """
    if data.shape[1] > 1 or jax.__version_info__ >= (0, 12) or target_platform() != "cpu":
        return data
    return with_layout_constraint(data, Layout(tuple(range(data.ndim))))
