"""The prefix cache: prompts that begin alike share the pages of their common beginning.

    match = cache.lookup(prompt)                # what is cached of it; changes nothing
    taken = cache.take(match)                   # the request is admitted: its pages are pinned
    ...                                         # attach them to a row, compute the rest, publish the row's pages
    drops = cache.insert(tokens, namespace, handles)
    drops = cache.give_back(taken)              # the row has ended
    drops = cache.evict([20])                   # pages run short

It lives on the host and never reads the device. Each page that it knows carries one reference in the page tables, which
the cache owns; what it returns as `Pages` are references that the caller drops (`PageTables.drop_pages`), when it likes:
a page that a row still holds stays until that row releases it.

A node of its tree is one page of tokens, with a page id for each group of layers. Layers that see everything have a page
in every node. Layers with a window have pages only where a prefix was published: those that the next token sees. So a
prefix can be continued after k tokens if the window before k is there, and the cache tells where windows are worth
publishing (`Match.parts_at`) and drops those that a longer prefix of the same branch has made useless.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.prefix.policies import LeastRecentlyUsed, Policy
from paged_jax.prefix.tree import TOKEN_BYTES, Namespace, Node, Root, encode, walk

Tokens = Sequence[int] | np.ndarray
Pages = list[list[int]]
"""For each group of layers the pages of which one reference each is to be dropped; a page may stand there twice."""


class Published(Protocol):
    """What the cache reads of a `PageHandle` that was brought to the host."""

    pages: np.ndarray  # [M]
    num_tokens: np.ndarray
    first_column: np.ndarray


@dataclasses.dataclass(frozen=True)
class Match:
    """What is cached of a prompt.

    Args:
        num_tokens: of the longest prefix that can be continued; fewer than the prompt has. The page of its last tokens
            may hold others after them: it is shared, and copied when a row appends.
        num_known: of the longest prefix whose tokens are cached; above `num_tokens` where windows are missing.
        parts_at: after how many tokens the row should publish its pages, so that the next prompt that begins like this
            one finds them; 0 where there is no need.
        num_evictable: [G], pages of the match that count as evictable until they are taken.
        num_asked: tokens of the prompt.
        nodes: pages of tokens up to `num_tokens`.
        fork: where the prompt parts from what is cached.
    """

    num_tokens: int
    num_known: int
    parts_at: int
    num_evictable: tuple[int, ...]
    num_asked: int
    nodes: tuple[Node, ...] = dataclasses.field(repr=False)
    fork: Node | None = dataclasses.field(repr=False)


@dataclasses.dataclass(eq=False)
class Taken:
    """Pages that a row uses, pinned until they are given back.

    Args:
        num_tokens: that they hold, 0 where nothing was found.
        pages: [G, M], page ids, 0 outside the mapped columns.
        first_columns: [G], the first mapped column of each group.
        nodes: what is pinned.
        is_over: whether they were given back.
    """

    num_tokens: int
    pages: np.ndarray
    first_columns: np.ndarray
    nodes: dict[Node, None] = dataclasses.field(default_factory=dict, repr=False)
    is_over: bool = False


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the cache did so far, each request counted once, and what it holds."""

    requests: int
    asked_tokens: int  # of their prompts
    hit_tokens: int
    evicted_pages: tuple[int, ...]  # [G]
    num_branches: int  # prefixes that nothing continues
    pages_per_branch: tuple[float, ...]  # [G]


