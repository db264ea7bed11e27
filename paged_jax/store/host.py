"""Pages in the memory of the host: those that the pool gave up, until they are needed again or others are newer."""

import threading
from collections import OrderedDict
from typing import NamedTuple


class PageKey(NamedTuple):
    """A page of one group of layers: the digest of the prefix that it ends, and the group."""

    digest: bytes
    group: int


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
        self._pages: OrderedDict[PageKey, tuple[int, bytes | None]] = OrderedDict()  # bytes, and how many
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Pages."""
        return len(self._pages)

    def expect(self, key: PageKey, num_bytes: int) -> int:
        """A page has left the pool, and its bytes will come; returns how many others had to go."""
        with self._lock:
            self._forget(key)
            if num_bytes > self.max_bytes:
                return 0
            self._pages[key] = num_bytes, None
            self.num_bytes += num_bytes
            num_before = len(self._pages)
            while self.num_bytes > self.max_bytes:
                self._forget(next(iter(self._pages)))
            return num_before - len(self._pages)

    def fill(self, key: PageKey, page: bytes) -> None:
        """The bytes of a page that was expected, if it is not gone by now."""
        with self._lock:
            if key in self._pages:
                self._pages[key] = len(page), page  # in its place

    def get(self, key: PageKey) -> bytes | None:
        """The bytes of a page; None where it is not here, or its bytes are on their way."""
        with self._lock:
            return self._pages.get(key, (0, None))[1]

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
            for key in [key for key, (_, page) in self._pages.items() if page is None]:
                self._forget(key)

    def _forget(self, key: PageKey) -> None:
        num_bytes, _ = self._pages.pop(key, (0, None))
        self.num_bytes -= num_bytes
