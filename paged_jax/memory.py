"""Where the memory went: page tables counted on the host."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from paged_jax.cache.config import CacheConfig, LayerGroup
from paged_jax.cache.page_table import PageTable
from paged_jax.cache.page_tables import PageTables

__all__ = ["CACHED", "CacheReport", "FREE", "MemoryReport", "OWNED", "find_tables", "page_states"]

FREE, CACHED, OWNED = -1, 0, 1  # page states; above OWNED: the number of rows that share the page


def find_tables(source: Any) -> PageTables:
    """The page tables of whatever holds them.

    Args:
        source: an `Engine`, a `KVCache`, a `PageTables`, or a single `PageTable`.

    Raises:
        ValueError: it has no page tables.

    Examples:
        >>> cache = KVCache.create(config)
        >>> find_tables(cache) is cache.tables
        True
    """
    if isinstance(source, PageTables):
        return source
    if isinstance(source, PageTable):
        return PageTables((source,), (LayerGroup((0,), None, source.num_pages),))
    tables = getattr(source, "tables", None)
    if not isinstance(tables, PageTables):
        raise ValueError(
            f"got an object of type {type(source).__name__}, which has no page tables: pass an Engine, a KVCache, its "
            "tables, or one of these"
        )
    return tables


def find_table(source: Any, group: int) -> PageTable:
    """The page table of a group of layers, whose values can be read on the host.

    Args:
        source: see `find_tables`.
        group: of layers.

    Raises:
        ValueError: there are no page tables, no such group, or no values, as inside a jitted function.
    """
    tables = find_tables(source)
    if not isinstance(group, int) or not 0 <= group < len(tables.groups):
        raise ValueError(
            f"there is no group {group!r} of layers: these tables have the groups 0 to {len(tables.groups) - 1}"
        )
    reason = why_unreadable(tables.groups[group])
    if reason is not None:
        raise ValueError(
            f"these page tables have no values ({reason}): pass what the last call returned, outside of jit"
        )
    return tables.groups[group]


def why_unreadable(arrays: Any) -> str | None:
    """Why arrays of a pytree have no values that can be shown; None: they have."""
    for leaf in jax.tree.leaves(arrays):
        if isinstance(leaf, Tracer):
            return "inside a traced function, where the values are not known yet"
        if not isinstance(leaf, jax.Array | np.ndarray):
            return f"with {type(leaf).__name__} in the place of arrays"
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            return "consumed: a jitted call to which it was donated has taken its memory"
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return "on devices of several hosts"
    return None


def page_states(source: Any, group: int = 0) -> np.ndarray:
    """What each page of a group of layers is used for; waits for the device.

    Args:
        source: see `find_tables`.
        group: of layers.

    Returns:
        int [P - 1], without the null page: FREE, CACHED (only handles hold it), or how many rows map the page.

    Raises:
        ValueError: there are no page tables or no such group, or they have no values, as inside jit.

    Examples:
        Two rows share page 1, one has page 2 for itself, and page 3 is held by a handle only.

        >>> tables, _ = PageTables.create(config).reserve(jnp.array([16, 0]))
        >>> tables, _ = tables.fork(jnp.array([0]), jnp.array([1]))
        >>> tables, _ = tables.reserve(jnp.array([16, 16]))
        >>> tables, handles = tables.publish(1, 32)
        >>> tables = tables.truncate(jnp.array([32, 16]))
        >>> page_states(tables).tolist()
        [2, 1, 0, -1, -1, -1, -1, -1]
    """
    table = find_table(source, group)
    refcounts, rows = np.asarray(table.refcounts), np.asarray(table.pages)
    owners = np.bincount(rows[rows > 0], minlength=len(refcounts))
    return np.where(refcounts == 0, FREE, owners)[1:]


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Counts of one moment; pages are physical unless they are called mapped.

    Examples:
        >>> cache, granted = KVCache.create(config).reserve(jnp.array([20, 3]))
        >>> report = MemoryReport.measure(cache)
        >>> report.tokens, report.pages_in_use, f"{report.waste:.0%} of the slots are empty"
        (23, 3, '52% of the slots are empty')

    `num_pages` leaves out the null page. `pages_mapped` counts a page once for every row that maps it, `pages_in_use`
    once; `pages_cached` are those that only handles hold. `tokens` adds up the rows' lengths, `slots_filled` counts the
    distinct slots in which they stand. `pages_given_up` counts the columns before a window, once for every row.
    """

    page_size: int
    num_pages: int
    num_sequences: int
    tokens: int
    longest: int
    pages_in_use: int
    pages_cached: int
    pages_shared: int
    pages_mapped: int
    slots_filled: int
    pages_given_up: int

    @classmethod
    def measure(cls, source: Any, group: int = 0) -> "MemoryReport":
        """Count the table of a group of layers; this waits for the device and copies the table to the host.

        Args:
            source: an `Engine`, a `KVCache`, a `PageTables` or a `PageTable`.
            group: of layers.

        Raises:
            ValueError: there are no page tables or no such group, or they have no values, as inside jit.
        """
        table = find_table(source, group)
        page_size = table.page_size
        refcounts, rows, lengths = (np.asarray(x) for x in (table.refcounts, table.pages, table.lengths))
        row, column = np.nonzero(rows)
        page = rows[row, column]
        owners = np.bincount(page, minlength=len(refcounts))
        fill = np.zeros(len(refcounts), int)
        np.maximum.at(fill, page, np.clip(lengths[row] - column * page_size, 0, page_size))
        in_use = refcounts > 0
        in_use[0] = False
        return cls(
            page_size=page_size,
            num_pages=len(refcounts) - 1,
            num_sequences=int(np.sum(lengths > 0)),
            tokens=int(np.sum(lengths)),
            longest=int(np.max(lengths, initial=0)),
            pages_in_use=int(np.sum(in_use)),
            pages_cached=int(np.sum(in_use & (owners == 0))),
            pages_shared=int(np.sum(owners > 1)),
            pages_mapped=len(page),
            slots_filled=int(np.sum(fill)),
            pages_given_up=int(np.sum(np.asarray(table.first_column))),
        )

    @property
    def sequence_pages(self) -> int:
        """Distinct pages that rows map."""
        return self.pages_in_use - self.pages_cached

    @property
    def waste(self) -> float:
        """Share of the slots in the rows' pages that hold no token (internal fragmentation)."""
        slots = self.sequence_pages * self.page_size
        return 1 - self.slots_filled / slots if slots else 0.0

    @property
    def saved_by_sharing(self) -> float:
        """Share of the mapped pages that need no memory of their own, as in PagedAttention (Kwon et al. 2023, 6.3)."""
        return 1 - self.sequence_pages / self.pages_mapped if self.pages_mapped else 0.0

    def contiguous_slots(self, reserved_per_sequence: int) -> int:
        """Slots that a contiguous cache holds for the same sequences, each with a reservation of that many tokens."""
        return self.num_sequences * reserved_per_sequence


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """The memory of all layers, group by group; `page_bytes` are those of one page in the layers of each group.

    Examples:
        >>> cache, granted = KVCache.create(config).reserve(jnp.array([20, 3]))
        >>> report = CacheReport.measure(cache, config)  # three pages of 512 bytes hold 23 tokens
        >>> report.bytes_in_use, report.ideal_bytes, report.contiguous_bytes(64)
        ((1536,), 736.0, 4096.0)
    """

    groups: tuple[MemoryReport, ...]
    page_bytes: tuple[int, ...]

    @classmethod
    def measure(cls, source: Any, config: CacheConfig | None = None) -> "CacheReport":
        """Count the tables of a cache; this waits for the device and copies them to the host.

        Args:
            source: an `Engine`, a `KVCache` or a `PageTables`.
            config: sizes of the cache; None: those of the engine.

        Raises:
            ValueError: no config was given, and the source has none.
        """
        tables, config = find_tables(source), getattr(source, "config", None) if config is None else config
        if config is None:
            raise ValueError(
                f"the bytes of a {type(source).__name__} need the sizes of its cache: pass its CacheConfig"
            )
        reports = tuple(MemoryReport.measure(tables, group) for group in range(len(tables.groups)))
        return cls(reports, tuple(len(group.layers) * config.layer_page_bytes for group in config.groups))

    @property
    def bytes_in_use(self) -> tuple[int, ...]:
        """Bytes of the pages that each group owns."""
        return tuple(report.pages_in_use * size for report, size in zip(self.groups, self.page_bytes, strict=True))

    @property
    def mapped_bytes(self) -> int:
        """Bytes that the rows would take if each had pages of its own."""
        return sum(report.pages_mapped * size for report, size in zip(self.groups, self.page_bytes, strict=True))

    @property
    def ideal_bytes(self) -> float:
        """Bytes of the distinct tokens that rows hold: pages without empty slots."""
        pairs = zip(self.groups, self.page_bytes, strict=True)
        return sum(report.slots_filled / report.page_size * size for report, size in pairs)

    def contiguous_bytes(self, reserved_per_sequence: int) -> float:
        """Bytes of a contiguous cache for the same sequences, each with a reservation of that many tokens."""
        pairs = zip(self.groups, self.page_bytes, strict=True)
        return sum(r.contiguous_slots(reserved_per_sequence) / r.page_size * size for r, size in pairs)

    @property
    def full_bytes(self) -> int:
        """Bytes that all groups would own had they given up nothing; at most, where rows share what they gave up."""
        pairs = zip(self.groups, self.page_bytes, strict=True)
        return sum((report.pages_in_use + report.pages_given_up) * size for report, size in pairs)

    @property
    def saved_by_windows(self) -> float:
        """Share of the full bytes that need no memory, because no later token sees them."""
        return 1 - sum(self.bytes_in_use) / self.full_bytes if self.full_bytes else 0.0
