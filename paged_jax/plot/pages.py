"""Every page a cell, coloured by how many sequences map it."""

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from paged_jax.cache.show import COLOURS, NAMES, cell, label, owners
from paged_jax.memory import CACHED, FREE, OWNED, find_table, find_tables, page_states

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = {FREE: "dim", CACHED: "yellow", OWNED: "blue"}
_SHARED = "bold green"
MOST_LABELLED = 512  # pages of a pool whose cells are large enough for a number
WIDTH_INCHES = 8.0  # of the cells


def page_map(source: Any, group: int = 0, *, width: int = 64) -> Text:
    """The pool of a group for a terminal, a character for each page.

    `·` is free and `▒` only cached; a letter is the only row that has the page (a is row 0), a digit says how many rows
    share it (9 also stands for more).

    Args:
        source: an `Engine`, a `KVCache`, or page tables.
        group: of layers.
        width: cells in a line.

    Raises:
        ValueError: there are no page tables or no such group, or they have no values, as inside jit.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([40, 0]))
        >>> tables, _ = tables.fork(jnp.array([0]), jnp.array([1]))
        >>> tables, _ = tables.reserve(jnp.array([1, 1]))  # they part in the third page
        >>> print(page_map(tables))  # two pages that both rows share, and one of each
        22ba····
    """
    tables, text = find_tables(source), Text()
    states, owned = page_states(tables, group).tolist(), owners(tables, group)
    for i, state in enumerate(states):
        if i and i % width == 0:
            text.append("\n")
        text.append(cell(state, owned.get(i + 1, [])), _STYLES.get(state, _SHARED))
    return text


def draw_pages(source: Any, group: int = 0, *, title: str = "", width: int | None = None) -> "Figure":
    """Pool and rows for a notebook.

    Above, the pool: a square for each page, darker the more rows share it. A number is the only row that has the page;
    `×3` says that three rows share it; `c` and hatching say that it is only cached: no row has it, but a handle or the
    prefix cache. The crossed square is the null page. Below, the rows: the pages of each sequence in their order, by
    number, in the same colours.

    Args:
        source: an `Engine`, a `KVCache`, or page tables.
        group: of layers.
        title: of the picture.
        width: cells in a line; None: 24, or more where the pool is large.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: there are no page tables or no such group, or they have no values, as inside jit.

    Examples:
        >>> tables, _ = PageTables.create(config).reserve(jnp.array([40, 0]))
        >>> tables, _ = tables.fork(jnp.array([0]), jnp.array([1]))
        >>> tables, _ = tables.reserve(jnp.array([1, 1]))  # they part in the third page
        >>> figure = draw_pages(tables)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['free', 'only cached', '1 row', '2 rows', '3 rows', '4 or more rows']
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    tables, table = find_tables(source), find_table(source, group)
    states, owned = page_states(tables, group).tolist(), owners(tables, group)
    rows = [row[row > 0].tolist() for row in np.asarray(table.pages)]
    is_labelled = len(states) <= MOST_LABELLED
    if width is None:
        width = 24 if is_labelled else int(np.ceil(np.sqrt(2 * len(states))))
    num_lines = -(-(len(states) + 1) // width)
    row_lines = [max(1, -(-len(pages) // width)) for pages in rows]
    height = num_lines + 0.6 + sum(row_lines)
    size = WIDTH_INCHES / width
    figure, ax = plt.subplots(figsize=(WIDTH_INCHES + 1.2, height * size + 1.2), layout="constrained")

    _draw_null(ax)
    for page, state in enumerate(states, 1):
        text = label(state, owned.get(page, [])) if is_labelled else ""
        _draw_cell(ax, page % width, page // width, state, text)
    y = num_lines + 0.6
    for row, (pages, lines) in enumerate(zip(rows, row_lines, strict=True)):
        ax.text(-0.3, y + 0.5, f"row {row}", ha="right", va="center", fontsize=10)
        for i, page in enumerate(pages):
            _draw_cell(ax, i % width, y + i // width, states[page - 1], str(page) if is_labelled else "")
        y += lines
    ax.text(-0.3, num_lines / 2, "pool", ha="right", va="center", fontsize=10)
    ax.set(xlim=(-2.2 * width / 24, width), ylim=(height, 0), aspect="equal")
    ax.axis("off")
    ax.set_title(title, fontsize=13, loc="left")
    legend = [
        Patch(facecolor=colour, edgecolor="#999999", label=NAMES[state], hatch="///" if state == CACHED else None)
        for state, colour in COLOURS.items()
    ]
    figure.legend(handles=legend, ncols=6, fontsize=10, frameon=False, loc="outside lower center")
    return figure


def _draw_cell(ax, x: int, y: float | int, state: int, text: str) -> None:
    from matplotlib.patches import Rectangle

    hatch = "///" if state == CACHED else None
    colour = COLOURS[min(state, 4)]
    ax.add_patch(
        Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, facecolor=colour, edgecolor="#999999", linewidth=0.6, hatch=hatch)
    )
    if text:
        size = 10 if len(text) < 3 else 9 if len(text) == 3 else 7
        ink = "white" if state > 2 else "#222222"
        ax.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=size, color=ink)


def _draw_null(ax) -> None:
    """The null page, which nobody can own."""
    ax.plot([0.1, 0.9, None, 0.1, 0.9], [0.1, 0.9, None, 0.9, 0.1], color="#999999", linewidth=1)