class PrefixCache:
    """Which pages hold which tokens, for every group of layers. It lives on the host and changes in place.

    Args:
        config: sizes of the cache whose pages it knows.
        policy: makes the eviction policy of a group; see `paged_jax.prefix.policies`.
        max_pages: [G], the most pages that it keeps in each group; None: as many as there are.
        max_kept_pages: the most pages, of the layers that see everything, that `keep` pins.

    Example:
        >>> cache = PrefixCache(CacheConfig(1, 1, 64, num_pages=8, max_sequences=1, max_pages_per_sequence=4, page_size=2))
        >>> tables, handles = tables.publish(0, 5)
        >>> cache.insert([1, 2, 3, 4, 5], Namespace(), jax.device_get(handles))
        [[]]
        >>> cache.lookup([1, 2, 3, 4, 5, 6]).num_tokens, cache.lookup([1, 2, 3, 9]).num_tokens
        (5, 3)
    """

    def __init__(
        self,
        config: CacheConfig,
        policy: Callable[[], Policy] = LeastRecentlyUsed,
        max_pages: Sequence[int] | None = None,
        max_kept_pages: int = 0,
    ):
        self._page_size = config.page_size
        self._num_columns = config.max_pages_per_sequence
        self._windows = tuple(group.window for group in config.groups)
        if max_pages is not None and len(max_pages) != len(self._windows):
            raise ValueError(f"max_pages={list(max_pages)}: give one number for each of {len(self._windows)} groups")
        self._max_pages = max_pages
        self._max_kept_pages = max_kept_pages
        self._new_policy = policy
        self._roots: dict[Namespace, Root] = {}
        self._policies = [policy() for _ in self._windows]
        self._num_pages = [0] * len(self._windows)
        self._num_evictable = [0] * len(self._windows)
        self._retired: dict[Node, None] = {}  # left the tree while pinned
        self._kept: dict[Taken, None] = {}
        self._requests = self._asked_tokens = self._hit_tokens = 0
        self._evicted_pages = [0] * len(self._windows)

    # ---- what is cached --------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> tuple[int, ...]:
        """References that the cache owns in each group; [G]."""
        return tuple(self._num_pages)

    @property
    def num_evictable(self) -> tuple[int, ...]:
        """Pages of each group that `evict` could give up now; [G]."""
        return tuple(self._num_evictable)

    @property
    def num_kept_pages(self) -> int:
        """Pages, of the layers that see everything, that `keep` has pinned; where prefixes overlap once for each."""
        return sum(len(kept.nodes) for kept in self._kept)

    def pages(self) -> list[np.ndarray]:
        """The pages of each group that the cache owns a reference to; [G]."""
        nodes = [*self._nodes(), *self._retired]
        held = ([node.pages[group] for node in nodes if node.pages[group]] for group in self._groups)
        return [np.array(ids, np.int32) for ids in held]

    @property
    def statistics(self) -> Statistics:
        """What was done so far."""
        num_branches = sum(not node.num_children for node in self._nodes())
        return Statistics(
            self._requests,
            self._asked_tokens,
            self._hit_tokens,
            tuple(self._evicted_pages),
            num_branches,
            tuple(num / max(num_branches, 1) for num in self._num_pages),
        )

    # ---- requests --------------------------------------------------------------------------------------------

    def lookup(self, tokens: Tokens, namespace: Namespace = Namespace()) -> Match:  # noqa: B008  immutable
        """What is cached of a prompt, without its last token, which is left to compute; changes nothing.

        Raises:
            ValueError: tokens that are no list of whole numbers.
        """
        data = encode(tokens)
        return self._match(data[: max(len(data) - TOKEN_BYTES, 0)], namespace, num_asked=len(data) // TOKEN_BYTES)

    def take(self, match: Match, counted: bool = True) -> Taken:
        """Admit the request of a lookup: pin the pages that it found, count the use.

        Args:
            match: what was found.
            counted: False for a request that comes back, whose prompt was counted before.

        Returns:
            The pages to attach. Give them back exactly once, also where there are none.

        Raises:
            ValueError: the cache has lost some of the pages since the lookup.
        """
        if not self._is_whole(match.nodes, match.num_tokens):
            raise ValueError(
                f"the cache has lost some of the {match.num_tokens} tokens of this match since the lookup: look the "
                "prompt up again (take what was found before anything is evicted or inserted)"
            )
        taken = self._take(match.nodes, match.num_tokens)
        if match.fork is not None:
            match.fork.is_fork = True
        if counted:
            self._requests += 1
            self._asked_tokens += match.num_asked
            self._hit_tokens += match.num_tokens
            for group, nodes in enumerate(self._seen(match.nodes, match.num_tokens)):
                for node in reversed(nodes):
                    self._policies[group].hit(node)
        return taken

    def give_back(self, taken: Taken) -> Pages:
        """The row has ended, or gave its pages up: unpin them.

        Returns:
            Those that were superseded or cleared while they were pinned.

        Raises:
            ValueError: they were given back before.
        """
        if taken.is_over:
            raise ValueError(f"these {taken.num_tokens} tokens were given back before: each is given back exactly once")
        taken.is_over = True
        self._kept.pop(taken, None)
        drops = self._no_pages()
        self._unpin(taken, drops)
        self._evict_to_cap(drops)
        return drops

    def insert(
        self, tokens: Tokens, namespace: Namespace, handles: Sequence[Published], taken: Taken | None = None
    ) -> Pages:
        """Cache the pages of one publication, and take over its references.

        Args:
            tokens: what the row holds, from its first token on; the handles may be to fewer.
            namespace: only prompts of the same will find them.
            handles: of `PageTables.publish`, one for each group, on the host; to no tokens where it was refused.
            taken: of a row that goes on holding these pages; they are pinned until it is given back.

        Returns:
            References that the cache has no use for: pages of tokens that it holds already, windows that a longer prefix
            has superseded, and what exceeds `max_pages`.

        Raises:
            ValueError: fewer tokens than the handles are to, or another number of handles than groups.
        """
        if len(handles) != len(self._windows):
            raise ValueError(f"{len(handles)} handles for {len(self._windows)} groups of layers: give one for each")
        data, num_tokens = encode(tokens), int(handles[0].num_tokens)
        if len(data) < num_tokens * TOKEN_BYTES:
            raise ValueError(
                f"the handles are to {num_tokens} tokens, but {len(data) // TOKEN_BYTES} tokens were given"
            )
        drops = self._no_pages()
        if num_tokens == 0:
            return drops
        path = self._grow(data[: num_tokens * TOKEN_BYTES], namespace, drops)
        self._store(path, num_tokens, handles, drops)
        self._supersede(path, num_tokens, drops)
        if taken is not None:
            self._pin(path, taken)
        self._prune(path[-1])
        self._evict_to_cap(drops)
        return drops

    def evict(self, num_pages: Sequence[int]) -> Pages:
        """Forget pages that no row uses, continuations before what they continue.

        Args:
            num_pages: [G], how many of each group; fewer go if there are not so many, more of a group with a window
                where pages of another group take them along.
        """
        drops = self._no_pages()
        for group in self._groups:
            has_window = self._windows[group] is not None

            def can_go(node: Node, has_window: bool = has_window) -> bool:
                return node.num_pins == 0 and (has_window or node.num_children == 0)

            while len(drops[group]) < num_pages[group] and self._num_evictable[group]:
                node = self._policies[group].victim(can_go)
                self._drop_page(node, group, drops)
                if has_window:
                    self._prune(node)
                else:
                    self._remove(node, drops)
        for group, dropped in enumerate(drops):
            self._evicted_pages[group] += len(dropped)
        return drops

    def clear(self) -> Pages:
        """Forget everything, for instance because the weights changed: nothing of it is found any more.

        Returns:
            All pages that no row uses. The others are returned when they are given back.
        """
        drops = self._no_pages()
        for kept in self._kept:
            self._unpin(kept, drops)
        self._kept.clear()
        for node in list(self._nodes()):
            node.is_cached = False
            if node.num_pins:
                self._retired[node] = None
            else:
                self._drop_all(node, drops)
        self._roots.clear()
        self._policies = [self._new_policy() for _ in self._windows]
        self._num_evictable = [0] * len(self._windows)
        return drops

    def keep(self, tokens: Tokens, namespace: Namespace = Namespace()) -> Taken:  # noqa: B008  immutable
        """Pin what is cached of some tokens, until it is given back or everything is cleared.

        Returns:
            What was pinned: fewer tokens where `max_kept_pages` leaves no room.
        """
        room = max(self._max_kept_pages - self.num_kept_pages, 0) * self._page_size
        match = self._match(encode(tokens)[: room * TOKEN_BYTES], namespace, num_asked=0)
        kept = self._take(match.nodes, match.num_tokens)
        self._kept[kept] = None
        return kept

    # ---- matching --------------------------------------------------------------------------------------------

    @property
    def _groups(self) -> range:
        return range(len(self._windows))

    def _no_pages(self) -> Pages:
        return [[] for _ in self._windows]

    def _nodes(self) -> Iterable[Node]:
        for root in self._roots.values():
            yield from root.subtree()

    def _first_seen(self, num_tokens: int, group: int) -> int:
        """The first column that the token after `num_tokens` sees."""
        window = self._windows[group]
        return 0 if window is None else max(num_tokens - window + 1, 0) // self._page_size

    def _seen(self, nodes: Sequence[Node], num_tokens: int) -> list[Sequence[Node]]:
        """For each group the nodes that the token after `num_tokens` sees."""
        stop = -(-num_tokens // self._page_size)
        return [nodes[self._first_seen(num_tokens, group) : stop] for group in self._groups]

    def _is_whole(self, nodes: Sequence[Node], num_tokens: int) -> bool:
        """Whether all that the token after `num_tokens` sees is cached."""
        seen = self._seen(nodes, num_tokens)
        return all(node.is_cached for node in nodes) and all(
            node.pages[group] for group in self._groups for node in seen[group]
        )

    def _match(self, data: bytes, namespace: Namespace, num_asked: int) -> Match:
        root = self._roots.get(namespace)
        path, num_known = walk(root, data, self._page_size) if root else ([], 0)
        num_tokens = self._longest(path, num_known)
        nodes = tuple(path[: -(-num_tokens // self._page_size)])
        whole = num_known // self._page_size
        is_end = (
            bool(path) and not path[-1].num_children and num_known == (len(path) - 1) * self._page_size + len(path[-1])
        )
        evictable = [sum(node.num_pins == 0 and node.pages[group] != 0 for node in nodes) for group in self._groups]
        return Match(
            num_tokens,
            num_known,
            whole * self._page_size if whole * self._page_size > num_tokens else 0,
            tuple(evictable),
            num_asked,
            nodes,
            path[whole - 1] if whole and not is_end else None,
        )

    def _longest(self, path: list[Node], num_known: int) -> int:
        """The most of some known tokens after which a row can continue."""
        first = [self._first_of_run(path, group) for group in self._groups]
        for column in range(len(path) - 1, -1, -1):
            num_tokens = min((column + 1) * self._page_size, num_known)
            seen = [self._first_seen(num_tokens, group) for group in self._groups]
            if all(seen[group] > column or first[group][column] <= seen[group] for group in self._groups):
                return num_tokens
        return 0

    def _first_of_run(self, path: list[Node], group: int) -> list[int]:
        """For each column the first of the unbroken run of cached pages that ends with it; the next column if none does."""
        first, start = [], 0
        for column, node in enumerate(path):
            if not node.pages[group]:
                start = column + 1
            first.append(start)
        return first

    def _take(self, nodes: Sequence[Node], num_tokens: int) -> Taken:
        pages = np.zeros((len(self._windows), self._num_columns), np.int32)
        first_columns = np.zeros(len(self._windows), np.int32)
        for group, seen in enumerate(self._seen(nodes, num_tokens)):
            first = first_columns[group] = self._first_seen(num_tokens, group)
            pages[group, first : first + len(seen)] = [node.pages[group] for node in seen]
        taken = Taken(num_tokens, pages, first_columns)
        self._pin(nodes, taken)
        return taken

    # ---- pages -----------------------------------------------------------------------------------------------

    def _pin(self, nodes: Sequence[Node], taken: Taken) -> None:
        for node in nodes:
            if node not in taken.nodes:
                taken.nodes[node] = None
                node.num_pins += 1
                if node.num_pins == 1:
                    self._count_evictable(node, -1)

    def _unpin(self, taken: Taken, drops: Pages) -> None:
        for node in reversed(taken.nodes):
            node.num_pins -= 1
            if node.num_pins == 0 and not node.is_cached:
                del self._retired[node]
                self._drop_all(node, drops)
            elif node.num_pins == 0:
                self._count_evictable(node, 1)
                for group in node.superseded:
                    self._policies[group].remove(node)
                    self._drop_page(node, group, drops)
                node.superseded = frozenset()
                self._prune(node)
        taken.nodes.clear()

    def _count_evictable(self, node: Node, sign: int) -> None:
        for group in self._groups:
            self._num_evictable[group] += sign * (node.pages[group] != 0)

    def _grow(self, data: bytes, namespace: Namespace, drops: Pages) -> list[Node]:
        """The nodes of some tokens, made where they are missing."""
        root = self._roots.setdefault(namespace, Root(namespace, len(self._windows)))
        width = self._page_size * TOKEN_BYTES
        path: list[Node] = [root]
        for at in range(0, len(data), width):
            chunk = data[at : at + width]
            node = path[-1].child(chunk) or (path[-1].extension(chunk) if len(chunk) < width else None)
            if node is None:
                shorter = path[-1].beginning(chunk)
                node = path[-1].add(chunk)
                if shorter is not None:
                    self._forget(shorter, drops)
            path.append(node)
        return path[1:]

    def _store(self, path: list[Node], num_tokens: int, handles: Sequence[Published], drops: Pages) -> None:
        """Put the pages of a publication into the nodes that have none yet, last page first."""
        num_in_last = num_tokens - (len(path) - 1) * self._page_size
        for group, handle in enumerate(handles):
            ids = np.asarray(handle.pages).tolist()
            for column in range(len(path) - 1, int(handle.first_column) - 1, -1):
                node, page = path[column], ids[column]
                is_partial = column == len(path) - 1 and len(node) > num_in_last
                if node.pages[group]:
                    drops[group].append(page)
                    self._policies[group].touch(node)
                    node.superseded -= {group}
                elif is_partial:
                    drops[group].append(page)  # the node's tokens go on, the page ends before
                else:
                    node.pages[group] = page
                    self._policies[group].insert(node)
                    self._num_pages[group] += 1
                    self._num_evictable[group] += node.num_pins == 0

    def _supersede(self, path: list[Node], num_tokens: int, drops: Pages) -> None:
        """Drop the windows of a branch that ends here now, but for those at its forks."""
        for group in self._groups:
            if self._windows[group] is None:
                continue
            first_needed = self._first_seen(num_tokens, group)
            for column in range(len(path) - 1, -1, -1):
                node = path[column]
                if column < len(path) - 1 and (node.is_fork or node.num_children > 1):
                    first_needed = min(first_needed, self._first_seen((column + 1) * self._page_size, group))
                if column >= first_needed or not node.pages[group]:
                    continue
                if node.num_pins:
                    node.superseded |= {group}
                else:
                    self._policies[group].remove(node)
                    self._drop_page(node, group, drops)

    def _drop_page(self, node: Node, group: int, drops: Pages) -> None:
        """Give up the page of a node that nobody uses; its policy has forgotten it."""
        drops[group].append(node.pages[group])
        node.pages[group] = 0
        self._num_pages[group] -= 1
        self._num_evictable[group] -= 1

    def _drop_all(self, node: Node, drops: Pages) -> None:
        """Give up the pages of a node that is out of the tree, where they are not counted as evictable."""
        for group, page in enumerate(node.pages):
            if page:
                drops[group].append(page)
                self._num_pages[group] -= 1

    def _forget(self, node: Node, drops: Pages) -> None:
        """Take a node without continuation out of the tree, with its pages; pinned ones stay until they are given back."""
        for group, page in enumerate(node.pages):
            if page:
                self._policies[group].remove(node)
        if node.num_pins:
            self._retired[node] = None
        else:
            self._count_evictable(node, -1)
            self._drop_all(node, drops)
        node.leave()

    def _remove(self, node: Node, drops: Pages) -> None:
        """Take out a node that nobody uses, and what it alone continued."""
        parent = node.parent
        self._forget(node, drops)
        self._prune(parent)

    def _prune(self, node: Node | None) -> None:
        """Take out a node that holds no page and that nothing continues, and those before it, if they are the same."""
        while node is not None and not (any(node.pages) or node.num_children or node.num_pins) and node.is_cached:
            parent = node.parent
            node.leave()
            if isinstance(node, Root):
                del self._roots[node.namespace]
            node = parent

    def _evict_to_cap(self, drops: Pages) -> None:
        if self._max_pages is not None:
            over = [max(held - most, 0) for held, most in zip(self._num_pages, self._max_pages, strict=True)]
            if any(over):
                for dropped, more in zip(drops, self.evict(over), strict=True):
                    dropped += more
