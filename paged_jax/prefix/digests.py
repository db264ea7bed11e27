"""Digests of prefixes: two are equal only if everything is equal on which the pages of the prefixes depend.

The digest of a page is computed from its tokens and from the digest of the page before it. That of the first page is
computed from the namespace: the salt, the adapter and the weights. Every part is preceded by a tag and by its length,
so that no two different inputs are written as the same bytes. Digests are BLAKE2b (RFC 7693), of 32 bytes.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

DIGEST_BYTES = 32


class Namespace(NamedTuple):
    """What must be equal, besides the tokens, for a page to be found. Pages of different namespaces never match.

    Args:
        salt: any text that keeps tenants apart, so that none can find out what others have asked.
        adapter: the name of the adapter with which the weights were changed, if any.
        weights: a version of the weights, or the name by which they are known outside of this process.
    """

    salt: str = ""
    adapter: str = ""
    weights: int | str = 0

    def digest(self) -> bytes:
        """The digest of the prefix without tokens."""
        kind = "number" if isinstance(self.weights, int) else "name"
        parts = [part.encode() for part in (self.salt, self.adapter, kind, str(self.weights))]
        return _digest(b"namespace", *parts)


def page_digest(parent: bytes, tokens: bytes) -> bytes:
    """The digest of a page, from that of the page before it and from its tokens."""
    return _digest(b"page", parent, tokens)


def chain(namespace: Namespace, data: bytes, page_bytes: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    """For each page of some tokens: the digest of what it continues, its own digest, and its tokens.

    The last page may have fewer tokens than the others.

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
