"""The tokens of all cached prefixes as a tree: each node is one page of tokens that continues its parent's.

Plain Python on the host. The tokens themselves are compared, so nothing can collide; a lookup costs one dictionary
access a page.
"""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from paged_jax.prefix.digests import Namespace, page_digest

MAX_COMPARED = 16  # children in search of the one that begins alike
TOKEN_BYTES = 8  # tokens are stored big-endian at full width, so that bytes sort and compare as tokens do


class Node:
    """One page of cached tokens: S of them, or fewer at the end of what was cached.

    Args:
        tokens: as bytes; see `encode`.
        parent: whose tokens these continue; None: a namespace's root, which has no tokens.
        num_groups: G.
        fingerprint: of the namespace and all tokens up to here, see `digests`; equal again when these are cached again.
    """

    __slots__ = (
        "tokens",
        "parent",
        "fingerprint",
        "depth",
        "pages",
        "num_pins",
        "is_cached",
        "is_fork",
        "superseded",
        "_by_tokens",
        "_sorted",
    )

    def __init__(self, tokens: bytes, parent: "Node | None", num_groups: int, fingerprint: bytes):
        self.tokens = tokens
        self.parent = parent
        self.fingerprint = fingerprint
        self.depth = 0 if parent is None else parent.depth + 1  # pages up to this one
        self.pages = [0] * num_groups  # the page of each group that holds all of these tokens; 0: none is cached
        self.num_pins = 0
        self.is_cached = True  # False once it left the tree
        self.is_fork = False  # a prompt parted from the cached tokens right after this page
        self.superseded: frozenset[int] = frozenset()  # groups whose page goes when the last pin does
        self._by_tokens: dict[bytes, Node] = {}  # children
        self._sorted: list[bytes] = []  # their tokens

    def __len__(self) -> int:
        """Tokens of this page."""
        return len(self.tokens) // TOKEN_BYTES

    def __bool__(self) -> bool:
        return True

    @property
    def num_children(self) -> int:
        """Nodes that continue these tokens."""
        return len(self._sorted)

    @property
    def children(self) -> Iterator["Node"]:
        """Nodes that continue these tokens."""
        return iter(self._by_tokens.values())

    def child(self, tokens: bytes) -> "Node | None":
        """The child of exactly these tokens."""
        return self._by_tokens.get(tokens)

    def closest(self, tokens: bytes) -> tuple["Node | None", int]:
        """The child that begins with the most of these tokens, and how many; of some such the one with most pages."""
        return max(self._alike(tokens), key=lambda pair: (pair[1], -pair[0].pages.count(0)), default=(None, 0))

    def closest_held(self, tokens: bytes) -> tuple[list["Node"], int]:
        """The children whose pages hold the most of these tokens, one for each group of layers, and how many.

        It is the same child for all groups where one has all of the pages.
        """
        alike, groups = self._alike(tokens), range(len(self.pages))
        most = min(max((common for child, common in alike if child.pages[group]), default=0) for group in groups)
        if not most:
            return [], 0
        children = sorted((child for child, common in alike if common >= most), key=lambda child: child.pages.count(0))
        return [next(child for child in children if child.pages[group]) for group in groups], most

    def _alike(self, tokens: bytes) -> list[tuple["Node", int]]:
        """Children that begin with some of these tokens, and with how many; of more than MAX_COMPARED the closest."""
        at = bisect.bisect(self._sorted, tokens)
        # the next in this order share the longest beginning
        near = self._sorted[max(at - MAX_COMPARED // 2, 0) : at + MAX_COMPARED // 2]
        return [(self._by_tokens[key], common) for key in near if (common := num_common(key, tokens))]

    def extension(self, tokens: bytes) -> "Node | None":
        """A child that begins with all of these tokens."""
        at = bisect.bisect_left(self._sorted, tokens)
        if at < len(self._sorted) and self._sorted[at].startswith(tokens):
            return self._by_tokens[self._sorted[at]]
        return None

    def beginning(self, tokens: bytes) -> "Node | None":
        """The child whose tokens are a part of these, from the first on, but not all.

        There is at most one, and no child lies between the two in order: whatever extends a page takes its place.
        """
        at = bisect.bisect_left(self._sorted, tokens)
        if at and tokens.startswith(self._sorted[at - 1]):
            return self._by_tokens[self._sorted[at - 1]]
        return None

    def add(self, tokens: bytes) -> "Node":
        """A new child."""
        node = Node(tokens, self, len(self.pages), page_digest(self.fingerprint, tokens))
        self._by_tokens[tokens] = node
        bisect.insort(self._sorted, tokens)
        return node

    def leave(self) -> None:
        """Take this node out of the tree, with all that continues it."""
        self.is_cached = False
        if self.parent is not None:
            del self.parent._by_tokens[self.tokens]
            self.parent._sorted.pop(bisect.bisect_left(self.parent._sorted, self.tokens))

    def subtree(self) -> Iterator["Node"]:
        """All nodes below this one, parents before their children."""
        stack = list(self.children)
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children)


class Root(Node):
    """The parent of all first pages of a namespace."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: Namespace, num_groups: int):
        super().__init__(b"", None, num_groups, namespace.digest())
        self.namespace = namespace


def encode(tokens: Sequence[int] | np.ndarray) -> bytes:
    """Tokens as bytes.

    Raises:
        ValueError: they are no list of whole numbers.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"tokens must be a list of whole numbers, got shape {array.shape} of {array.dtype}")
    return array.astype(">i8").tobytes()


def num_common(a: bytes, b: bytes) -> int:
    """How many tokens two lists have in common, from the first on."""
    stop = min(len(a), len(b))
    if a[:stop] == b[:stop]:
        return stop // TOKEN_BYTES
    at = 0
    while a[at : at + TOKEN_BYTES] == b[at : at + TOKEN_BYTES]:
        at += TOKEN_BYTES
    return at // TOKEN_BYTES


def walk(root: Node, data: bytes, page_size: int) -> tuple[list[Node], int]:
    """Follow tokens through the tree.

    Args:
        root: of their namespace.
        data: the tokens, encoded.
        page_size: S.

    Returns:
        The nodes that hold them, and how many tokens that are; of the last node's tokens perhaps only some.
    """
    width = page_size * TOKEN_BYTES
    path: list[Node] = []
    at, node = 0, root
    while at < len(data):
        chunk = data[at : at + width]
        child = node.child(chunk)
        if child is None:
            child, common = node.closest(chunk)
            if child is not None:
                path.append(child)
            return path, at // TOKEN_BYTES + common
        path.append(child)
        at += len(chunk)
        node = child
    return path, at // TOKEN_BYTES
