"""What page tables and pools look like when they are printed: plain text in a terminal, a picture in a notebook.

Printing never fails. Inside a traced function, or after the arrays were donated, there are no values to show; then the
sizes are shown, and the reason.
"""

import collections
from collections.abc import Iterable
from html import escape

import numpy as np

from paged_jax.cache.config import LayerGroup
from paged_jax.cache.fault import Fault
from paged_jax.cache.page_table import PageTable
from paged_jax.cache.page_tables import PageTables
from paged_jax.cache.pool import PagePool
from paged_jax.cache.sizes import write_bytes
from paged_jax.memory import CACHED, FREE, OWNED, MemoryReport, page_states, why_unreadable

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of the first rows
MOST_CELLS, MOST_ROWS, CELLS_A_LINE = 512, 8, 64  # that are printed
SHADES = "·░▒▓█"  # of a cell that stands for several pages, by the share of them that is in use
CELLS = "· free   ▒ only cached   a to z: row 0 to 25 alone (■: a later one)   2 to 9: rows that share it"
LABELS = "a number: the only row that has the page; ×n: n rows share it; c: only cached; white: free"
# Light to dark, so that they differ in grey, too; 4 stands for 4 or more rows.
COLOURS = {FREE: "#ffffff", CACHED: "#f8dc8a", OWNED: "#8fbfe0", 2: "#4f97cc", 3: "#2b6ca8", 4: "#0b2f5b"}
NAMES = {FREE: "free", CACHED: "only cached", OWNED: "1 row", 2: "2 rows", 3: "3 rows", 4: "4 or more rows"}


def tables_text(tables: PageTables) -> str:
    """The page tables for a terminal: each group's pages as cells, then what the rows hold."""
    reason = _why_no_tables(tables)
    if reason is not None:
        return f"PageTables ({reason}): {_sizes(tables.layout)}"
    lines = [_headline(tables)]
    for group in range(len(tables.groups)):
        lines += [_group_line(tables, group), *_cells(tables, group)]
        rows = np.flatnonzero(np.asarray(tables.lengths))
        lines += [_row_line(tables, group, int(row)) for row in rows[:MOST_ROWS]]
        if len(rows) > MOST_ROWS:
            lines.append(f"  and {len(rows) - MOST_ROWS} more rows")
    return "\n".join(lines)


def tables_html(tables: PageTables) -> str:
    """The page tables for a notebook: each group's pages as coloured squares, which say whose they are."""
    if _why_no_tables(tables) is not None:
        return f"<pre>{escape(tables_text(tables))}</pre>"
    parts = [f"<b>{escape(_headline(tables))}</b>"]
    for group in range(len(tables.groups)):
        parts += [f"<div>{escape(_group_line(tables, group))}</div>", _squares(tables, group)]
    return "".join(parts)


def pool_text(pool: PagePool) -> str:
    """The sizes of a pool; its pages hold keys and values, and the page tables say whose."""
    reason = why_unreadable(pool.arrays)
    sizes = _sizes(pool.groups)
    try:
        pages = pool.arrays[0]
        heads = f"{pages.num_kv_heads} KV heads of {pages.head_dim} in {pages.dtype}"
        sizes = f"{write_bytes(pool.num_bytes)}, pages of {pages.page_size} tokens, {heads}; {sizes}"
    except (AttributeError, IndexError, TypeError):  # a pytree of something other than arrays has no sizes
        pass
    return f"PagePool{f' ({reason})' if reason else ''}: {sizes}"


def pool_html(pool: PagePool) -> str:
    """A pool for a notebook: a bar for the bytes of each group of layers."""
    try:
        sizes = [len(group.layers) * group.num_pages for group in pool.groups]
        each = pool.num_bytes / sum(sizes)
    except (AttributeError, IndexError, TypeError):
        return f"<pre>{escape(pool_text(pool))}</pre>"
    parts = [f"<div>{escape(pool_text(pool))}</div>"]
    for group, size in zip(pool.groups, sizes, strict=True):
        width = max(2, round(400 * size / max(sizes)))
        bar = f"display:inline-block;width:{width}px;height:12px;background:{COLOURS[2]};margin-right:8px"
        parts.append(f'<div><span style="{bar}"></span>{escape(_group_name(group))}: {write_bytes(size * each)}</div>')
    return "".join(parts)


def owners(tables: PageTables, group: int) -> dict[int, list[int]]:
    """The rows that map each page of a group."""
    rows = np.asarray(tables.groups[group].pages)
    owned: dict[int, list[int]] = collections.defaultdict(list)
    for row, column in zip(*np.nonzero(rows), strict=True):
        owned[int(rows[row, column])].append(int(row))
    return owned


def cell(state: int, rows: list[int]) -> str:
    """A page in a terminal, as `CELLS` explains it.

    Args:
        state: of the page, as `page_states` has it.
        rows: that map it.
    """
    if state in (FREE, CACHED):
        return "·" if state == FREE else "▒"
    if state > OWNED:
        return str(min(state, 9))
    return LETTERS[rows[0]] if rows[0] < len(LETTERS) else "■"


