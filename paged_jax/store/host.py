"""Pages in the memory of the host: those that the pool gave up, until they are needed again or others are newer."""

import threading
from collections import Counter, OrderedDict
from typing import NamedTuple

from paged_jax.store.page_file import PageKey


class Entry(NamedTuple):
    """A page: what it continues, its tokens, how many bytes it has, and these, once they have come."""

    parent: bytes
    tokens: bytes
    num_bytes: int
    page: bytes | None = None


class HostPages:
    """Pages up to a number of bytes; those that came first leave first.

    The pool gives up what continues a prefix before the prefix. So what continues a page stands before it here, too,
    and this order is least recently used, leaves first.

    A page has a place from the moment at which the pool gives it up; its bytes follow once the device has sent them.

    Args:
        max_bytes: of all pages.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._pages: OrderedDict[PageKey, Entry] = OrderedDict()
        self._tokens: dict[bytes, Counter[bytes]] = {}  # of the pages that continue a prefix
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Pages."""
        return len(self._pages)

    def expect(self, key: PageKey, parent: bytes, tokens: bytes, num_bytes: int) -> None:
        """A page has left the pool, and its bytes will come; the oldest go where there is no room.

        Args:
            key: of the page.
            parent: the digest of what it continues.
            tokens: of the page.
            num_bytes: that will come.
        """
        with self._lock:
            self._forget(key)
            if num_bytes > self.max_bytes:
                return
            self._tokens.setdefault(parent, Counter())[tokens] += 1
            self.num_bytes += num_bytes
            self._pages[key] = Entry(parent, tokens, num_bytes)  # last: an interrupt leaves nothing that is not counted
            while self.num_bytes > self.max_bytes:
                self._forget(next(iter(self._pages)))

    def fill(self, key: PageKey, page: bytes) -> None:
        """The bytes of a page that was expected, if it is not gone by now."""
        with self._lock:
            if key in self._pages:
                self._pages[key] = self._pages[key]._replace(page=page)  # in its place

    def get(self, key: PageKey) -> bytes | None:
        """The bytes of a page; None where it is not here, or its bytes are on their way."""
        with self._lock:
            return self._pages[key].page if key in self._pages else None

    def beginning(self, parent: bytes, tokens: bytes) -> bytes | None:
        """The tokens of a page that continues a prefix, and begins with some tokens."""
        with self._lock:
            return next((one for one in self._tokens.get(parent, ()) if one.startswith(tokens)), None)

    def has(self, key: PageKey) -> bool:
        """Whether a page is here, or on its way."""
        return key in self._pages

    def discard(self, key: PageKey) -> None:
        """A page is in the pool again."""
        with self._lock:
            self._forget(key)

    def forget_expected(self) -> None:
        """What is on its way will not come."""
        with self._lock:
            for key in [key for key, entry in self._pages.items() if entry.page is None]:
                self._forget(key)

    def _forget(self, key: PageKey) -> None:
        entry = self._pages.pop(key, None)
        if entry is None:
            return
        self.num_bytes -= entry.num_bytes
        counts = self._tokens[entry.parent]
        counts[entry.tokens] -= 1
        if not counts[entry.tokens]:
            del counts[entry.tokens]
        if not counts:
            del self._tokens[entry.parent]
