"""A page as bytes that say what they are, and that tell when one of them is not what was written.

    magic, version, sizes, digests, dtype       the header
    tokens
    checksum of all that
    payload                                     keys, values, scales: `PageFormat`
    checksum of the payload

A checksum is a CRC-32, which finds every flip of up to 32 bits in a row, and costs a third of what a copy costs. It
guards against accidents: whoever can write to the folder can also write pages that pass.
"""

import dataclasses
import struct
import zlib
from hashlib import blake2b
from typing import NamedTuple

MAGIC = b"PagedKV\0"
VERSION = 1  # of this layout, and of that of the payload
_HEADER = struct.Struct("<8sHHI32s32s32s16s4IIQ")
_CHECKSUM = struct.Struct("<I")


class Damaged(Exception):
    """These bytes are not what was written, or not a page at all."""


class PageKey(NamedTuple):
    """A page of one group of layers: the digest of the prefix that it ends, and the group."""

    digest: bytes
    group: int


@dataclasses.dataclass(frozen=True)
class StoredPage:
    """A page of one group of layers, and all that it depends on.

    Args:
        digest: of the prefix that ends with it; see `paged_jax.prefix.digests`.
        group: of layers.
        depth: pages of the prefix.
        parent: the digest of what it continues.
        fingerprint: of the model and the sizes; see `fingerprint`.
        tokens: of the page, as the prefix cache encodes them.
        dtype: of the cache.
        shape: layers, slots, KV heads, head size.
        payload: the bytes of the page.
    """

    digest: bytes
    group: int
    depth: int
    parent: bytes
    fingerprint: bytes
    tokens: bytes
    dtype: str
    shape: tuple[int, int, int, int]
    payload: bytes | memoryview = dataclasses.field(repr=False)

    @property
    def key(self) -> PageKey:
        """What it is found by."""
        return PageKey(self.digest, self.group)

    def is_same_place(self, other: "StoredPage") -> bool:
        """Whether another page is one of the same prefix, model and sizes, whatever its payload."""
        return dataclasses.replace(self, payload=b"") == dataclasses.replace(other, payload=b"")


def pack(page: StoredPage) -> bytes:
    """The bytes of a file."""
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        page.group,
        page.depth,
        page.digest,
        page.parent,
        page.fingerprint,
        page.dtype.encode(),
        *page.shape,
        len(page.tokens),
        len(page.payload),
    )
    head += page.tokens
    payload = bytes(page.payload)
    return b"".join([head, _checksum(head), payload, _checksum(payload)])


def unpack(data: bytes | memoryview) -> StoredPage:
    """The page that bytes of a file hold.

    Args:
        data: the whole file.

    Raises:
        Damaged: they are not those of a file that `pack` made.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise Damaged(f"{len(view)} bytes are less than a header")
    magic, version, group, depth, digest, parent, fingerprint, dtype, *shape, num_tokens, num_payload = (
        _HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise Damaged("the file is no page")
    if version != VERSION:
        raise Damaged(f"the layout is version {version}, and version {VERSION} is read")
    start = _HEADER.size + num_tokens
    stop = start + _CHECKSUM.size + num_payload
    if len(view) != stop + _CHECKSUM.size:
        raise Damaged(f"the file has {len(view)} bytes where its header says {stop + _CHECKSUM.size}")
    if view[start : start + _CHECKSUM.size] != _checksum(view[:start]):
        raise Damaged("the checksum of the header differs")
    payload = view[start + _CHECKSUM.size : stop]
    if view[stop:] != _checksum(payload):
        raise Damaged("the checksum of the payload differs")
    tokens = bytes(view[_HEADER.size : start])
    sizes = tuple(shape)
    return StoredPage(digest, group, depth, parent, fingerprint, tokens, dtype.rstrip(b"\0").decode(), sizes, payload)


def content_name(data: bytes) -> str:
    """The name of a file with these bytes."""
    return blake2b(data, digest_size=16).hexdigest()


def _checksum(data: bytes | memoryview) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(data))
