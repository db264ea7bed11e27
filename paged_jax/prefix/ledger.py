"""The references that a prefix cache owns: which pages of each group, which of them are pinned, which goes next."""

from collections.abc import Callable

from paged_jax.prefix.policies import Policy
from paged_jax.prefix.tree import Node

Pages = list[list[int]]
"""For each group of layers the pages of which one reference each is to be dropped; a page may stand there twice."""


class Ledger:
    """Counts the pages of all nodes, and tells the policy of each group what happens to them.

    Args:
        new_policy: makes the policy of a group.
        num_groups: G.
    """

    def __init__(self, new_policy: Callable[[], Policy], num_groups: int):
        self.groups = range(num_groups)
        self.num_pages = [0] * num_groups  # references that the cache owns
        self.num_evictable = [0] * num_groups  # of these, in the tree and not pinned
        self.policies = [new_policy() for _ in self.groups]
        self.retired: dict[Node, None] = {}  # left the tree while they were pinned
        self._new_policy = new_policy

    def hold(self, node: Node, group: int, page: int) -> None:
        """Take over a reference."""
        node.pages[group] = page
        self.policies[group].insert(node)
        self.num_pages[group] += 1
        self.num_evictable[group] += node.num_pins == 0

    def drop(self, node: Node, group: int, drops: Pages, is_chosen: bool = False) -> None:
        """Give up a page of a node in the tree that is not pinned.

        Args:
            node: whose page.
            group: which one.
            drops: where it is added.
            is_chosen: whether its policy chose it, and so has forgotten it.
        """
        if not is_chosen:
            self.policies[group].remove(node)
        drops[group].append(node.pages[group])
        node.pages[group] = 0
        self.num_pages[group] -= 1
        self.num_evictable[group] -= 1

    def pin(self, node: Node) -> None:
        """A row uses a node's pages."""
        node.num_pins += 1
        if node.num_pins == 1:
            self._count_evictable(node, -1)

    def unpin(self, node: Node, drops: Pages) -> None:
        """A row no longer uses a node's pages; those that are of no more use are dropped with the last pin."""
        node.num_pins -= 1
        if node.num_pins:
            return
        if node in self.retired:
            del self.retired[node]
            self._drop_retired(node, drops)
            return
        self._count_evictable(node, 1)
        for group in node.superseded:
            self.drop(node, group, drops)
        node.superseded = frozenset()

    def supersede(self, node: Node, group: int, drops: Pages) -> None:
        """A page is of no more use: drop it, at once or with the last pin."""
        if node.num_pins:
            node.superseded |= {group}
        else:
            self.drop(node, group, drops)

    def retire(self, node: Node, drops: Pages) -> None:
        """A node leaves the tree: drop its pages, at once or with the last pin."""
        held = [group for group in self.groups if node.pages[group]]
        if not node.num_pins:
            for group in held:
                self.drop(node, group, drops)
            return
        for group in held:
            self.policies[group].remove(node)
        self.retired[node] = None

    def retire_all(self, nodes: list[Node], drops: Pages) -> None:
        """All nodes leave the tree at once."""
        for node in nodes:
            if node.num_pins:
                self.retired[node] = None
            else:
                self._drop_retired(node, drops)
        self.num_evictable = [0 for _ in self.groups]
        self.policies = [self._new_policy() for _ in self.groups]

    def _drop_retired(self, node: Node, drops: Pages) -> None:
        for group, page in enumerate(node.pages):
            if page:
                drops[group].append(page)
                self.num_pages[group] -= 1

    def _count_evictable(self, node: Node, sign: int) -> None:
        for group in self.groups:
            self.num_evictable[group] += sign * (node.pages[group] != 0)
