"""A folder of pages that outlives the process, and that nothing in it can turn into wrong tokens.

    FOLDER/index.sqlite         what is there; can be made again from the files
    FOLDER/pages/NAME           a page each, immutable, named by its content
    FOLDER/writing/*/           files that are being written, a folder for each process
    FOLDER/aside/               what was found damaged, for whoever wants to know why

A page is written to a temporary file, which is brought to the disk and renamed; only then a row of the index names it.
So whenever a process ends, what the index names is whole. Nothing is taken on trust when a page is read: its checksums,
tokens, prefix and model are compared. What is not as it should be is a miss, with one warning, and is set aside.

Whatever the disk does, serving goes on: errors are warnings, one of each kind, and no method raises them.
"""

import collections
import contextlib
import errno
import fcntl
import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from paged_jax.store.index import Index, Row
from paged_jax.store.interface import Contents, Warnings, read_cap
from paged_jax.store.page_file import Damaged, PageKey, StoredPage, content_name, pack, unpack

INLINE_BYTES = 8192  # of the largest page that the index holds itself
MOST_ASIDE = 64  # damaged files that are kept
MOST_INDICES = 3  # that a process makes anew before it goes on without the store
NAME = re.compile("[0-9a-f]{32}")  # of a file: see `content_name`
URL = re.compile("(s3|s3a|gs|az|adl|abfss?|azure|https?|file|memory):", re.IGNORECASE)  # of a `Path`, one slash is left


