"""What an engine asks of a store, wherever its pages lie."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from paged_jax.cache.sizes import read_bytes
from paged_jax.store.page_file import PageKey, StoredPage

_log = logging.getLogger("paged_jax.store")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a store holds."""

    pages: int
    bytes: int
    inline_pages: int  # of a folder: those that stand in its index
    fingerprints: dict[str, int]  # pages of each model and its sizes, by the first 16 digits of its fingerprint
    aside: int  # damaged pages


@runtime_checkable
class PageStore(Protocol):
    """Pages that outlive the process, and that others share.

    A page is named by a `StoredPage`, mostly without payload. No method raises what a disk or a network raises: that is
    a warning, one of each kind, and a miss. One thread reads and another writes, at the same time.

    Examples:
        A class with these methods is a store, whatever it derives from:

        >>> import tempfile
        >>> from paged_jax.store import Store
        >>> isinstance(Store(tempfile.mkdtemp()), PageStore)
        True
    """

    def find(self, pages: Sequence[StoredPage]) -> set[PageKey]:
        """Which pages are there; of a long list only the beginning may be looked for, when none of that is there."""
        ...

    def beginning(self, parent: bytes, tokens: bytes) -> bytes | None:
        """The tokens of a page that continues a prefix, and begins with some tokens; None: none is known."""
        ...

    def read(self, pages: Sequence[StoredPage]) -> list[StoredPage | None]:
        """Pages with their payloads, checked; None where one is not there, or not what it should be."""
        ...

    def write(self, pages: Sequence[StoredPage]) -> int | None:
        """Keep pages, for good when this returns; how many are new, or None where that failed."""
        ...

    def touch(self, pages: Sequence[StoredPage]) -> None:
        """Pages were used."""
        ...

    def verify(self) -> tuple[int, int]:
        """Read all pages; returns how many are good, and how many were not and were set aside.

        Raises:
            OSError: the store cannot be read; so of `prune` and `contents`.
        """
        ...

    def prune(self, max_bytes: int) -> int:
        """Remove pages until at most `max_bytes` of them are left; returns how many."""
        ...

    def contents(self) -> Contents:
        """What is there."""
        ...

    def close(self) -> None:
        """Let go of it: from now on all is a miss."""
        ...


class Warnings:
    """Says each kind of thing once."""

    def __init__(self):
        self._said: set[str] = set()

    def say(self, kind: str, message: str) -> None:
        """Warn, unless something of this kind was said before."""
        if kind not in self._said:
            self._said.add(kind)
            _log.warning(message)


def read_cap(name: str, max_bytes: int | float | str | None) -> int | None:
    """The byte cap of a store.

    Args:
        name: of the class, for the error.
        max_bytes: a number, or a size such as "10GiB"; None: there is no cap.

    Raises:
        ValueError: it is no size, or less than a byte.
    """
    if max_bytes is None:
        return None
    try:
        size = read_bytes(max_bytes)
    except ValueError as error:
        raise ValueError(f"{name}(max_bytes={max_bytes!r}): {error}") from None
    if size < 1:
        raise ValueError(f"{name}(max_bytes={max_bytes!r}): give at least one byte, or None for no limit")
    return size
