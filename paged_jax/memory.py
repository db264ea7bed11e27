"""Where the memory went: a page table counted on the host."""

import dataclasses

import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.page_tables import PageTables


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Counts of one moment; pages are physical unless they are called mapped.

    `num_pages` leaves out the null page. `pages_mapped` counts a page once for every row that maps it, `pages_in_use`
    once; `pages_cached` are those that only handles hold. `tokens` adds up the rows' lengths, `slots_filled` counts the
    distinct slots in which they stand. `pages_given_up` counts the columns behind a window, once for every row.
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
    def measure(cls, tables: PageTables, group: int = 0) -> "MemoryReport":
        """Count the table of a group of layers; this waits for the device and copies the table to the host."""
        table = tables.groups[group]
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
    """The memory of all layers, group by group; `page_bytes` are those of one page in the layers of each group."""

    groups: tuple[MemoryReport, ...]
    page_bytes: tuple[int, ...]

    @classmethod
    def measure(cls, tables: PageTables, config: CacheConfig) -> "CacheReport":
        """Count the tables of a cache; this waits for the device and copies them to the host."""
        reports = tuple(MemoryReport.measure(tables, group) for group in range(len(tables.groups)))
        return cls(reports, tuple(len(group.layers) * config.layer_page_bytes for group in config.groups))

    @property
    def bytes_in_use(self) -> tuple[int, ...]:
        """Bytes of the pages that each group owns."""
        return tuple(report.pages_in_use * size for report, size in zip(self.groups, self.page_bytes, strict=True))

    @property
    def full_bytes(self) -> int:
        """Bytes that all groups would own had they given up nothing; at most, where rows share what they gave up."""
        pairs = zip(self.groups, self.page_bytes, strict=True)
        return sum((report.pages_in_use + report.pages_given_up) * size for report, size in pairs)

    @property
    def saved_by_windows(self) -> float:
        """Share of the full bytes that need no memory, because no later token sees them."""
        return 1 - sum(self.bytes_in_use) / self.full_bytes if self.full_bytes else 0.0
