"""Which rows share which pages: the tree that forks, samples and cached prefixes leave in the page tables."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.tree import Tree

from paged_jax.cache.show import COLOURS, page_ranges
from paged_jax.memory import find_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Branch(NamedTuple):
    """Pages that the same rows map in the same columns, one after the other; see `sharing_branches`."""

    rows: tuple[int, ...]  # that map them
    first_column: int
    pages: tuple[int, ...]
    refcounts: tuple[int, ...]  # of the pages: rows and handles that own them
    parent: int | None  # the branch before it, by its place in the list

    @property
    def label(self) -> str:
        """Its pages, and how many owners they have."""
        counts = sorted(set(self.refcounts))
        owned = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{page_ranges(self.pages)} (×{owned})"


def sharing_branches(source: Any, group: int = 0) -> list[Branch]:
    """The tree of shared pages of a group of layers, parents before their children.

    Args:
        source: an `Engine`, a `KVCache`, or page tables.
        group: of layers.

    Raises:
        ValueError: there are no page tables or no such group, or they have no values, as inside jit.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([40, 0]))
        >>> tables, _ = tables.fork(jnp.array([0]), jnp.array([1]))
        >>> tables, _ = tables.reserve(jnp.array([1, 1]))  # they part in the third page
        >>> for branch in sharing_branches(tables):
        ...     print(branch.rows, branch.label)
        (0, 1) 1-2 (×2)
        (0,) 4 (×1)
        (1,) 3 (×1)
    """
    table = find_table(source, group)
    refcounts, pages = np.asarray(table.refcounts), np.asarray(table.pages)
    branches: list[Branch] = []

    def grow(rows: list[int], column: int, parent: int | None) -> None:
        """Branches of rows that map the same pages before a column."""
        following: dict[int, list[int]] = {}
        for row in rows:
            page = int(pages[row, column]) if column < pages.shape[1] else 0
            following.setdefault(page, []).append(row)
        for page, same in following.items():
            if page == 0:
                continue  # the rows end here
            stop = column + 1
            while stop < pages.shape[1] and pages[same[0], stop] and len({int(pages[row, stop]) for row in same}) == 1:
                stop += 1
            own = tuple(int(p) for p in pages[same[0], column:stop])
            branches.append(Branch(tuple(same), column, own, tuple(int(refcounts[p]) for p in own), parent))
            grow(same, stop, len(branches) - 1)

    first_columns = np.asarray(table.first_column)
    rows = np.flatnonzero(np.asarray(table.lengths)).tolist()
    for column in sorted({int(first_columns[row]) for row in rows}):  # above 0 where pages before a window are gone
        grow([row for row in rows if first_columns[row] == column], column, None)
    return branches


def fork_tree(source: Any, group: int = 0) -> Tree:
    """The tree of shared pages for a terminal; `print` it with rich, or `rich.print`.

    Args:
        source: an `Engine`, a `KVCache`, or page tables.
        group: of layers.

    Raises:
        ValueError: there are no page tables or no such group, or they have no values, as inside jit.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([40, 0]))
        >>> tables, _ = tables.fork(jnp.array([0]), jnp.array([1]))
        >>> tables, _ = tables.reserve(jnp.array([1, 1]))  # they part in the third page
        >>> import rich
        >>> rich.print(fork_tree(tables))
        pages (×owners), and the rows that end there
        └── pages 1-2 (×2)
            ├── pages 4 (×1)  row 0
            └── pages 3 (×1)  row 1
    """
    tree = Tree("pages (×owners), and the rows that end there")
    branches = sharing_branches(source, group)
    nodes: list[Tree] = []
    for i, branch in enumerate(branches):
        above = tree if branch.parent is None else nodes[branch.parent]
        ends = _rows_that_end(branches, i)
        nodes.append(above.add(f"pages {branch.label}" + (f"  row {', '.join(map(str, ends))}" if ends else "")))
    return tree


def draw_forks(source: Any, group: int = 0, *, title: str = "") -> "Figure":
    """The tree of shared pages for a notebook: a bar is a run of pages, darker the more owners it has.

    Args:
        source: an `Engine`, a `KVCache`, or page tables.
        group: of layers.
        title: of the picture.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: there are no page tables or no such group, or they have no values, as inside jit.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([40, 0]))
        >>> tables, _ = tables.fork(jnp.array([0]), jnp.array([1]))
        >>> tables, _ = tables.reserve(jnp.array([1, 1]))  # they part in the third page
        >>> figure = draw_forks(tables, title="two rows")
        >>> figure.axes[0].get_title(loc="left")
        'two rows'
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    table = find_table(source, group)
    branches = sharing_branches(source, group)
    places, rows = _places(branches)
    last = max((branch.first_column + len(branch.pages) for branch in branches), default=1)
    figure, ax = plt.subplots(figsize=(9, 1.5 + 0.5 * max(1, len(rows))), layout="constrained")
    for i, branch in enumerate(branches):
        x, y, width = branch.first_column, places[i], len(branch.pages)
        if branch.parent is not None:
            ax.plot([x, x], [places[branch.parent], y], color="#555555", linewidth=1.2, zorder=0)
        fewest = min(branch.refcounts)
        face = COLOURS[min(max(fewest, 1), 4)]
        ax.add_patch(Rectangle((x + 0.04, y - 0.3), width - 0.08, 0.6, facecolor=face, edgecolor="#555555"))
        short = f"×{fewest}" if min(branch.refcounts) == max(branch.refcounts) else f"×{fewest}+"
        # A character of this size takes about a hundredth of the picture's width.
        label = branch.label if len(branch.label) * last < 95 * width else short
        ink = "white" if fewest > 2 else "#222222"
        if len(label) * last < 95 * width:
            ax.text(x + width / 2, y, label, ha="center", va="center", fontsize=10, color=ink)
        ends = _rows_that_end(branches, i)
        if ends:
            name = f"row{'s' if len(ends) > 1 else ''} {', '.join(map(str, ends))}"
            ax.text(x + width + last * 0.01, y, name, ha="left", va="center", fontsize=10)
    ax.set(xlim=(-0.1, last * 1.12), ylim=(max(places, default=0) + 0.7, min(places, default=0) - 0.7), yticks=[])
    ax.set_xlabel(f"pages from the beginning of a sequence, of {table.page_size} tokens each", fontsize=11)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["left", "top", "right"]].set_visible(False)
    ax.set_title(title or "pages that rows share: page numbers (×owners)", fontsize=13, loc="left")
    return figure


def _rows_that_end(branches: list[Branch], i: int) -> list[int]:
    """The rows of a branch that no branch after it holds."""
    further = {row for branch in branches if branch.parent == i for row in branch.rows}
    return [row for row in branches[i].rows if row not in further]


def _places(branches: list[Branch]) -> tuple[list[float], list[int]]:
    """The height of each branch in the middle of its rows, and the rows as they stand from top to bottom."""
    rows: list[int] = []
    for i in range(len(branches)):
        rows += [row for row in _rows_that_end(branches, i) if row not in rows]
    # In the order of a walk through the tree, so that no line crosses another: rows of a branch stand together.
    rows = sorted(rows, key=lambda row: [i for i, branch in enumerate(branches) if row in branch.rows])
    height = {row: place for place, row in enumerate(rows)}
    return [float(np.mean([height[row] for row in branch.rows])) for branch in branches], rows
