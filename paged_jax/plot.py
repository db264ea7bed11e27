"""Pictures of the memory: every page a cell, coloured by how many sequences map it."""

import numpy as np
from rich.text import Text

from paged_jax.page_table import PageTable

FREE, CACHED, OWNED = -1, 0, 1  # page states; above OWNED: the number of rows that share the page
_CELLS = {FREE: ("·", "dim"), CACHED: ("▒", "yellow"), OWNED: ("■", "blue")}
_SHARED = "bold green"


def page_states(table: PageTable) -> np.ndarray:
    """FREE, CACHED (only handles hold it), or how many rows map it; [P - 1], the null page left out."""
    refcounts, rows = np.asarray(table.refcounts), np.asarray(table.pages)
    owners = np.bincount(rows[rows > 0], minlength=len(refcounts))
    return np.where(refcounts == 0, FREE, owners)[1:]


def page_map(table: PageTable, width: int = 64) -> Text:
    """The pool for a terminal: `·` free, `▒` cached, `■` one owner, a digit for so many owners (9 for more)."""
    text = Text()
    for i, state in enumerate(page_states(table)):
        if i and i % width == 0:
            text.append("\n")
        text.append(*(_CELLS[state] if state in _CELLS else (str(min(state, 9)), _SHARED)))
    return text


def draw_pages(table: PageTable, ax=None, width: int = 32, title: str = ""):
    """The pool for a notebook (needs matplotlib): a square a page, darker the more rows share it; returns the axes."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import BoundaryNorm, ListedColormap

    states = page_states(table)
    cells = np.full(-(-len(states) // width) * width, np.nan)
    cells[: len(states)] = np.clip(states, FREE, 4)
    cells = cells.reshape(-1, width)
    colours = ListedColormap(["#eeeeee", "#f2c14e", "#7fb3d5", "#2e86c1", "#1f618d", "#154360"])
    if ax is None:
        _, ax = plt.subplots(figsize=(width * 0.25, max(1.5, len(cells) * 0.25 + 0.8)))
    image = ax.pcolormesh(
        cells,
        cmap=colours,
        norm=BoundaryNorm(np.arange(-1.5, 5), colours.N),
        edgecolors="white",
        linewidth=1.5,
    )
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title)
    for side in ax.spines.values():
        side.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, ticks=range(-1, 5), fraction=0.03, pad=0.02)
    bar.ax.set_yticklabels(["free", "cached", "1 owner", "2 owners", "3 owners", "4 or more"], fontsize=8)
    bar.outline.set_visible(False)
    return ax
