"""The prefix cache: prompts that begin alike share the pages of their common beginning.

    match = cache.lookup(prompt)                # what is cached of it; changes nothing
    taken = cache.take(match)                   # the request is admitted: its pages are pinned
    ...                                         # attach them to a row, compute the rest, publish the row's pages
    drops = cache.insert(tokens, namespace, handles)
    drops = cache.give_back(taken)              # the row has ended
    drops = cache.evict([20])                   # pages run short

It lives on the host and never reads the device. For each page that it knows, it owns one reference in the page tables.
The `Pages` that its methods return are references that the caller must drop (`PageTables.drop_pages`), at any later
time. A page that a row still holds stays until that row releases it.

The cache is a tree. A node is one page of tokens, with a page id for each group of layers. Layers without a window have
a page in every node. Layers with a window have pages only in the nodes that the next token saw when a prefix was
published. So a prefix of k tokens can be continued only if the pages in the window before k are there. The cache says
where it is worth publishing one (`Match.parts_at`), and drops the pages of windows that a longer prefix of the same
branch has made useless.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.prefix.digests import Namespace
from paged_jax.prefix.ledger import Ledger, Pages
from paged_jax.prefix.policies import LeastRecentlyUsed, Policy
from paged_jax.prefix.reach import Reach, has_pages
from paged_jax.prefix.tree import TOKEN_BYTES, Node, Root, encode, walk

Tokens = Sequence[int] | np.ndarray


@runtime_checkable
class Published(Protocol):
    """What the cache reads of a `PageHandle` that was brought to the host."""

    @property
    def pages(self) -> Any: ...  # int32 [M]

    @property
    def num_tokens(self) -> Any: ...

    @property
    def first_column(self) -> Any: ...


@runtime_checkable
class Listener(Protocol):
    """Is told which pages are cached and evicted, for instance because it keeps copies elsewhere."""

    def cached(self, namespace: Namespace, node: Node, group: int) -> None:
        """A page is cached now, `node.pages[group]`."""

    def evicted(self, node: Node, group: int) -> None:
        """A page is about to be forgotten, because pages are short."""


@dataclasses.dataclass(frozen=True)
class Match:
    """What is cached of a prompt.

    Args:
        num_tokens: the length of the longest prefix that can be continued; fewer tokens than the prompt has. The page
            of its last tokens may hold others after them; a row that appends gets a copy of it.
        num_known: the length of the longest prefix whose tokens are cached; above `num_tokens` where the pages of a
            window are missing.
        parts_at: after how many tokens the row should publish its pages, so that the next prompt that begins like this
            one finds them; 0 where there is no need.
        num_evictable: [G], pages of the match that count as evictable until they are taken.
        num_asked: the length of the prompt.
        nodes: the pages of tokens up to `num_tokens`; for the last tokens perhaps several, for different groups.
        seen: [G], those of the nodes that the next token sees.
        path: the pages of tokens up to `num_known`.
        fork: the page after which the prompt parts from what is cached, if there is one.
    """

    num_tokens: int
    num_known: int
    parts_at: int
    num_evictable: tuple[int, ...]
    num_asked: int
    nodes: tuple[Node, ...] = dataclasses.field(repr=False)
    seen: tuple[tuple[Node, ...], ...] = dataclasses.field(repr=False)
    path: tuple[Node, ...] = dataclasses.field(repr=False)
    fork: Node | None = dataclasses.field(repr=False)


@dataclasses.dataclass(eq=False)
class Taken:
    """Pages that a row uses, pinned until they are given back.

    Args:
        num_tokens: how many tokens they hold; 0 where nothing was found.
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
    """Which pages hold which tokens, for every group of layers. An object on the host, which changes in place.

    Args:
        config: sizes of the cache whose pages it knows.
        policy: the class of the eviction policy, see `paged_jax.prefix.policies`; each group gets an object of it.
        max_pages: [G], the most pages that are kept in each group; None: as many as there are.
        max_kept_pages: the most pages of the layers without a window that `keep` may pin.

    Raises:
        ValueError: `policy` makes no eviction policies, or `max_pages` has not one number for each group.

    Examples:
        >>> config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=9, max_sequences=2,
        ...                      max_pages_per_sequence=4, page_size=2)
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([5, 0]))
        >>> tables, handles = tables.publish(0, 5)
        >>> cache = PrefixCache(config)
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
        self._reach = Reach(config)
        self._groups = self._reach.groups
        if max_pages is not None and len(max_pages) != len(self._groups):
            raise ValueError(f"max_pages={list(max_pages)}: give one number for each of {len(self._groups)} groups")
        self._num_columns = config.max_pages_per_sequence
        self._max_pages = max_pages
        self._max_kept_pages = max_kept_pages
        self._listener: Listener | None = None
        self._roots: dict[Namespace, Root] = {}
        self._ledger = Ledger(policy, len(self._groups))
        self._kept: dict[Taken, None] = {}
        self._requests = self._asked_tokens = self._hit_tokens = 0
        self._evicted_pages = [0 for _ in self._groups]

    def tell(self, listener: Listener) -> None:
        """Tell a listener which pages are cached from now on, and which are evicted."""
        self._listener = listener

    # ---- what is cached --------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> tuple[int, ...]:
        """References that the cache owns in each group; [G]."""
        return tuple(self._ledger.num_pages)

    @property
    def num_evictable(self) -> tuple[int, ...]:
        """Pages of each group that `evict` could give up now; [G]."""
        return tuple(self._ledger.num_evictable)

    @property
    def num_kept_pages(self) -> int:
        """Pages of the layers without a window that `keep` has pinned; each counts once for each prefix that has it."""
        return sum(len(kept.nodes) for kept in self._kept)

    def pages(self) -> list[np.ndarray]:
        """The pages of each group that the cache owns a reference to; [G]."""
        nodes = [*self._nodes(), *self._ledger.retired]
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
            tuple(num / max(num_branches, 1) for num in self._ledger.num_pages),
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
        """Admit the request whose prompt was looked up: pin the pages that were found, and count their use.

        Args:
            match: what was found.
            counted: False for a request that comes back, whose prompt was counted before.

        Returns:
            The pages to attach. Give them back exactly once, also where there are none.

        Raises:
            ValueError: the cache has lost some of the pages since the lookup.
        """
        if not (has_pages(match.seen) and all(node.is_cached for node in match.nodes)):
            raise ValueError(
                f"the cache has lost some of the {match.num_tokens} tokens of this match since the lookup: look the "
                "prompt up again (take what was found before anything is evicted or inserted)"
            )
        taken = self._take(match)
        if match.fork is not None:
            match.fork.is_fork = True
        if counted:
            self._requests += 1
            self._asked_tokens += match.num_asked
            self._hit_tokens += match.num_tokens
            for group, seen in enumerate(match.seen):
                for node in reversed(seen):
                    self._ledger.tell(group, "hit", node)
        return taken

    def give_back(self, taken: Taken) -> Pages:
        """The row has ended, or gave its pages up: unpin them.

        Returns:
            Pages that were superseded or cleared while they were pinned, to drop.

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
        self,
        tokens: Tokens,
        namespace: Namespace,
        handles: Sequence[Published],
        taken: Taken | None = None,
        is_fork: bool = False,
    ) -> Pages:
        """Cache the pages of one publication, and take over its references.

        Args:
            tokens: what the row holds, from its first token on; the handles may hold fewer of them.
            namespace: only prompts of the same namespace will find them.
            handles: what `PageTables.publish` made, one for each group, brought to the host; of 0 tokens where it was
                refused. A null page stands for one that this publication does not bring.
            taken: what a row took that goes on holding these pages; they are pinned until it is given back.
            is_fork: whether prompts part where the handles end. Then the pages of windows that end there stay, also
                when a longer prefix is cached.

        Returns:
            References that the cache has no use for: pages of tokens that it holds already, windows that a longer
            prefix has superseded, and what exceeds `max_pages`.

        Raises:
            ValueError: there are fewer tokens than the handles hold, or not one handle for each group.
        """
        if len(handles) != len(self._groups):
            raise ValueError(f"{len(handles)} handles for {len(self._groups)} groups of layers: give one for each")
        data, num_tokens = encode(tokens), int(handles[0].num_tokens)
        if len(data) < num_tokens * TOKEN_BYTES:
            raise ValueError(f"the handles hold {num_tokens} tokens, but {len(data) // TOKEN_BYTES} tokens were given")
        drops = self._no_pages()
        if num_tokens == 0:
            return drops
        path = self._grow(data[: num_tokens * TOKEN_BYTES], namespace, drops)
        self._store(path, namespace, num_tokens, handles, drops)
        path[-1].is_fork |= is_fork
        self._supersede(path, num_tokens, drops)
        if taken is not None:
            self._pin(path, taken)
        self._prune(path[-1])
        self._evict_to_cap(drops)
        return drops

    def evict(self, num_pages: Sequence[int]) -> Pages:
        """Forget pages that no row uses, each before the page that it continues.

        Args:
            num_pages: [G], how many of each group. Fewer go if there are not that many. More go of a group with a
                window, where a page of another group takes them along.
        """
        drops = self._no_pages()
        for group in self._groups:
            has_window = self._reach.windows[group] is not None
            can_go = _is_free if has_window else _is_free_leaf
            while len(drops[group]) < num_pages[group] and self._ledger.num_evictable[group]:
                node = self._ledger.choose(group, can_go)
                for also in self._groups if not has_window else [group]:
                    if node.pages[also] and self._listener is not None:
                        self._listener.evicted(node, also)
                self._ledger.drop(node, group, drops, is_chosen=True)
                if has_window:
                    self._prune(node)
                else:
                    self._leave(node, drops)
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
        nodes = list(self._nodes())
        for node in nodes:
            node.is_cached = False
        self._ledger.retire_all(nodes, drops)
        self._roots.clear()
        return drops

    def keep(self, tokens: Tokens, namespace: Namespace = Namespace()) -> Taken:  # noqa: B008  immutable
        """Pin what is cached of some tokens, until it is given back or everything is cleared.

        Returns:
            What was pinned: fewer tokens where `max_kept_pages` leaves no room.
        """
        room = max(self._max_kept_pages - self.num_kept_pages, 0)
        data, width = encode(tokens), self._reach.page_size * TOKEN_BYTES
        matches = (self._match(data[: count * width], namespace, num_asked=0) for count in range(room, -1, -1))
        # the last tokens may need several nodes: where there is no room for all of them, keep fewer tokens
        kept = self._take(next(match for match in matches if len(match.nodes) <= room))
        self._kept[kept] = None
        return kept

    # ---- matching --------------------------------------------------------------------------------------------

    def _no_pages(self) -> Pages:
        return [[] for _ in self._groups]

    def _nodes(self) -> Iterable[Node]:
        for root in self._roots.values():
            yield from root.subtree()

    def _match(self, data: bytes, namespace: Namespace, num_asked: int) -> Match:
        root, page_size = self._roots.get(namespace), self._reach.page_size
        path, num_known = walk(root, data, page_size) if root else ([], 0)
        num_tokens, nodes, seen = self._reach.continuable(path, num_known, data)
        num_whole = num_known // page_size
        return Match(
            num_tokens,
            num_known,
            parts_at=num_whole * page_size if num_whole * page_size > num_tokens else 0,
            num_evictable=tuple(sum(not node.num_pins and node.pages[g] > 0 for node in nodes) for g in self._groups),
            num_asked=num_asked,
            nodes=tuple(nodes),
            seen=tuple(map(tuple, seen)),
            path=tuple(path),
            fork=path[num_whole - 1] if num_whole and not _is_leaf_end(path, num_known, page_size) else None,
        )

    def _take(self, match: Match) -> Taken:
        num_tokens = match.num_tokens
        pages = np.zeros((len(self._groups), self._num_columns), np.int32)
        first_columns = np.zeros(len(self._groups), np.int32)
        for group, seen in enumerate(match.seen):
            for node in seen:
                node.superseded -= {group}  # it is in demand
            first = first_columns[group] = self._reach.first_seen(num_tokens, group)
            pages[group, first : first + len(seen)] = [node.pages[group] for node in seen]
        taken = Taken(num_tokens, pages, first_columns)
        self._pin(match.nodes, taken)
        return taken

    # ---- the tree --------------------------------------------------------------------------------------------

    def _pin(self, nodes: Sequence[Node], taken: Taken) -> None:
        for node in nodes:
            if node not in taken.nodes:
                taken.nodes[node] = None
                self._ledger.pin(node)

    def _unpin(self, taken: Taken, drops: Pages) -> None:
        for node in reversed(taken.nodes):
            self._ledger.unpin(node, drops)
            self._prune(node)
        taken.nodes.clear()

    def _grow(self, data: bytes, namespace: Namespace, drops: Pages) -> list[Node]:
        """The nodes of some tokens, made where they are missing."""
        if namespace not in self._roots:
            self._roots[namespace] = Root(namespace, len(self._groups))
        width = self._reach.page_size * TOKEN_BYTES
        path: list[Node] = [self._roots[namespace]]
        for at in range(0, len(data), width):
            chunk = data[at : at + width]
            node = path[-1].child(chunk) or (path[-1].extension(chunk) if len(chunk) < width else None)
            if node is None:
                shorter = path[-1].beginning(chunk)
                node = path[-1].add(chunk)
                if shorter is not None:
                    self._ledger.retire(shorter, drops)
                    shorter.leave()
            path.append(node)
        return path[1:]

    def _store(
        self, path: list[Node], namespace: Namespace, num_tokens: int, handles: Sequence[Published], drops: Pages
    ) -> None:
        """Put the pages of a publication into the nodes that have none yet, last page first."""
        num_in_last = num_tokens - (len(path) - 1) * self._reach.page_size
        goes_on = len(path[-1]) > num_in_last  # then the last page holds fewer tokens than its node
        for group, handle in enumerate(handles):
            pages = np.asarray(handle.pages).tolist()
            for column in range(len(path) - 1, int(handle.first_column) - 1, -1):
                node, page = path[column], pages[column]
                if node.pages[group]:
                    self._ledger.tell(group, "touch", node)
                    node.superseded -= {group}
                elif page and not (goes_on and column == len(path) - 1):
                    self._ledger.hold(node, group, page)
                    if self._listener is not None:
                        self._listener.cached(namespace, node, group)
                    continue
                drops[group] += [page] if page else []

    def _supersede(self, path: list[Node], num_tokens: int, drops: Pages) -> None:
        """Drop the windows of a branch that ends here now, but for those at its forks."""
        for group in self._groups:
            if self._reach.windows[group] is not None:
                for node, is_useless in zip(path, self._reach.is_useless(path, num_tokens, group), strict=True):
                    if is_useless and node.pages[group]:
                        self._ledger.supersede(node, group, drops)

    def _leave(self, node: Node, drops: Pages) -> None:
        """Take out a node that nobody uses and nothing continues, and what it alone continued."""
        parent = node.parent
        self._ledger.retire(node, drops)
        node.leave()
        self._prune(parent)

    def _prune(self, node: Node | None) -> None:
        """Take out a node that holds no page and that nothing continues, and those before it, if they are the same."""
        while node is not None and not (any(node.pages) or node.num_children or node.num_pins) and node.is_cached:
            node.leave()
            if isinstance(node, Root):
                del self._roots[node.namespace]
            node = node.parent

    def _evict_to_cap(self, drops: Pages) -> None:
        if self._max_pages is not None:
            over = [max(held - most, 0) for held, most in zip(self.num_pages, self._max_pages, strict=True)]
            if any(over):
                for dropped, more in zip(drops, self.evict(over), strict=True):
                    dropped += more


def _is_leaf_end(path: list[Node], num_known: int, page_size: int) -> bool:
    """Whether the known tokens end where a cached prefix does, so that what comes continues it."""
    return not path[-1].num_children and num_known == (len(path) - 1) * page_size + len(path[-1])


def _is_free(node: Node) -> bool:
    return node.num_pins == 0


def _is_free_leaf(node: Node) -> bool:
    return node.num_pins == 0 and node.num_children == 0
