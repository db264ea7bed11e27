"""Pictures of the memory: every page a cell, coloured by how many sequences map it."""

import numpy as np
from rich.text import Text

from paged_jax.cache.page_tables import PageTables

FREE, CACHED, OWNED = -1, 0, 1  # page states; above OWNED: the number of rows that share the page
_CELLS = {FREE: ("·", "dim"), CACHED: ("▒", "yellow"), OWNED: ("■", "blue")}
_SHARED = "bold green"
_COLOURS = {FREE: "#e8e8e8", CACHED: "#f2c14e", OWNED: "#9cc9e8", 2: "#3f8fcf", 3: "#1f5f9f", 4: "#0f2f5f"}
_NAMES = {FREE: "free", CACHED: "cached", OWNED: "1 owner", 2: "2 owners", 3: "3 owners", 4: "4 or more"}


def page_states(tables: PageTables, group: int = 0) -> np.ndarray:
    """FREE, CACHED (only handles hold it), or how many rows map it; [P - 1] of a group of layers, no null page."""
    table = tables.groups[group]
    refcounts, rows = np.asarray(table.refcounts), np.asarray(table.pages)
    owners = np.bincount(rows[rows > 0], minlength=len(refcounts))
    return np.where(refcounts == 0, FREE, owners)[1:]


def page_map(tables: PageTables, group: int = 0, *, width: int = 64) -> Text:
    """The pool of a group for a terminal: `·` free, `▒` cached, `■` one owner, a digit for 2 to 9 or more owners."""
    text = Text()
    for i, state in enumerate(page_states(tables, group)):
        if i and i % width == 0:
            text.append("\n")
        text.append(*(_CELLS[state] if state in _CELLS else (str(min(state, 9)), _SHARED)))
    return text


def draw_pages(tables: PageTables, group: int = 0, *, title: str = "", width: int = 32):
    """Pool and rows for a notebook (needs matplotlib); returns the figure.

    Above, the pool: a square a page, darker the more rows share it. Below, the rows: the pages of each sequence in
    order, by number, in the same colours.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    states = page_states(tables, group)
    rows = np.asarray(tables.groups[group].pages)
    lines = -(-len(states) // width)
    height = lines + 1 + len(rows)
    figure, ax = plt.subplots(figsize=((width + 6) * 0.24, (height + 3) * 0.24))

    def cell(x, y, state, label=""):
        ax.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, color=_COLOURS[min(state, 4)]))
        ax.text(x + 0.5, y + 0.55, label, ha="center", va="center", fontsize=6, color="white" if state > 1 else "#333")

    for i, state in enumerate(states):
        cell(i % width, i // width, state)
    for b, row in enumerate(rows):
        ax.text(-0.4, lines + 1.5 + b, f"row {b}", ha="right", va="center", fontsize=7)
        for column in np.flatnonzero(row):
            if column < width:
                cell(column, lines + 1 + b, states[row[column] - 1], str(row[column]))
    ax.text(-0.4, lines / 2, "pool", ha="right", va="center", fontsize=7)
    ax.set(xlim=(-3, width), ylim=(height, 0), aspect="equal")
    ax.axis("off")
    ax.set_title(title, fontsize=10, loc="left")
    legend = [Patch(color=colour, label=_NAMES[state]) for state, colour in _COLOURS.items()]
    ax.legend(handles=legend, ncols=6, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, 0))
    return figure
