"""Page tables of all groups in plain Python, with what each page holds: a prefix cache's surroundings without a device.

A slot of a page holds the namespace and all tokens up to its own, as keys and values do. Pages are handed out again at
once, so a page that is used after its last reference is dropped shows.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.prefix.prefix_cache import Taken

Content = tuple[Any, ...]  # namespace and tokens


class Handle(NamedTuple):
    """As much of a `PageHandle` as comes to the host."""

    pages: np.ndarray
    num_tokens: int
    first_column: int


class Row:
    """A sequence: its namespace, its tokens, and for each group its pages by column."""

    def __init__(self, namespace: Any, num_groups: int):
        self.namespace = namespace
        self.tokens: tuple[int, ...] = ()
        self.pages: list[dict[int, int]] = [{} for _ in range(num_groups)]


class PagedRows:
    """Any number of rows, without a limit on pages."""

    def __init__(self, config: CacheConfig):
        self.windows = [group.window for group in config.groups]
        self.page_size, self.num_columns = config.page_size, config.max_pages_per_sequence
        self.references = [Counter() for _ in self.windows]
        self.free = [list(range(2000, 0, -1)) for _ in self.windows]
        self.slots: list[dict[int, list[Content]]] = [{} for _ in self.windows]  # of the pages in use

    def first_seen(self, group: int, num_tokens: int) -> int:
        """The first column whose tokens the next one sees, counted from the tokens themselves."""
        window = self.windows[group]
        seen = range(num_tokens) if window is None else range(max(num_tokens - window + 1, 0), num_tokens)
        return seen[0] // self.page_size if seen else num_tokens // self.page_size

    def add(self, group: int, page: int) -> None:
        assert page in self.slots[group], f"page {page} of group {group} is free"
        self.references[group][page] += 1

    def drop(self, group: int, page: int) -> None:
        assert self.references[group][page] > 0, f"page {page} of group {group} is dropped once too often"
        self.references[group][page] -= 1
        if not self.references[group][page]:
            del self.slots[group][page], self.references[group][page]
            self.free[group].append(page)

    def attach(self, namespace: Any, taken: Taken, tokens: tuple[int, ...]) -> Row:
        """A row with the pages that were taken, of which each must hold the tokens of the prompt."""
        row, stop = Row(namespace, len(self.windows)), -(-taken.num_tokens // self.page_size)
        row.tokens = tokens[: taken.num_tokens]
        for group, pages in enumerate(taken.pages.tolist()):
            first = int(taken.first_columns[group])
            assert first == self.first_seen(group, taken.num_tokens), "another window than the next token sees"
            mapped = {column: page for column, page in enumerate(pages) if page}
            assert list(mapped) == list(range(first, stop)), "a page is missing, or one too many"
            for page in mapped.values():
                self.add(group, page)
            row.pages[group] = mapped
        self.check(row)
        return row

    def append(self, row: Row, tokens: tuple[int, ...]) -> None:
        """Compute more tokens: give up pages behind windows, copy a shared last page, write."""
        for group, pages in enumerate(row.pages):
            for column in [c for c in pages if c < self.first_seen(group, len(row.tokens))]:
                self.drop(group, pages.pop(column))
        for token in tokens:
            column, slot = divmod(len(row.tokens), self.page_size)
            row.tokens += (token,)
            for group, pages in enumerate(row.pages):
                if slot == 0 or self.references[group][pages[column]] > 1:
                    page = self.free[group].pop()
                    self.slots[group][page] = []
                    self.add(group, page)
                    if slot:
                        self.slots[group][page] = list(self.slots[group][pages[column]])
                        self.drop(group, pages[column])
                    pages[column] = page
                content = self.slots[group][pages[column]]
                content[slot:] = [(row.namespace, row.tokens)]
        self.check(row)

    def publish(self, row: Row, num_tokens: int) -> tuple[Handle, ...]:
        """What `PageTables.publish` hands out, or refuses."""
        spans = [
            range(self.first_seen(g, num_tokens), -(-num_tokens // self.page_size)) for g in range(len(self.windows))
        ]
        is_whole = all(column in pages for span, pages in zip(spans, row.pages, strict=True) for column in span)
        handles = []
        for group, span in enumerate(spans):
            ids = np.zeros(self.num_columns, np.int32)
            if is_whole and num_tokens <= len(row.tokens):
                for column in span:
                    ids[column] = row.pages[group][column]
                    self.add(group, row.pages[group][column])
                handles.append(Handle(ids, num_tokens, span.start))
            else:
                handles.append(Handle(ids, 0, 0))
        return tuple(handles)

    def release(self, row: Row) -> None:
        for group, pages in enumerate(row.pages):
            for page in pages.values():
                self.drop(group, page)
        row.pages = [{} for _ in self.windows]

    def check(self, row: Row) -> None:
        """Each page of a row holds its tokens."""
        for group, pages in enumerate(row.pages):
            for column, page in pages.items():
                stop = min(len(row.tokens), (column + 1) * self.page_size)
                for i in range(column * self.page_size, stop):
                    held = self.slots[group][page][i % self.page_size]
                    assert held == (row.namespace, row.tokens[: i + 1]), "a page holds other tokens"