class Store:
    """Pages in a folder, for any number of processes at once.

    Args:
        folder: made where there is none.
        max_bytes: of its pages, or a size such as "10GiB"; those that were not used for the longest time go first.
            None: no limit.

    Raises:
        ValueError: `max_bytes` is no size, or the folder is a file, a URL or "".

    Examples:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp(), max_bytes="10GiB")
        >>> engine = Engine.from_pretrained(models.DEMO, max_sequences=8, max_length=512, store=store)
        >>> store.contents().pages
        0
        >>> store.close()
    """

    def __init__(self, folder: str | Path, max_bytes: int | float | str | None = None):
        self.folder, self.max_bytes = Path(folder), read_cap("Store", max_bytes)
        if folder == "":
            raise ValueError("the store '' has no name: name a folder")
        if URL.match(str(folder)):
            raise ValueError(
                f"the store {str(folder)!r} is no folder: write a URL as a str, such as s3://BUCKET/PREFIX"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"the store {self.folder} is a file: name a folder")
        self._pages, self._aside = self.folder / "pages", self.folder / "aside"
        self._index: Index | None = None
        self._writing: Path | None = None
        self._lock_of_writing = -1
        self._warnings = Warnings()
        self._num_indices = 0  # that were begun anew
        with self._errors("be opened"):
            self._open()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r}, max_bytes={self.max_bytes})"

    def close(self) -> None:
        """Let go of the folder."""
        index, self._index = self._index, None
        if index is not None:
            index.close()
        if self._writing is not None:
            shutil.rmtree(self._writing, ignore_errors=True)
            os.close(self._lock_of_writing)
            self._writing = None

    @property
    def is_open(self) -> bool:
        """Whether pages can be found in it."""
        return self._index is not None

    # ---- pages -----------------------------------------------------------------------------------------------

    def find(self, pages: Sequence[StoredPage]) -> set[PageKey]:
        """Which pages are there; they may turn out not to be good."""
        with self._errors("be read"):
            if self._index is not None:
                return self._index.find(page.digest for page in pages) & {page.key for page in pages}
        return set()

    def beginning(self, parent: bytes, tokens: bytes) -> bytes | None:
        """The tokens of a page that continues a prefix, and begins with some tokens."""
        with self._errors("be read"):
            if self._index is not None:
                return self._index.beginning(parent, tokens)
        return None

    def read(self, pages: Sequence[StoredPage]) -> list[StoredPage | None]:
        """Pages with their payloads, checked; None where one is not there, or not what it should be."""
        with self._errors("be read"):
            if self._index is not None:
                rows = self._index.rows(page.digest for page in pages)
                return [self._read(rows[page.key], page) if page.key in rows else None for page in pages]
        return [None] * len(pages)

    def _read(self, row: Row, expected: StoredPage) -> StoredPage | None:
        with self._errors("be read"):
            try:
                page = unpack(self._data(row))
                if not page.is_same_place(expected):
                    raise Damaged("the page is one of other tokens, or of another model")
                return page
            except FileNotFoundError:
                if self.find([expected]):  # else it was pruned just now
                    self._set_aside(row, "the file is gone")
            except Damaged as reason:
                self._set_aside(row, str(reason))
        return None

    def _data(self, row: Row) -> bytes:
        return row.inline if row.inline is not None else self._file(row).read_bytes()

    def write(self, pages: Sequence[StoredPage]) -> int | None:
        """Keep pages; when this returns they are on the disk.

        Returns:
            How many are new; None where they could not be written.
        """
        with self._errors("be written"):
            if self._index is None:
                return None
            known = self._index.find(page.digest for page in pages)
            new = [page for page in pages if page.key not in known]
            if not new:
                return 0
            with contextlib.ExitStack() as stack:
                rows = [self._write_file(page, stack) for page in new]
                with self._index.changing():
                    num_new = sum(self._publish(*row) for row in rows)
                    self._index.touch(new)
                    if any(path is not None for _, path in rows):
                        _sync(self._pages)
                    old = self._forget_oldest(self.max_bytes)
                self._unlink(old)
            return num_new
        return None

    def touch(self, pages: Sequence[StoredPage]) -> None:
        """Pages were used."""
        with self._errors("be written"):
            if self._index is not None:
                with self._index.changing():
                    self._index.touch(pages)

    def prune(self, max_bytes: int) -> int:
        """Remove the pages that were not used for the longest time; returns how many."""
        with self._errors("be written"):
            if self._index is not None:
                with self._index.changing():
                    old = self._forget_oldest(max_bytes)
                self._unlink(old)
                return len(old)
        return 0

    def verify(self) -> tuple[int, int]:
        """Read all pages; returns how many are good, and how many were not and were set aside."""
        num_good = num_bad = 0
        with self._errors("be read"):
            for row in self._index.all() if self._index is not None else []:
                key = PageKey(row.digest, row.group)
                row = self._index.rows([row.digest]).get(key, row) if self._index is not None else row  # with its bytes
                try:
                    data = self._data(row)
                    page = unpack(data)
                    if content_name(data) != row.name or page.key != key:
                        raise Damaged("the file is another than the index says")
                    num_good += 1
                except (Damaged, OSError) as reason:
                    self._set_aside(row, str(reason))
                    num_bad += 1
        return num_good, num_bad

    def contents(self) -> Contents:
        """What is there."""
        rows = self._index.all() if self._index is not None else []
        fingerprints = collections.Counter(row.fingerprint.hex()[:16] for row in rows)
        num_aside = len(list(self._aside.iterdir())) if self._aside.is_dir() else 0
        total, inline = sum(row.num_bytes for row in rows), self._index.num_inline() if self._index is not None else 0
        return Contents(len(rows), total, inline, dict(fingerprints), num_aside)

    # ---- opening ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        for folder in (self._pages, self._aside, self.folder / "writing"):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock"):
            self._open_writing()
            try:
                self._index = Index(self.folder / "index.sqlite")
                self._adopt()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._begin_index_anew(str(error))

    def _open_writing(self) -> None:
        """A folder for the files that this process writes, and no longer those of processes that ended."""
        for folder in (self.folder / "writing").iterdir():
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass  # its process lives
            finally:
                os.close(descriptor)
        self._writing = Path(tempfile.mkdtemp(dir=self.folder / "writing"))
        self._lock_of_writing = os.open(self._writing, os.O_RDONLY)
        fcntl.flock(self._lock_of_writing, fcntl.LOCK_EX)

    def _begin_index_anew(self, reason: str) -> None:
        self._warnings.say(
            "index", f"the index of the store {self.folder} is damaged ({reason}): it is made again from the files"
        )
        if self._index is not None:
            self._index.close()
            self._index = None
        self._num_indices += 1
        if self._num_indices > MOST_INDICES:
            return
        for path in self.folder.glob("index.sqlite*"):
            path.rename(self._aside / f"{path.name}-{time.time_ns()}")
        self._index = Index(self.folder / "index.sqlite")
        self._adopt()

    def _adopt(self) -> None:
        """Files that no row names: their process ended before it could add the row, or the index is new."""
        assert self._index is not None
        with self._index.changing():
            known = self._index.names()
            for path in [path for path in self._pages.iterdir() if path.name not in known]:
                try:
                    data = path.read_bytes()
                    page = unpack(data)
                    if content_name(data) != path.name:
                        raise Damaged("its name is not that of its content")
                except Damaged as reason:
                    self._move_aside(path, str(reason))
                    continue
                if self._index.has(page.digest, page.group):
                    path.unlink()
                else:
                    self._index.add(Row.of(page, path.name, len(data)))
            old = self._forget_oldest(self.max_bytes)
        self._unlink(old)

    # ---- files -----------------------------------------------------------------------------------------------

    def _write_file(self, page: StoredPage, stack: contextlib.ExitStack) -> tuple[Row, Path | None]:
        """The row of a page, and the temporary file that holds it; the file goes with the stack."""
        data = pack(page)
        row = Row.of(page, content_name(data), len(data))
        if len(data) <= INLINE_BYTES:
            return row._replace(inline=data), None
        assert self._writing is not None
        descriptor, name = tempfile.mkstemp(dir=self._writing)
        path = Path(name)
        stack.callback(path.unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return row, path

    def _file(self, row: Row) -> Path:
        """Where a page lies: in this folder, whatever a damaged index says."""
        if not isinstance(row.name, str) or not NAME.fullmatch(row.name):
            raise Damaged(f"the index names a file {row.name!r}")
        return self._pages / row.name

    def _publish(self, row: Row, path: Path | None) -> bool:
        """Add a row, and let its file stand where the index says; returns whether it is new."""
        assert self._index is not None
        if self._index.has(row.digest, row.group):
            return False
        if path is not None:
            path.rename(self._pages / row.name)
        self._index.add(row)
        return True

    def _forget_oldest(self, max_bytes: int | None) -> list[Row]:
        """Forget the oldest pages above a number of bytes, while the index is being changed."""
        assert self._index is not None
        if max_bytes is None:
            return []
        excess = self._index.num_bytes() - max_bytes
        rows = self._index.oldest(excess) if excess > 0 else []
        for row in rows:
            self._index.remove(row)
        return rows

    def _unlink(self, rows: Sequence[Row]) -> None:
        """Remove the files of pages that were forgotten, after that: no row ever names a file that is gone."""
        assert self._index is not None
        if rows:
            with self._index.changing():
                for row in rows:
                    if not self._index.names_file(row.name):  # else it was written again meanwhile
                        with contextlib.suppress(Damaged):
                            self._file(row).unlink(missing_ok=True)

    def _set_aside(self, row: Row, reason: str) -> None:
        """A page is not what it should be: nobody finds it any more."""
        self._warnings.say("damage", f"a page of the store {self.folder} is damaged ({reason}): it is computed again")
        if self._index is not None:
            with self._index.changing():
                if self._index.remove(row) and row.inline is None:
                    with contextlib.suppress(Damaged):
                        self._move_aside(self._file(row), reason)

    def _move_aside(self, path: Path, reason: str) -> None:
        self._warnings.say("damage", f"a page of the store {self.folder} is damaged ({reason}): it is computed again")
        with contextlib.suppress(FileNotFoundError):
            path.rename(self._aside / path.name)
        for old in sorted(self._aside.iterdir(), key=lambda path: path.stat().st_mtime)[:-MOST_ASIDE]:
            old.unlink(missing_ok=True)

    # ---- errors ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Whatever the disk or the index raises, serving goes on without the store."""
        index = self._index
        try:
            yield
        except sqlite3.OperationalError as error:
            self._warnings.say(what, f"the store {self.folder} cannot {what} ({error}): serving goes on without")
        except sqlite3.DatabaseError as error:
            with self._errors("be opened"), _locked(self.folder / "lock"):
                if self._index is index:  # else another thread was faster, or it was closed
                    self._begin_index_anew(str(error))
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0, "error")
            self._warnings.say(
                what, f"the store {self.folder} cannot {what} ({reason}: {error}): serving goes on without"
            )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process is inside meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    """Bring the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
