"""The sizes of a cache."""

import dataclasses
from typing import Any

import jax.numpy as jnp

QUANTISED = ("int8", "float8_e4m3fn")
DTYPES = ("float32", "bfloat16", *QUANTISED)


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The sizes of a paged KV cache; hashable, so it may be a static argument.

    Args:
        num_layers: L, attention layers that keep keys and values.
        num_kv_heads: K, KV heads of a layer.
        head_dim: H.
        num_pages: P, pages of each layer, the null page included; P - 1 can be used.
        max_sequences: B, slots of the page table.
        max_pages_per_sequence: M, columns of the page table.
        page_size: S, tokens in a page.
        dtype: "float32", "bfloat16", or one of the quantised "int8" and "float8_e4m3fn" (with one scale a token,
            head and key or value).

    Raises:
        ValueError: a size that is no positive whole number, fewer than two pages, or another dtype.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    max_sequences: int
    max_pages_per_sequence: int
    page_size: int = 16
    dtype: str = "bfloat16"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "dtype" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {size!r}")
        if self.num_pages < 2:
            raise ValueError(
                f"num_pages must be at least 2 (page 0 is the null page, which holds nothing), got {self.num_pages}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def max_length(self) -> int:
        """Tokens that the longest sequence can hold."""
        return self.max_pages_per_sequence * self.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers: its keys and values, and their scales where they are quantised."""
        scale_bytes = 4 if self.dtype in QUANTISED else 0
        row_bytes = self.head_dim * jnp.dtype(self.dtype).itemsize + scale_bytes
        return self.num_layers * self.num_kv_heads * 2 * self.page_size * row_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_pages * self.page_bytes

    @classmethod
    def for_budget(cls, *, pool_bytes: int, **sizes: Any) -> "CacheConfig":
        """The config with as many pages as fit in a budget.

        Args:
            pool_bytes: the most bytes the pool may take.
            **sizes: every field but `num_pages`.

        Raises:
            ValueError: the budget holds fewer than two pages, or a size is wrong.
        """
        page_bytes = cls(num_pages=2, **sizes).page_bytes
        if pool_bytes < 2 * page_bytes:
            raise ValueError(
                f"pool_bytes={pool_bytes} holds fewer than 2 pages of {page_bytes} bytes "
                f"(one is the null page): give at least {2 * page_bytes} bytes, or use smaller pages"
            )
        return cls(num_pages=pool_bytes // page_bytes, **sizes)
