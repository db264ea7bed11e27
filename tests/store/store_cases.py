"""What the tests of the store share: pages whose every part follows from a number, and what may be read of them."""

from paged_jax.prefix.digests import Namespace, chain
from paged_jax.store import PageStore, Store
from paged_jax.store.page_file import StoredPage

FINGERPRINT = b"f" * 32
SMALL, LARGE = 600, 9000  # bytes of a payload: one that stands in the index, one that has a file


def prefix(number: int, num_pages: int = 3, num_bytes: int = LARGE, salt: str = "") -> list[StoredPage]:
    """The pages of a prefix."""
    namespace = Namespace(salt, weights=FINGERPRINT.hex())
    data = b"".join((1000 * number + i).to_bytes(8, "big") for i in range(4 * num_pages))
    pages = []
    for depth, (parent, digest, tokens) in enumerate(chain(namespace, data, 32), 1):
        payload = bytes((number + depth + i) % 256 for i in range(256)) * (num_bytes // 256 + 1)
        shape = 1, 4, 1, num_bytes
        pages.append(StoredPage(digest, 0, depth, parent, FINGERPRINT, tokens, "int8", shape, payload[:num_bytes]))
    return pages


def read(store: PageStore, page: StoredPage) -> bytes | None:
    """The payload that a store has for a page; None: a miss."""
    (found,) = store.read([page]) if page.key in store.find([page]) else [None]
    return None if found is None else bytes(found.payload)


def check(store: PageStore, pages: list[StoredPage]) -> int:
    """Nothing wrong is read; returns how many pages are there."""
    payloads = [read(store, page) for page in pages]
    for page, payload in zip(pages, payloads, strict=True):
        assert payload is None or payload == page.payload
    return sum(payload is not None for payload in payloads)


def bytes_on_disk(store: Store) -> int:
    """Of the files of pages."""
    return sum(path.stat().st_size for path in (store.folder / "pages").iterdir())
