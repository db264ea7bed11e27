"""The pool over time, its bytes beside those of other caches, and what a larger one would bring."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.show import COLOURS, NAMES
from paged_jax.cache.sizes import write_bytes
from paged_jax.memory import FREE, CacheReport, find_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = (("#0b2f5b", "o", "-"), ("#d55e00", "s", "--"), ("#009e73", "^", ":"), ("#cc79a7", "D", "-."))


class CapacityPoint(NamedTuple):
    """What a prefix cache of one size did with a load; `draw_capacity` draws them."""

    num_pages: int
    hit_rate: float  # share of the prompt tokens that were found
    evicted_pages: int


def draw_occupancy(history: Sequence[np.ndarray], *, title: str = "") -> "Figure":
    """The pool over time: a column a moment, a line a page, darker the more rows share it.

        history.append(page_states(engine))  # after each step

    Args:
        history: what `page_states` gave at each moment, all of one group of layers.
        title: of the picture.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: the history is empty, or is of several groups of layers.

    Examples:
        >>> from paged_jax.plot import page_states
        >>> tables, history = PageTables.create(config), []
        >>> for _ in range(4):
        ...     tables, _ = tables.reserve(jnp.array([16, 0]))
        ...     history.append(page_states(tables))
        >>> figure = draw_occupancy(history)
        >>> figure.axes[1].get_ylabel(), figure.axes[1].get_xlabel()
        ('pages in use', 'step')
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    shapes = {np.shape(moment) for moment in history} if isinstance(history, Sequence) else set()
    if len(shapes) != 1 or len(shapes.pop()) != 1:
        raise ValueError(
            "the history must be a list with the page states of one or more moments, all of the same group of layers: "
            "append page_states(engine) to it after each step"
        )
    states = np.stack([np.asarray(moment) for moment in history], axis=1)  # [P - 1, moments]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 5.5), layout="constrained", sharex=True, height_ratios=(3, 1.3)
    )
    above.imshow(
        np.minimum(states, 4) + 1,
        cmap=ListedColormap(list(COLOURS.values())),
        vmin=0, vmax=len(COLOURS) - 1, aspect="auto", interpolation="nearest",
        extent=(-0.5, states.shape[1] - 0.5, len(states) + 0.5, 0.5),
    )  # fmt: skip
    above.set_ylabel("page number", fontsize=11)
    # Below, how many pages are in use: the most shared ones at the bottom, those that are only cached on top.
    moments, height = np.arange(states.shape[1]), np.zeros(states.shape[1], int)
    for state in sorted(COLOURS.keys() - {FREE}, reverse=True):
        count = np.sum(np.minimum(states, 4) == state, axis=0)
        below.bar(moments, count, width=1, bottom=height, color=COLOURS[state])
        height += count
    below.set_ylim(0, len(states))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_ylabel("pages in use", fontsize=11)
    below.set_xlabel("step", fontsize=11)
    legend = [Patch(facecolor=c, edgecolor="#999999", label=NAMES[state]) for state, c in COLOURS.items()]
    figure.legend(handles=legend, ncols=6, fontsize=10, frameon=False, loc="outside lower center")
    above.set_title(title or "who uses each page, step by step", fontsize=13, loc="left")
    return figure


def draw_bytes(source: Any, config: CacheConfig | None = None, *, title: str = "") -> "Figure":
    """The bytes of the sequences that are there: in contiguous caches, in pages, and of nothing but their tokens.

    Args:
        source: an `Engine`, a `KVCache`, or page tables.
        config: sizes of the cache; None: those of the engine.
        title: of the picture.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: there are no page tables, or no config.

    Examples:
        >>> cache, granted = KVCache.create(config).reserve(jnp.array([20, 3]))
        >>> figure = draw_bytes(cache, config)
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['4.0 KiB', '2.0 KiB', '1.5 KiB', '1.5 KiB', '736 bytes']
    """
    import matplotlib.pyplot as plt

    report, tables = CacheReport.measure(source, config), find_tables(source)
    longest = max(group.longest for group in report.groups)
    power = 1 << max(0, longest - 1).bit_length()
    bars = {
        f"contiguous, room for {tables.max_length} tokens each": report.contiguous_bytes(tables.max_length),
        f"contiguous, room for {power} tokens each": report.contiguous_bytes(power),
        "pages, if nothing were shared": report.mapped_bytes,
        "pages": sum(report.bytes_in_use),
        "ideal: each distinct token once": report.ideal_bytes,
    }
    figure, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
    colours = ["#d9d9d9", "#d9d9d9", COLOURS[1], COLOURS[3], COLOURS[4]]
    drawn = ax.barh(list(bars), list(bars.values()), color=colours, edgecolor="#555555")
    ax.bar_label(drawn, [write_bytes(size) for size in bars.values()], padding=4, fontsize=10)
    ax.invert_yaxis()
    ax.set_xlim(0, max(bars.values()) * 1.18 or 1)
    ax.set_xticks([])
    ax.tick_params(axis="y", labelsize=10)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    tokens = report.groups[0].tokens
    figure.suptitle(title or f"bytes of keys and values, {tokens:,} tokens in rows", fontsize=13, x=0.01, ha="left")
    return figure


def draw_capacity(curves: Mapping[str, Sequence[CapacityPoint]], *, title: str = "") -> "Figure":
    """Hit rate and evictions of prefix caches against their size.

    Args:
        curves: by name, such as an eviction policy's: one point for each size.
        title: of the picture.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: the curves are no dict.

    Examples:
        >>> figure = draw_capacity({"lru": [CapacityPoint(64, 0.2, 90), CapacityPoint(128, 0.6, 30)]})
        >>> [ax.get_title(loc="left") for ax in figure.axes]
        ['prompt tokens found, %', 'pages evicted']
    """
    import matplotlib.pyplot as plt

    if not isinstance(curves, Mapping):
        raise ValueError(
            f"the curves must be a dict from a name to a list of CapacityPoint, got {type(curves).__name__}"
        )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for (name, points), (colour, marker, line) in zip(curves.items(), MARKS * len(curves), strict=False):
        sizes = [point.num_pages for point in points]
        style = {"color": colour, "marker": marker, "linestyle": line, "label": name, "linewidth": 2}
        left.plot(sizes, [100 * point.hit_rate for point in points], **style)
        right.plot(sizes, [point.evicted_pages for point in points], **style)
    for ax, name in ((left, "prompt tokens found, %"), (right, "pages evicted")):
        ax.set_title(name, fontsize=11, loc="left")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("pages that the cache may keep", fontsize=11)
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=10, frameon=False)
    figure.suptitle(title or "what a larger prefix cache brings", fontsize=13, x=0.01, ha="left")
    return figure
