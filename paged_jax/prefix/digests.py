"""Names of prefixes: equal where everything is equal that the pages of a prefix depend on.

A digest covers the tokens of a page, and the digest of the page that it continues, and so on down to the namespace: the
salt, the adapter and the weights. What it is of is tagged, and every part has its length before it, so no two different
things are written alike. Digests are BLAKE2b (RFC 7693), 32 bytes.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

DIGEST_BYTES = 32


class Namespace(NamedTuple):
    """What must be equal, besides the tokens, for a page to be found; pages of different namespaces never match.

    Args:
        salt: keeps tenants apart, so that none can probe what others have asked.
        adapter: of the weights.
        weights: a version of the weights, or what they are known by outside of this process.
    """

    salt: str = ""
    adapter: str = ""
    weights: int | str = 0

    def digest(self) -> bytes:
        """Of the prefix without tokens."""
        kind = "number" if isinstance(self.weights, int) else "name"
        parts = [part.encode() for part in (self.salt, self.adapter, kind, str(self.weights))]
        return _digest(b"namespace", *parts)


def page_digest(parent: bytes, tokens: bytes) -> bytes:
    """Of a page, from that of what it continues and its tokens."""
    return _digest(b"page", parent, tokens)


def chain(namespace: Namespace, data: bytes, page_bytes: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    """For each page of some tokens: the digest of what it continues, its own, and its tokens; the last may be short.

    Args:
        namespace: of the tokens.
        data: the tokens, encoded.
        page_bytes: of the tokens of a page.
    """
    parent = namespace.digest()
    for at in range(0, len(data), page_bytes):
        tokens = data[at : at + page_bytes]
        digest = page_digest(parent, tokens)
        yield parent, digest, tokens
        parent = digest


def _digest(kind: bytes, *parts: bytes) -> bytes:
    hashed = blake2b(digest_size=DIGEST_BYTES, person=kind)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big"))
        hashed.update(part)
    return hashed.digest()
