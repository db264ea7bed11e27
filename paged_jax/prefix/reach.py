"""How far back the layers of each group see, and so after which tokens a cached prefix can be continued."""

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

from paged_jax.cache.config import CacheConfig
from paged_jax.prefix.tree import TOKEN_BYTES, Node


@runtime_checkable
class Held(Protocol):
    """A page of tokens, and what is had of it: for each group a page id, 0 where there is none."""

    pages: list[int]


AnyHeld = TypeVar("AnyHeld")


class Reach:
    """What the next token of a prefix sees in each group of layers.

    Args:
        config: of the cache.
    """

    def __init__(self, config: CacheConfig):
        self.page_size = config.page_size
        self.windows = tuple(group.window for group in config.groups)  # [G]; None: everything
        self.groups = range(len(self.windows))

    def num_columns(self, num_tokens: int) -> int:
        """Pages that this many tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.page_size)

    def first_seen(self, num_tokens: int, group: int) -> int:
        """The first column that the token after `num_tokens` sees."""
        window = self.windows[group]
        return 0 if window is None else max(num_tokens - window + 1, 0) // self.page_size

    def seen(self, nodes: Sequence[AnyHeld], num_tokens: int) -> list[Sequence[AnyHeld]]:
        """For each group the nodes of a prefix that the token after `num_tokens` sees."""
        stop = self.num_columns(num_tokens)
        return [nodes[self.first_seen(num_tokens, group) : stop] for group in self.groups]

    def longest(self, path: Sequence[Held], num_known: int) -> int:
        """The most of the known tokens of a path after which a row can continue."""
        first = [_first_of_run(path, group) for group in self.groups]
        for column in range(len(path) - 1, -1, -1):
            num_tokens = min((column + 1) * self.page_size, num_known)
            seen = [self.first_seen(num_tokens, group) for group in self.groups]
            if all(seen[group] > column or first[group][column] <= seen[group] for group in self.groups):
                return num_tokens
        return 0

    def continuable(
        self, path: Sequence[Node], num_known: int, data: bytes
    ) -> tuple[int, Sequence[Node], Sequence[Sequence[Node]]]:
        """The longest prefix after which a row can continue; its last page need not be one of the path.

        Of many pages that begin alike only the `MAX_COMPARED` closest are looked at, so it may be shorter there.

        Args:
            path: the nodes of the known tokens.
            num_known: how many tokens that are.
            data: the tokens, encoded.

        Returns:
            The number of tokens; their nodes, for the last tokens perhaps several; and for each group those that the
            next token sees.
        """
        num_tokens, page_size = self.longest(path, num_known), self.page_size
        for column in range(len(path) - 1, num_tokens // page_size - 1, -1):
            parent = path[column].parent
            assert parent is not None
            if parent.num_children == 1 or all(path[column].pages):
                continue
            # a group has no page of this node, but perhaps one of a sibling that begins with the same tokens
            width = page_size * TOKEN_BYTES
            last, num_in_last = parent.closest_held(data[column * width : (column + 1) * width])
            if last:
                num_parted = column * page_size + num_in_last
                seen = self.seen(path[:column], num_parted)
                if has_pages(seen):
                    seen = [[*before, node] for before, node in zip(seen, last, strict=True)]
                    return num_parted, [*path[:column], *dict.fromkeys(last)], seen
        nodes = path[: self.num_columns(num_tokens)]
        return num_tokens, nodes, self.seen(nodes, num_tokens)

    def is_useless(self, path: list[Node], num_tokens: int, group: int) -> list[bool]:
        """For each page of a prefix whether neither the token after it nor one that parts at a fork before sees it."""
        first_needed = self.first_seen(num_tokens, group)
        useless = [False] * len(path)
        for column in range(len(path) - 1, -1, -1):
            node = path[column]
            if column < len(path) - 1 and (node.is_fork or node.num_children > 1):
                first_needed = min(first_needed, self.first_seen((column + 1) * self.page_size, group))
            useless[column] = column < first_needed
        return useless


def has_pages(seen: Sequence[Sequence[Node]]) -> bool:
    """Whether each group has the pages of the nodes that it sees."""
    return all(node.pages[group] for group, nodes in enumerate(seen) for node in nodes)


def _first_of_run(path: Sequence[Held], group: int) -> list[int]:
    """For each column where the unbroken run of pages that ends with it begins; the next column where there is none."""
    first, start = [], 0
    for column, node in enumerate(path):
        if not node.pages[group]:
            start = column + 1
        first.append(start)
    return first
