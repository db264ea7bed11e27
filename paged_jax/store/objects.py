"""Pages in an object store: S3, Google Cloud Storage, Azure, or a folder, through `obstore`.

    PREFIX/pages/MODEL/PARENT/DIGEST-GROUP      a page each, in the form of `page_file`, immutable
    PREFIX/aside/DIGEST-GROUP                   what was found damaged, for whoever wants to know why

The name of an object says which prefix its page ends, what that continues and of which model it is. So there is no
index that could be lost or lie, and listing the names is enough to tell leaves from roots. An object is put whole or
not at all. What is read is checked like the files of a folder.

Nothing says when an object was used. Where there is a byte cap, those pages go first that were written the longest time
ago, and none before all that continue it.
"""

import concurrent.futures
import datetime
import itertools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from paged_jax.store.interface import Contents, Warnings, read_cap
from paged_jax.store.page_file import Damaged, PageKey, StoredPage, pack, unpack

AT_ONCE = 32  # requests
FIRST = 16  # pages that are looked for first; four times as many each time that some are there
REST = 10.0  # seconds for which nothing more is asked of a store that failed
PER_LISTING = 64  # share of the cap that is written until the objects are listed again
CLIENT = {"connect_timeout": "2s", "timeout": "10s", "allow_http": True}  # http:// is for who names such an endpoint
RETRIES = {"max_retries": 2, "retry_timeout": datetime.timedelta(seconds=5)}
NAME = re.compile("pages/([0-9a-f]{16})/([0-9a-f]{64})/([0-9a-f]{64})-([0-9]+)")


class Stored(NamedTuple):
    """An object, as a list of all says."""

    name: str
    model: str
    parent: str
    digest: str
    size: int
    written: datetime.datetime