def label(state: int, rows: list[int]) -> str:
    """What stands in a page's square, as `LABELS` explains it; the arguments are those of `cell`."""
    if state in (FREE, CACHED):
        return "" if state == FREE else "c"
    return str(rows[0]) if state == OWNED else f"×{state}"


def page_ranges(pages: Iterable[int]) -> str:
    """Page numbers in their order, neighbours joined: "3-5 9"."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == runs[-1][1] + 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _why_no_tables(tables: PageTables) -> str | None:
    if not isinstance(tables.groups, tuple) or not all(isinstance(table, PageTable) for table in tables.groups):
        return "with something else in the place of tables"
    reason = why_unreadable(tables.groups)
    if reason is None and any(np.ndim(table.pages) != 2 for table in tables.groups):
        return "a stack of several"
    return reason


def _sizes(groups: tuple[LayerGroup, ...]) -> str:
    return "; ".join(f"{_group_name(group)}, {group.num_pages - 1} pages and the null page" for group in groups)


def _group_name(group: LayerGroup) -> str:
    window = "" if group.window is None else f" with a window of {group.window} tokens"
    name = "layers" if len(group.layers) > 1 else "layer"
    return f"{name} {page_ranges(group.layers)}{window}"


def _headline(tables: PageTables) -> str:
    lengths = np.asarray(tables.lengths)
    page_size, fault = tables.groups[0].page_size, int(tables.fault)
    refused = f"; refused since clear_fault: {Fault(fault)!r}" if fault else ""
    used = f"{np.count_nonzero(lengths)} of {len(lengths)} rows hold {int(lengths.sum())} tokens"
    return f"PageTables: {used}, in pages of {page_size} tokens{refused}"


def _group_line(tables: PageTables, group: int) -> str:
    report = MemoryReport.measure(tables, group)
    return (
        f"{_group_name(tables.layout[group])}: {report.pages_in_use} of {report.num_pages} pages in use "
        f"({report.pages_shared} shared, {report.pages_cached} only cached); "
        f"{report.waste:.0%} of the rows' slots are empty; sharing saves {report.saved_by_sharing:.0%} of the pages"
    )


def _cells(tables: PageTables, group: int) -> list[str]:
    states = page_states(tables, group)
    if len(states) > MOST_CELLS:
        each = -(-len(states) // MOST_CELLS)
        shares = [float(np.mean(states[i : i + each] != FREE)) for i in range(0, len(states), each)]
        cells = "".join(SHADES[int(np.ceil(share * (len(SHADES) - 1)))] for share in shares)
        legend = f"a cell stands for {each} pages: {SHADES[0]} all free to {SHADES[-1]} all in use"
    else:
        owned = owners(tables, group)
        cells = "".join(cell(state, owned.get(page, [])) for page, state in enumerate(states.tolist(), 1))
        legend = CELLS
    return [f"  {cells[i : i + CELLS_A_LINE]}" for i in range(0, len(cells), CELLS_A_LINE)] + [f"  {legend}"]


def _row_line(tables: PageTables, group: int, row: int) -> str:
    table = tables.groups[group]
    pages = np.asarray(table.pages[row])
    letter = f"{LETTERS[row]}  " if row < len(LETTERS) else ""
    listed = page_ranges(pages[pages > 0].tolist())
    listed = listed if len(listed) <= 60 else listed[:57] + "..."
    return f"  {letter}row {row}: {int(table.lengths[row])} tokens in pages {listed}"


def _squares(tables: PageTables, group: int, width: int = 32, size: int = 18) -> str:
    """The pages of a group as an SVG; a square's title names the rows that map it."""
    states = page_states(tables, group)[:MOST_CELLS]
    owned = owners(tables, group)
    squares = []
    for i, state in enumerate(states.tolist()):
        x, y, rows = i % width * size, i // width * size, owned.get(i + 1, [])
        colour = "#ffffff" if state > 2 else "#222222"
        whose = f"rows {', '.join(map(str, rows))}" if rows else NAMES[state]
        squares.append(
            f"<g><title>page {i + 1}: {whose}</title>"
            f'<rect x="{x + 1}" y="{y + 1}" width="{size - 2}" height="{size - 2}" fill="{COLOURS[min(state, 4)]}" '
            f'stroke="#999999" stroke-width="0.5"/>'
            f'<text x="{x + size / 2}" y="{y + size * 0.7}" font-size="10" text-anchor="middle" fill="{colour}">'
            f"{label(state, rows)}</text></g>"
        )
    height = -(-len(states) // width) * size
    more = len(page_states(tables, group)) - len(states)
    note = LABELS
    note += f"; {more} more pages are not drawn" if more else ""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * size}" height="{height}" font-family="sans-serif">'
    return f"{svg}{''.join(squares)}</svg><div><small>{note}</small></div>"
