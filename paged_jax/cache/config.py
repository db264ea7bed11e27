"""The sizes of a cache."""

import bisect
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from paged_jax.cache.sizes import free_bytes, read_bytes
from pallas_kernels import page_bytes

QUANTISED = ("int8", "float8_e4m3fn")
DTYPES = ("float32", "bfloat16", *QUANTISED)
STEP_TOKENS = 512  # of a prefill step, for which `window_pages` leaves room unless it is given


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that share a page table, because they all have the same window, or none.

    Args:
        layers: their numbers.
        window: how many positions a token of these layers sees, its own included; pages before them are given up.
            None: all positions.
        num_pages: P, pages of each of these layers.
    """

    layers: tuple[int, ...]
    window: int | None
    num_pages: int


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The sizes of a paged KV cache; hashable, so it may be a static argument.

    Args:
        num_layers: L, the number of attention layers that keep keys and values.
        num_kv_heads: K, KV heads of a layer.
        head_dim: H, numbers in a head.
        num_pages: P, pages of each layer that has no window. One of them is the null page, so P - 1 hold tokens.
        max_sequences: B, rows of the page table: the most sequences at the same time.
        max_pages_per_sequence: M, columns of the page table: the longest sequence has M * S tokens.
        page_size: S, tokens in a page. On a TPU v7x few or narrow KV heads need more than 16: a warning says how many
            when the pool is made.
        dtype: of keys and values: "float32", "bfloat16", or one of the quantised "int8" and "float8_e4m3fn", which keep
            one scale for each key and each value of a token and head. A dtype such as `jnp.bfloat16` will do, too.
        windows: for each layer how many positions a token sees, its own included, or None for all of them. Layers with
            a window give up the pages before it. Empty: no layer has a window.
        window_pages: P of each layer with a window; None: enough for B sequences and a prefill step of 512 tokens.
        array_per_layer: True keeps the pages of each layer in an array of their own, for frameworks whose layers own
            their state (Flax linen). Otherwise all layers with the same window share one array.

    Raises:
        ValueError: a size that is no positive whole number, fewer than two pages, another dtype, or windows of another
            number of layers.

    Examples:
        >>> config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=9, max_sequences=2,
        ...                      max_pages_per_sequence=4)
        >>> config.max_length, config.page_bytes, config.pool_bytes
        (64, 512, 4608)
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    max_sequences: int
    max_pages_per_sequence: int
    page_size: int = 16
    dtype: Any = "bfloat16"
    windows: tuple[int | None, ...] = ()
    window_pages: int | None = None
    array_per_layer: bool = False

    def __post_init__(self):
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del sizes["dtype"], sizes["windows"], sizes["array_per_layer"]
        sizes |= {f"windows[{i}]": window for i, window in enumerate(self.windows) if window is not None}
        if self.window_pages is None:
            del sizes["window_pages"]
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        for name in ("num_pages", "window_pages"):
            if sizes.get(name) == 1:
                raise ValueError(f"{name} must be at least 2 (page 0 is the null page, which holds nothing), got 1")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries for num_layers={self.num_layers}: give one for each layer "
                "(None for a layer without a window), or leave it empty"
            )
        if not isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def max_length(self) -> int:
        """Tokens that the longest sequence can hold."""
        return self.max_pages_per_sequence * self.page_size

    @functools.cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers in groups of the same window: first those without one, then the widest window, and so on.

        A window that is as long as the longest sequence counts as none.
        """
        windows = [None if w is None or w >= self.max_length else w for w in self.windows or [None] * self.num_layers]
        ordered = sorted(set(windows), key=lambda w: float("inf") if w is None else w, reverse=True)
        layers = {w: tuple(i for i, own in enumerate(windows) if own == w) for w in ordered}
        return tuple(LayerGroup(layers[w], w, self._num_pages(w)) for w in ordered)

    @functools.cached_property
    def has_windows(self) -> bool:
        """Whether some layers have a window, and give up the pages before it."""
        return any(group.window is not None for group in self.groups)

    def pages_mapped(self, window: int | None, num_tokens: int, new_tokens: int = 1) -> int:
        """The most pages that a sequence maps at once in layers of this window while it grows to a length.

        Args:
            window: of the layers; None: they see everything.
            num_tokens: the length.
            new_tokens: the most that it grows by in a step.
        """
        return pages_mapped(window, num_tokens, new_tokens, self.page_size)

    def _num_pages(self, window: int | None) -> int:
        if window is None:
            return self.num_pages
        if self.window_pages is not None:
            return self.window_pages
        each = self.pages_mapped(window, self.max_length) + 1  # one more, for a chunk that starts in mid-page
        return min(self.num_pages, self.max_sequences * each + -(-STEP_TOKENS // self.page_size) + 1)

    @property
    def layer_page_bytes(self) -> int:
        """Bytes of one page in one layer: padded keys and values, and their scales where they are quantised."""
        return self.layer_page_bytes_on(None)

    def layer_page_bytes_on(self, platform: str | None, num_devices: int = 1) -> int:
        """`layer_page_bytes` on another platform, or on each of several devices that split the KV heads.

        Args:
            platform: "tpu", where heads and scales are padded, "gpu" or "cpu"; None: the one that runs.
            num_devices: over which the KV heads are split.
        """
        is_padded = None if platform is None else platform == "tpu"
        return page_bytes(self.num_kv_heads // num_devices, self.page_size, self.head_dim, self.dtype, is_padded)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.num_layers * self.layer_page_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_layer_pages * self.layer_page_bytes

    @property
    def num_layer_pages(self) -> int:
        """Pages of all layers together, null pages included."""
        return sum(len(group.layers) * group.num_pages for group in self.groups)

    @classmethod
    def for_memory(cls, *, share: float = 0.9, device: Any = None, **sizes: Any) -> "CacheConfig":
        """The config with as many pages as fit in what a device has left, by its own report.

            model = models.load(folder)  # the weights first
            config = CacheConfig.for_memory(**model.cache_sizes, max_sequences=64, max_pages_per_sequence=128)

        Args:
            share: of the free memory that the pool takes; the rest is for what the programs need beside it.
            device: whose memory; None: the default device. On a CPU, the memory that the system can still give.
            **sizes: every field but `num_pages`.

        Raises:
            ValueError: the share is not between 0 and 1, the device reports nothing, or fewer than two pages fit.
        """
        if not 0 < share < 1:
            raise ValueError(f"share={share} of the free memory: it must lie between 0 and 1, for instance 0.9")
        return cls.for_budget(pool_bytes=int(free_bytes(device) * share), **sizes)

    @classmethod
    def for_budget(cls, *, pool_bytes: int | float | str, **sizes: Any) -> "CacheConfig":
        """The config with as many pages as fit in a budget.

        Args:
            pool_bytes: the most bytes the pool may take: 4e9, or "4GiB".
            **sizes: every field but `num_pages`.

        Raises:
            ValueError: the budget holds fewer than two pages, or a size is wrong.
        """
        pool_bytes, smallest = read_bytes(pool_bytes), cls(num_pages=2, **sizes)
        if pool_bytes < smallest.pool_bytes:
            raise ValueError(
                f"pool_bytes={pool_bytes} holds fewer than 2 pages of {smallest.page_bytes} bytes "
                f"(one is the null page): give at least {smallest.pool_bytes} bytes, or use smaller pages"
            )
        num_pages, most = range(2, pool_bytes), pool_bytes // smallest.layer_page_bytes
        fitting = bisect.bisect_right(num_pages, most, key=lambda p: cls(num_pages=p, **sizes).num_layer_pages)
        return cls(num_pages=num_pages[fitting - 1], **sizes)


def pages_mapped(window: int | None, num_tokens: int, new_tokens: int, page_size: int) -> int:
    """The most pages that a sequence maps at once; see `CacheConfig.pages_mapped`."""
    pages = -(-num_tokens // page_size)
    if window is None:
        return pages
    # a step reads window - 1 tokens and writes the new ones; that many in a row touch at most
    return min(pages, -(-(window + new_tokens - 2) // page_size) + 1)
