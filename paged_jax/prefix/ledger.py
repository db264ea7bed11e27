"""The references that a prefix cache owns: which pages of each group, which are pinned, and which one goes next."""

from collections.abc import Callable
from typing import Any, Literal

from paged_jax.prefix.policies import Policy
from paged_jax.prefix.tree import Node

Pages = list[list[int]]
"""For each group of layers the pages of which one reference each is to be dropped; a page may stand there twice."""


def make_policies(new_policy: Any, num_groups: int) -> list[Policy]:
    """A policy for each group of layers.

    Raises:
        ValueError: what was given makes none.
    """
    if not callable(new_policy):
        name = type(new_policy).__name__ if isinstance(new_policy, Policy) else "LeastRecentlyUsed"
        raise ValueError(
            f"each group of layers needs a policy of its own, got {new_policy!r}: pass a class, such as {name}"
        )
    policies: list[Any] = [new_policy() for _ in range(num_groups)]
    made = type(policies[0])
    for method in ("insert", "hit", "touch", "remove", "victim"):
        given = getattr(made, method, None)
        if given is None or (given is getattr(Policy, method) and method not in ("hit", "touch")):
            raise ValueError(
                f"the eviction policy {made.__name__} has no method {method}: derive it from Policy, and write it"
            )
    return policies


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
        self._policies = make_policies(new_policy, num_groups)
        self.retired: dict[Node, None] = {}  # left the tree while they were pinned
        self._new_policy = new_policy

    def hold(self, node: Node, group: int, page: int) -> None:
        """Take over a reference."""
        node.pages[group] = page
        self.tell(group, "insert", node)
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
            self.tell(group, "remove", node)
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
        """A row no longer uses a node's pages. With the last pin, drop those that nobody needs any more."""
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
        """Nobody needs this page any more: drop it, at once or when its last pin goes."""
        if node.num_pins:
            node.superseded |= {group}
        else:
            self.drop(node, group, drops)

    def retire(self, node: Node, drops: Pages) -> None:
        """A node leaves the tree: drop its pages, at once or when its last pin goes."""
        held = [group for group in self.groups if node.pages[group]]
        if not node.num_pins:
            for group in held:
                self.drop(node, group, drops)
            return
        for group in held:
            self.tell(group, "remove", node)
        self.retired[node] = None

    def retire_all(self, nodes: list[Node], drops: Pages) -> None:
        """All nodes leave the tree at once."""
        for node in nodes:
            if node.num_pins:
                self.retired[node] = None
            else:
                self._drop_retired(node, drops)
        self.num_evictable = [0 for _ in self.groups]
        self._policies = make_policies(self._new_policy, len(self.groups))

    def tell(self, group: int, event: Literal["insert", "hit", "touch", "remove"], node: Node) -> None:
        """Call a method of a group's policy."""
        policy = self._policies[group]
        try:
            getattr(policy, event)(node)
        except Exception as error:
            error.add_note(f"This came from the eviction policy {type(policy).__name__}, in its method {event}.")
            raise

    def choose(self, group: int, can_go: Callable[[Node], bool]) -> Node:
        """The page of a group that goes next.

        Raises:
            ValueError: its policy chose none, or one that is not there or may not go.
        """
        policy = self._policies[group]
        try:
            node = policy.victim(can_go)
        except Exception as error:
            error.add_note(
                f"This came from the eviction policy {type(policy).__name__}, in its method victim. One of the pages "
                f"that it was told of may go: it must return the first of its nodes of which can_go is true."
            )
            raise
        if not isinstance(node, Node) or not node.pages[group]:
            what = "a page that is not cached" if isinstance(node, Node) else repr(node)
            raise ValueError(
                f"the eviction policy {type(policy).__name__} chose {what}: victim must return a node that was "
                "inserted and not removed since, and forget it"
            )
        if not can_go(node):
            raise ValueError(
                f"the eviction policy {type(policy).__name__} chose a page that a row uses, or that something cached "
                "continues: victim must return a node of which can_go is true"
            )
        return node

    def _drop_retired(self, node: Node, drops: Pages) -> None:
        for group, page in enumerate(node.pages):
            if page:
                drops[group].append(page)
                self.num_pages[group] -= 1

    def _count_evictable(self, node: Node, sign: int) -> None:
        for group in self.groups:
            self.num_evictable[group] += sign * (node.pages[group] != 0)