class ObjectStore:
    """Pages in an object store, for any number of processes at once.

    Credentials come from the environment, or from where the machine has them, as `obstore` finds them.

    Args:
        url: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://ACCOUNT/CONTAINER/PREFIX, file:///FOLDER, memory:///.
        max_bytes: of its pages, or a size such as "10GiB"; None: no limit. With several processes that write, each may
            exceed it by a 64th.
        options: of `obstore.store.from_url`, such as `endpoint`, `region`, `access_key_id`, `client_options`.

    Raises:
        ValueError: `max_bytes` is no size, or the URL or an option is none that obstore knows.
        ImportError: obstore is not installed.

    Examples:
        >>> store = ObjectStore("memory:///", max_bytes="10GiB")
        >>> engine = Engine.from_pretrained(models.DEMO, max_sequences=8, max_length=512, store=store)
        >>> store.contents().pages
        0
        >>> store.close()
    """

    def __init__(self, url: str, max_bytes: int | float | str | None = None, **options: Any):
        self.url, self.max_bytes = url.rstrip("/"), read_cap("ObjectStore", max_bytes)
        self._obstore = obstore = _import()
        if self.url == "file:":
            raise ValueError(f"the store {url!r} names no folder: write file:///FOLDER")
        self._errors = OSError, obstore.exceptions.BaseError
        if url.startswith("file:"):
            options = {"mkdir": True} | options
        else:
            client = CLIENT | options.get("client_options", {})
            options = {"retry_config": RETRIES} | options | {"client_options": client}
        try:
            self._objects = obstore.store.from_url(url, **options)
        except (*self._errors, TypeError, ValueError) as error:
            raise ValueError(
                f"the store {url!r} cannot be opened ({_first_line(error)}): give a URL such as s3://BUCKET/PREFIX"
            ) from None
        self._requests = concurrent.futures.ThreadPoolExecutor(AT_ONCE, "paged_jax_store_requests")
        self._warnings = Warnings()
        self._rests_until = {"be read": 0.0, "be written": 0.0}  # of time.monotonic
        self._is_open, self._unlisted = True, self.max_bytes or 0  # bytes; at first whatever others have written

    def __enter__(self) -> "ObjectStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r}, max_bytes={self.max_bytes})"

    def close(self) -> None:
        """End the threads that wait for answers."""
        self._is_open = False
        self._requests.shutdown()

    # ---- pages -----------------------------------------------------------------------------------------------

    def find(self, pages: Sequence[StoredPage]) -> set[PageKey]:
        """Which pages are there, by a request each; it ends with the first 16, 64, 256, ... of which none is."""
        return self._try("be read", self._find, pages, otherwise=set())

    def beginning(self, parent: bytes, tokens: bytes) -> None:
        """Not known: an object is found only by all of its tokens."""

    def read(self, pages: Sequence[StoredPage]) -> list[StoredPage | None]:
        """Pages with their payloads, checked, many at once."""
        return self._try("be read", self._each, self._read, pages, otherwise=[None] * len(pages))

    def write(self, pages: Sequence[StoredPage]) -> int | None:
        """Keep pages that are not there; returns how many."""
        return self._try("be written", self._write, pages, otherwise=None)

    def touch(self, pages: Sequence[StoredPage]) -> None:
        """An object store keeps no times of use."""

    def prune(self, max_bytes: int) -> int:
        """Remove the pages that were written the longest time ago, leaves first, and what was set aside."""
        return self._ask(self._prune, max_bytes)

    def verify(self) -> tuple[int, int]:
        """Read all pages; returns how many are good, and how many were not and were set aside."""
        return self._ask(self._verify)

    def contents(self) -> Contents:
        """What is there."""
        return self._ask(self._contents)

    # ---- requests --------------------------------------------------------------------------------------------

    def _find(self, pages: Sequence[StoredPage]) -> set[PageKey]:
        found: set[PageKey] = set()
        for some in _growing(pages):
            here = {page.key for page, is_there in zip(some, self._each(self._has, some), strict=True) if is_there}
            if not here:
                break
            found |= here
        return found

    def _has(self, page: StoredPage) -> bool:
        try:
            self._obstore.head(self._objects, _name(page))
            return True
        except FileNotFoundError:
            return False

    def _read(self, expected: StoredPage) -> StoredPage | None:
        try:
            return self._get(_name(expected), expected)
        except FileNotFoundError:
            return None
        except Damaged as reason:
            self._set_aside(_name(expected), reason)
            return None

    def _get(self, name: str, expected: StoredPage | None = None) -> StoredPage:
        page = unpack(memoryview(self._obstore.get(self._objects, name).bytes()))
        if _name(page) != name or (expected is not None and not page.is_same_place(expected)):
            raise Damaged("the page is one of other tokens, or of another model")
        return page

    def _write(self, pages: Sequence[StoredPage]) -> int:
        known = self._find(pages)
        new = [page for page in pages if page.key not in known]
        self._unlisted += sum(self._each(self._put, new))
        if self.max_bytes is not None and self._unlisted >= (slack := self.max_bytes // PER_LISTING):
            self._prune(self.max_bytes - slack)
            self._unlisted = 0
        return len(new)

    def _put(self, page: StoredPage) -> int:
        data = pack(page)
        self._obstore.put(self._objects, _name(page), data)
        return len(data)

    def _prune(self, max_bytes: int) -> int:
        order = _newest_first(self._all())
        totals = itertools.accumulate(stored.size for stored in order)
        old = [stored.name for stored, total in zip(order, totals, strict=True) if total > max_bytes]
        gone = [*old, *self._aside()]
        if gone:
            self._obstore.delete(self._objects, gone)
        return len(old)

    def _verify(self) -> tuple[int, int]:
        are_good = self._each(self._is_good, [stored.name for stored in self._all()])
        return sum(are_good), len(are_good) - sum(are_good)

    def _is_good(self, name: str) -> bool:
        try:
            self._get(name)
            return True
        except Damaged as reason:
            self._set_aside(name, reason)
            return False

    def _contents(self) -> Contents:
        everything = self._all()
        models = Counter(stored.model for stored in everything)
        total = sum(stored.size for stored in everything)
        return Contents(len(everything), total, 0, dict(models), len(self._aside()))

    def _all(self) -> list[Stored]:
        """All pages, by their names; what else lies there is not ours."""
        batches = self._obstore.list(self._objects, "pages")
        return [
            Stored(meta["path"], match[1], match[2], match[3], meta["size"], meta["last_modified"])
            for batch in batches
            for meta in batch
            if (match := NAME.fullmatch(meta["path"]))
        ]

    def _aside(self) -> list[str]:
        return [meta["path"] for batch in self._obstore.list(self._objects, "aside") for meta in batch]

    def _set_aside(self, name: str, reason: Damaged) -> None:
        self._warnings.say("damage", f"a page of the store {self.url} is damaged ({reason}): it is computed again")
        try:
            self._obstore.rename(self._objects, name, f"aside/{name.rpartition('/')[2]}")
        except self._errors:
            pass  # another process was faster, or this one may not: then it is damaged the next time, too

    def _each(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """The results of many requests at once."""
        return list(self._requests.map(function, items))

    def _try(self, what: str, function: Callable, *arguments: Any, otherwise: Any) -> Any:
        """Whatever the network or the store raises, serving goes on without, and for a while nothing more is asked."""
        if not self._is_open or time.monotonic() < self._rests_until[what]:
            return otherwise
        try:
            return function(*arguments)
        except self._errors as error:
            self._rests_until[what] = time.monotonic() + REST
            reason = f"{type(error).__name__}: {_first_line(error)}"
            self._warnings.say(what, f"the store {self.url} cannot {what} ({reason}): serving goes on without")
            return otherwise

    def _ask(self, function: Callable, *arguments: Any) -> Any:
        """For those who look after a store, not for serving: they are told that it does not answer."""
        try:
            return function(*arguments)
        except self._errors as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise OSError(f"the store {self.url} does not answer ({reason})") from error


def _name(page: StoredPage) -> str:
    return f"pages/{page.fingerprint.hex()[:16]}/{page.parent.hex()}/{page.digest.hex()}-{page.group}"


def _growing(pages: Sequence[StoredPage]) -> Iterator[Sequence[StoredPage]]:
    start, count = 0, FIRST
    while start < len(pages):
        yield pages[start : start + count]
        start, count = start + count, 4 * count


def _newest_first(everything: Sequence[Stored]) -> list[Stored]:
    """Pages by when they, or something that continues them, were written; none before what it continues."""
    of_digest: defaultdict[str, list[Stored]] = defaultdict(list)
    for stored in everything:
        of_digest[stored.digest].append(stored)
    order: list[Stored] = []
    for stored in sorted(everything, key=lambda stored: stored.written, reverse=True):
        path, digest = [], stored.digest
        while digest in of_digest:
            path.append(of_digest.pop(digest))
            digest = path[-1][0].parent
        order += itertools.chain(*reversed(path))
    return order


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]


def _import() -> Any:
    try:
        import obstore  # pyright: ignore[reportMissingImports]  an extra
        import obstore.exceptions  # pyright: ignore[reportMissingImports]  likewise
        import obstore.store  # pyright: ignore[reportMissingImports]  likewise
    except ImportError as error:
        raise ImportError("object stores are reached by obstore: pip install 'paged_jax[object-store]'") from error
    return obstore
