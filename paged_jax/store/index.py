"""What a store holds, in SQLite: for each page the prefix that it ends, the file or the bytes, and its last use.

Several processes share an index. Whoever changes it, or moves a file, holds its write lock (`changing`); whoever reads
waits for nobody. A change is on the disk when it returns.
"""

import contextlib
import itertools
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from paged_jax.store.page_file import PageKey, StoredPage

SCHEMA = """
CREATE TABLE IF NOT EXISTS pages (
    digest BLOB NOT NULL,
    grp INTEGER NOT NULL,
    parent BLOB NOT NULL,
    tokens BLOB NOT NULL,
    depth INTEGER NOT NULL,
    name TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    fingerprint BLOB NOT NULL,
    used INTEGER NOT NULL,
    inline BLOB,
    PRIMARY KEY (digest, grp)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON pages (used, depth, bytes);
CREATE INDEX IF NOT EXISTS by_name ON pages (name);
CREATE INDEX IF NOT EXISTS by_parent ON pages (parent, tokens);
"""
COLUMNS = "digest, grp, parent, tokens, depth, name, bytes, fingerprint"
ANCESTORS = """
WITH RECURSIVE up(digest) AS (
    SELECT ? UNION SELECT pages.parent FROM pages JOIN up ON pages.digest = up.digest
) SELECT digest FROM up
"""
SCHEMA_VERSION = 1
PATIENCE = 10.0  # seconds that a process waits for the others
AT_ONCE = 400  # digests in a statement


class Row(NamedTuple):
    """One page.

    Args:
        digest: of the prefix that ends with it.
        group: of layers.
        parent: the digest of what it continues.
        tokens: of the page.
        depth: pages of the prefix.
        name: of its file, or of its bytes where they are `inline`.
        num_bytes: of the file.
        fingerprint: of the model and the sizes.
        inline: the bytes of a small page, which has no file.
    """

    digest: bytes
    group: int
    parent: bytes
    tokens: bytes
    depth: int
    name: str
    num_bytes: int
    fingerprint: bytes
    inline: bytes | None = None

    @classmethod
    def of(cls, page: StoredPage, name: str, num_bytes: int) -> "Row":
        """The row of a page that has a file."""
        return cls(page.digest, page.group, page.parent, page.tokens, page.depth, name, num_bytes, page.fingerprint)


class Index:
    """The index of a folder.

    Args:
        path: of the database.

    Raises:
        sqlite3.Error: it cannot be opened, or is damaged.
    """

    def __init__(self, path: Path):
        self._changing, self._reading = threading.Lock(), threading.Lock()  # of the connections
        self._connection = _connect(path)
        self._stamp = 0  # the time of the change
        try:
            self._open()
            self._reader = _connect(path)  # of its own, so that reading waits for no change
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")  # a commit is on the disk
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == SCHEMA_VERSION:
            return
        if version:
            raise sqlite3.DatabaseError(f"the index is of version {version}, and version {SCHEMA_VERSION} is read")
        self._connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        """Let go of the database."""
        with self._changing, self._reading:
            self._connection.close()
            self._reader.close()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody else changes the index or moves files meanwhile; what is done is done whole or not at all."""
        with self._changing:
            self._connection.execute("BEGIN IMMEDIATE")
            self._stamp = time.time_ns() // 1000
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    # ---- what only `changing` may do -------------------------------------------------------------------------

    def add(self, row: Row) -> None:
        """A page is there now; as of another that ends the same prefix, the first one stays."""
        values = *row[:8], self._stamp - row.depth, row.inline
        self._connection.execute("INSERT OR IGNORE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def has(self, digest: bytes, group: int) -> bool:
        """Whether a page is there."""
        found = self._connection.execute("SELECT 1 FROM pages WHERE digest=? AND grp=?", (digest, group))
        return found.fetchone() is not None

    def names_file(self, name: str) -> bool:
        """Whether some page has this file."""
        return self._connection.execute("SELECT 1 FROM pages WHERE name=?", (name,)).fetchone() is not None

    def remove(self, row: Row) -> bool:
        """Forget a page, if it is still that one; returns whether it was."""
        what = row.digest, row.group, row.name
        return self._connection.execute("DELETE FROM pages WHERE digest=? AND grp=? AND name=?", what).rowcount > 0

    def touch(self, pages: Sequence[StoredPage]) -> None:
        """Pages were used, and with them all that they continue: no page leaves before what continues it."""
        ours = {page.digest for page in pages}
        for digest in {page.parent for page in pages} - ours:
            query = f"UPDATE pages SET used = ? - depth WHERE digest IN ({ANCESTORS})"
            self._connection.execute(query, (self._stamp, digest))
        values = [(self._stamp - page.depth, page.digest) for page in pages]
        self._connection.executemany("UPDATE pages SET used=? WHERE digest=?", values)

    def oldest(self, num_bytes: int) -> list[Row]:
        """The pages that were not used for the longest time, of at least this many bytes together."""
        rows, total = [], 0
        for values in self._connection.execute(f"SELECT {COLUMNS} FROM pages ORDER BY used, depth DESC"):
            if total >= num_bytes:
                break
            rows.append(Row(*values))
            total += rows[-1].num_bytes
        return rows

    def num_bytes(self) -> int:
        """Of all pages."""
        return self._connection.execute("SELECT COALESCE(SUM(bytes), 0) FROM pages").fetchone()[0]

    # ---- reading ---------------------------------------------------------------------------------------------

    def find(self, digests: Iterable[bytes]) -> set[PageKey]:
        """Which pages that end some prefixes are there."""
        return {PageKey(*values) for values in self._select("digest, grp", digests)}

    def rows(self, digests: Iterable[bytes]) -> dict[PageKey, Row]:
        """The pages that end some prefixes."""
        return {PageKey(*values[:2]): Row(*values) for values in self._select(f"{COLUMNS}, inline", digests)}

    def _select(self, columns: str, digests: Iterable[bytes]) -> Iterator[tuple]:
        for some in itertools.batched(dict.fromkeys(digests), AT_ONCE):
            query = f"SELECT {columns} FROM pages WHERE digest IN ({', '.join('?' * len(some))})"
            with self._reading:
                rows = self._reader.execute(query, some).fetchall()
            yield from rows

    def beginning(self, parent: bytes, tokens: bytes) -> bytes | None:
        """The tokens of a page that continues a prefix, and begins with some tokens."""
        query = "SELECT tokens FROM pages WHERE parent=? AND tokens>=? ORDER BY tokens LIMIT 1"
        with self._reading:
            found = self._reader.execute(query, (parent, tokens)).fetchone()
        return found[0] if found is not None and found[0].startswith(tokens) else None

    def all(self) -> list[Row]:
        """All pages, the oldest first, without their bytes."""
        with self._reading:
            rows = self._reader.execute(f"SELECT {COLUMNS} FROM pages ORDER BY used, depth DESC").fetchall()
        return [Row(*values) for values in rows]

    def num_inline(self) -> int:
        """Pages that have no file."""
        with self._reading:
            return self._reader.execute("SELECT COUNT(*) FROM pages WHERE inline IS NOT NULL").fetchone()[0]

    def names(self) -> set[str]:
        """Of all files."""
        with self._reading:
            return {name for (name,) in self._reader.execute("SELECT name FROM pages WHERE inline IS NULL")}


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
