"""Which cached page goes first when pages run short.

To write a policy, derive from `Policy`, keep an order of the nodes that you are told of, and pass the class to
`PrefixCache(config, policy=...)` or `Engine(..., eviction=...)`; `Policy` has an example. Each group of layers gets an
object of its own.

A page that something cached continues cannot go before its continuation. The calls for one request come from the last
page of its prefix to the first, so a policy that orders pages by the time of these calls gets that right by itself.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable

from paged_jax.prefix.tree import Node

__all__ = ["GreedyDualSizeFrequency", "LeastRecentlyUsed", "POLICIES", "Policy", "S3Fifo"]


class Policy:
    """Is told what happens to the cached pages of a group of layers, and says which page goes next.

    A page is a `Node`. Two nodes are equal only if they are the same object. `Node.fingerprint` is 16 bytes that depend
    on the tokens up to the page: if the same tokens are cached again later, the new node has the same fingerprint.

    `insert`, `remove` and `victim` must be there; `hit` and `touch` do nothing unless a policy overrides them.

    Examples:
        First in, first out:

        >>> class FirstInFirstOut(Policy):
        ...     def __init__(self):
        ...         self.order = {}  # a dict keeps the order of insertion
        ...
        ...     def insert(self, node):
        ...         self.order[node] = None
        ...
        ...     def remove(self, node):
        ...         del self.order[node]
        ...
        ...     def victim(self, can_go):
        ...         node = next(node for node in self.order if can_go(node))
        ...         del self.order[node]
        ...         return node
        >>> cache = PrefixCache(config, policy=FirstInFirstOut)
    """

    def insert(self, node: Node) -> None:
        """This page is cached from now on."""
        raise NotImplementedError

    def hit(self, node: Node) -> None:
        """A request uses this page; called once for each request."""

    def touch(self, node: Node) -> None:
        """A row has published tokens that begin with those of this page: it was still of use."""

    def remove(self, node: Node) -> None:
        """This page is no longer cached, although the policy did not choose it: forget it."""
        raise NotImplementedError

    def victim(self, can_go: Callable[[Node], bool]) -> Node:
        """Choose the page that goes next, and forget it: `remove` is not called for it.

        Args:
            can_go: whether a node may go: no row uses it, and nothing cached continues it. It is true of at least one.

        Returns:
            A node that was inserted, is still there, and of which `can_go` is true.
        """
        raise NotImplementedError


class LeastRecentlyUsed(Policy):
    """The page that was not used for the longest time goes first, and each page before the one that it continues.

    Each use moves the pages of a prefix to the end of the order, beginning with the last. So a page always stands
    before the page that it continues.

    Examples:
        >>> cache = PrefixCache(config, policy=LeastRecentlyUsed, max_pages=[2])
    """

    def __init__(self):
        self._order: OrderedDict[Node, None] = OrderedDict()

    def insert(self, node: Node) -> None:
        self._order[node] = None

    def hit(self, node: Node) -> None:
        self._order.move_to_end(node)

    def touch(self, node: Node) -> None:
        self._order.move_to_end(node)

    def remove(self, node: Node) -> None:
        del self._order[node]

    def victim(self, can_go: Callable[[Node], bool]) -> Node:
        while True:
            node, _ = self._order.popitem(last=False)
            if can_go(node):
                return node
            self._order[node] = None  # a row uses it now


class S3Fifo(Policy):
    """Three first-in-first-out queues, so that pages which are used once leave early.

    Pages enter a small queue. A page that is used while it stands there moves on to the main queue; the others leave,
    and their fingerprints (ghosts) are remembered for a while. A page that comes back while its ghost is remembered
    enters the main queue at once. At the end of the main queue, a page that was used goes round again.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.

    Examples:
        >>> cache = PrefixCache(config, policy=S3Fifo, max_pages=[2])
    """

    SMALL = 0.1  # of all pages, the small queue's share
    MAX_USES = 3  # that are counted
    PATIENCE = 32  # pages of the main queue in a row that may not go before the small queue is asked

    def __init__(self):
        self._small: OrderedDict[Node, int] = OrderedDict()  # uses since it entered
        self._main: OrderedDict[Node, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()  # fingerprints

    def insert(self, node: Node) -> None:
        if node.fingerprint in self._ghosts:
            del self._ghosts[node.fingerprint]
            self._main[node] = 0
        else:
            self._small[node] = 0

    def hit(self, node: Node) -> None:
        queue = self._small if node in self._small else self._main
        queue[node] = min(queue[node] + 1, self.MAX_USES)

    def remove(self, node: Node) -> None:
        del (self._small if node in self._small else self._main)[node]

    def victim(self, can_go: Callable[[Node], bool]) -> Node:
        num_refused = 0
        while True:
            is_large = len(self._small) > self.SMALL * (len(self._small) + len(self._main))
            if self._small and (is_large or not self._main or num_refused >= self.PATIENCE):
                node = self._leave_small(can_go)
            else:
                node = self._leave_main(can_go)
                num_refused += node is None
            if node is not None:
                return node

    def _leave_small(self, can_go: Callable[[Node], bool]) -> Node | None:
        node, num_uses = self._small.popitem(last=False)
        if num_uses or not can_go(node):
            self._main[node] = 0
            return None
        self._ghosts[node.fingerprint] = None
        while len(self._ghosts) > len(self._main) + len(self._small):
            self._ghosts.popitem(last=False)
        return node

    def _leave_main(self, can_go: Callable[[Node], bool]) -> Node | None:
        node, num_uses = self._main.popitem(last=False)
        if num_uses == 0 and can_go(node):
            return node
        self._main[node] = max(num_uses - 1, 0)
        return None


class GreedyDualSizeFrequency(Policy):
    """The page that was used least often goes first, but uses long ago count for less.

    The worth of a page is the number of its uses plus the clock at its last use; the clock is the worth of the last
    page that went. All pages have the same size and cost. Of pages of equal worth, the oldest goes first.

    Source: Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", 1998.

    Examples:
        >>> cache = PrefixCache(config, policy=GreedyDualSizeFrequency, max_pages=[2])
    """

    def __init__(self):
        self._clock = 0
        self._count = itertools.count()
        self._uses: dict[Node, int] = {}
        self._serial: dict[Node, int] = {}  # of a node's newest entry; older ones are void
        self._heap: list[tuple[int, int, Node]] = []  # worth, serial, node

    def insert(self, node: Node) -> None:
        self._uses[node] = 1
        self._push(node, self._clock + 1)

    def hit(self, node: Node) -> None:
        self._uses[node] += 1
        self.touch(node)

    def touch(self, node: Node) -> None:
        self._push(node, self._clock + self._uses[node])

    def remove(self, node: Node) -> None:
        del self._uses[node], self._serial[node]
        self._shrink()

    def victim(self, can_go: Callable[[Node], bool]) -> Node:
        while True:
            worth, serial, node = heapq.heappop(self._heap)
            if self._serial.get(node) != serial:
                continue
            if can_go(node):
                self._clock = worth
                self.remove(node)
                return node
            self._push(node, worth + self._uses[node])  # a row uses it now

    def _push(self, node: Node, worth: int) -> None:
        self._serial[node] = next(self._count)
        heapq.heappush(self._heap, (worth, self._serial[node], node))
        self._shrink()

    def _shrink(self) -> None:
        """Drop the void entries once they are more than the others."""
        if len(self._heap) > 2 * len(self._serial) + 64:
            self._heap = [entry for entry in self._heap if self._serial.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)


POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LeastRecentlyUsed,
    "s3-fifo": S3Fifo,
    "gdsf": GreedyDualSizeFrequency,
}
