"""What happened to requests, from the event log of an engine: when they waited, and when their tokens came."""

import collections
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.text import Text

from paged_jax.engine.stats import Event

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From light to dark: what costs a user time, what costs the device time, what brings tokens.
SPAN_COLOURS = {"waiting": "#d9d9d9", "prefill": "#f8dc8a", "decode": "#2b6ca8", "preempted": "#d55e00"}
SPAN_MARKS = {"waiting": "·", "prefill": "▒", "decode": "█", "preempted": "x"}
SPAN_HATCHES = {"waiting": None, "prefill": "///", "decode": None, "preempted": "xxx"}


class Span(NamedTuple):
    """A time in which a sample did one thing; see `request_spans`."""

    request: int
    sample: int
    kind: str  # "waiting", "prefill", "decode" or "preempted": until its tokens are computed again
    start: float  # seconds since the first event
    stop: float


class Latencies(NamedTuple):
    """How long users waited, in seconds, as `latencies` measures it."""

    first_token: np.ndarray  # of each sample, from its request to its first token
    gaps: np.ndarray  # between the pieces of a sample that follow each other


def request_spans(source: Any) -> list[Span]:
    """What each sample did, from the beginning of the log to its end.

    Args:
        source: an `Engine`, or a list of its events.

    Raises:
        ValueError: there are no events.

    Examples:
        >>> log = [Event(0.0, "queued", 0, 0, 5), Event(0.2, "admitted", 0, 0, 0), Event(0.5, "prefilled", 0, 0, 5),
        ...        Event(0.5, "decoded", 0, 0, 1), Event(0.75, "decoded", 0, 0, 4), Event(1.0, "finished", 0, 0, 5)]
        >>> for span in request_spans(log):  # or of an engine
        ...     print(span.kind, span.start, span.stop)
        waiting 0.0 0.2
        prefill 0.2 0.5
        decode 0.5 1.0
    """
    events = _events(source)
    spans: list[Span] = []
    doing: dict[tuple[int, int], tuple[str, float]] = {}
    begin = min((event.seconds for event in events), default=0.0)

    def change(key: tuple[int, int], kind: str | None, seconds: float) -> None:
        before = doing.pop(key, None)
        if before is not None and seconds > before[1]:
            spans.append(Span(*key, before[0], before[1] - begin, seconds - begin))
        if kind is not None:
            doing[key] = kind, seconds

    next_kind = {"queued": "waiting", "admitted": "prefill", "prefilled": "decode", "preempted": "preempted"}
    for event in events:
        if event.request is None or event.sample is None:
            continue
        key = event.request, event.sample
        if event.kind == "decoded" and doing.get(key, ("decode", 0))[0] != "decode":
            change(key, "decode", event.seconds)  # what it had lost is computed again
        elif event.kind == "finished":
            change(key, None, event.seconds)
        elif event.kind in next_kind:
            change(key, next_kind[event.kind], event.seconds)
    last = max((event.seconds for event in events), default=0.0)
    for key in list(doing):
        change(key, None, last)
    return sorted(spans, key=lambda span: (span.request, span.sample, span.start))


def latencies(source: Any) -> Latencies:
    """How long users waited for first tokens, and between pieces.

    Args:
        source: an `Engine`, or a list of its events.

    Raises:
        ValueError: there are no events.

    Examples:
        >>> log = [Event(0.0, "queued", 0, 0, 5), Event(0.2, "admitted", 0, 0, 0), Event(0.5, "prefilled", 0, 0, 5),
        ...        Event(0.5, "decoded", 0, 0, 1), Event(0.75, "decoded", 0, 0, 4), Event(1.0, "finished", 0, 0, 5)]
        >>> latencies(log).first_token.tolist(), latencies(log).gaps.tolist()
        ([0.5], [0.25])
    """
    queued: dict[tuple[int | None, int | None], float] = {}
    last: dict[tuple[int | None, int | None], float] = {}
    first, gaps = [], []
    for event in _events(source):
        key = event.request, event.sample
        if event.kind == "queued":
            queued.setdefault(key, event.seconds)
        elif event.kind == "prefilled" and key in queued:
            first.append(event.seconds - queued[key])
        elif event.kind == "decoded":
            if key in last:
                gaps.append(event.seconds - last[key])
            last[key] = event.seconds
    return Latencies(np.array(first), np.array(gaps))


def draw_timeline(source: Any, *, title: str = "") -> "Figure":
    """A bar a sample: waiting, prefill, decode, preempted. Lines mark preemptions whose sample is not known.

    Args:
        source: an `Engine`, or a list of its events.
        title: of the picture.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: there are no events.

    Examples:
        >>> log = [Event(0.0, "queued", 0, 0, 5), Event(0.2, "admitted", 0, 0, 0), Event(0.5, "prefilled", 0, 0, 5),
        ...        Event(0.5, "decoded", 0, 0, 1), Event(0.75, "decoded", 0, 0, 4), Event(1.0, "finished", 0, 0, 5)]
        >>> figure = draw_timeline(log)
        >>> figure.axes[0].get_xlabel()
        'time since the first request, s'
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    events, spans = _events(source), request_spans(source)
    scale, unit = _time_unit(max((span.stop for span in spans), default=0.0))
    lines = _lines(spans)
    figure, ax = plt.subplots(figsize=(9, 1.9 + 0.28 * len(lines)), layout="constrained")
    for span in spans:
        place = lines[span.request, span.sample]
        style = {"color": SPAN_COLOURS[span.kind], "hatch": SPAN_HATCHES[span.kind], "edgecolor": "#555555"}
        ax.barh(place, (span.stop - span.start) * scale, left=span.start * scale, height=0.8, linewidth=0.4, **style)
    begin = min((event.seconds for event in events), default=0.0)
    unnamed = [event.seconds - begin for event in events if event.kind == "preempted" and event.request is None]
    for seconds in unnamed:
        ax.axvline(seconds * scale, color=SPAN_COLOURS["preempted"], linestyle=":", linewidth=1.5)
    step = max(1, -(-len(lines) // 32))
    shown = list(lines.items())[::step]
    ax.set_yticks([place for _, place in shown], [f"{request}.{sample}" for (request, sample), _ in shown], fontsize=9)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.set_xlabel(f"time since the first request, {unit}", fontsize=11)
    ax.set_ylabel("request.sample", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    legend: list[Any] = [
        Patch(facecolor=colour, hatch=SPAN_HATCHES[kind], edgecolor="#555555", label=kind)
        for kind, colour in SPAN_COLOURS.items()
    ]
    if unnamed:
        label = "preempted and computed again at once"
        legend.append(Line2D([], [], label=label, color=SPAN_COLOURS["preempted"], linestyle=":"))
    figure.legend(handles=legend, ncols=len(legend), fontsize=10, frameon=False, loc="outside lower center")
    ax.set_title(title or "what each sample did", fontsize=13, loc="left")
    return figure


def timeline_map(source: Any, *, width: int = 64) -> Text:
    """The timeline for a terminal: `·` waiting, `▒` prefill, `█` decode, `x` preempted; a line a sample.

    Args:
        source: an `Engine`, or a list of its events.
        width: characters of the whole time.

    Raises:
        ValueError: there are no events.

    Examples:
        >>> log = [Event(0.0, "queued", 0, 0, 5), Event(0.2, "admitted", 0, 0, 0), Event(0.5, "prefilled", 0, 0, 5),
        ...        Event(0.5, "decoded", 0, 0, 1), Event(0.75, "decoded", 0, 0, 4), Event(1.0, "finished", 0, 0, 5)]
        >>> print(timeline_map(log, width=20))
        0.0 ····▒▒▒▒▒▒██████████
            · waiting  ▒ prefill  █ decode  x preempted; 1.0 s in all
    """
    spans = request_spans(source)
    last = max((span.stop for span in spans), default=1.0)
    lines = _lines(spans)
    cells = {key: [" "] * width for key in lines}
    for span in spans:
        start, stop = (int(seconds / last * width) for seconds in (span.start, span.stop))
        cells[span.request, span.sample][start : max(stop, start + 1)] = SPAN_MARKS[span.kind] * max(stop - start, 1)
    names = {key: f"{key[0]}.{key[1]}" for key in lines}
    longest = max(map(len, names.values()), default=0)
    text = [f"{names[key]:>{longest}} {''.join(cells[key][:width]).rstrip()}" for key in lines]
    scale, unit = _time_unit(last)
    text.append(f"{'':>{longest}} · waiting  ▒ prefill  █ decode  x preempted; {last * scale:.1f} {unit} in all")
    return Text("\n".join(text))


def draw_latencies(source: Any, *, title: str = "") -> "Figure":
    """Time to the first token, and between pieces: what share of them came within a time.

    Args:
        source: an `Engine`, or a list of its events.
        title: of the picture.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: there are no events.

    Examples:
        >>> log = [Event(0.0, "queued", 0, 0, 5), Event(0.2, "admitted", 0, 0, 0), Event(0.5, "prefilled", 0, 0, 5),
        ...        Event(0.5, "decoded", 0, 0, 1), Event(0.75, "decoded", 0, 0, 4), Event(1.0, "finished", 0, 0, 5)]
        >>> figure = draw_latencies(log)
        >>> figure.axes[0].get_title(loc="left")
        'time to first token, ms; 1 of them'
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    names = "time to first token", "gap between pieces"
    for ax, values, name in zip(axes, latencies(source), names, strict=True):
        scale, unit = _time_unit(float(np.max(values, initial=0.0)))
        ordered = np.sort(values) * scale
        ax.step(ordered, 100 * np.arange(1, len(ordered) + 1) / max(1, len(ordered)), where="post", color="#0b2f5b")
        for share, colour, line in ((50, "#009e73", "--"), (99, "#d55e00", ":")):
            if len(ordered):
                value = float(np.percentile(ordered, share))
                ax.axvline(value, color=colour, linestyle=line, label=f"{share} % within {value:.3g} {unit}")
        ax.set_title(f"{name}, {unit}; {len(ordered)} of them", fontsize=11, loc="left")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(ordered):
            ax.legend(fontsize=10, loc="lower right")
    axes[0].set_ylabel("share that came within, %", fontsize=11)
    figure.suptitle(title or "how long users waited", fontsize=13, x=0.01, ha="left")
    return figure


def _events(source: Any) -> list[Event]:
    events = getattr(source, "events", source)
    events = list(events) if isinstance(events, Iterable) else [events]
    if not all(isinstance(event, Event) for event in events):
        raise ValueError(
            f"got an object of type {type(source).__name__}, which has no events: pass an Engine, its events, or a "
            "list of some of them"
        )
    return sorted(events, key=lambda event: event.seconds)


def _lines(spans: list[Span]) -> dict[tuple[int, int], int]:
    """The line of each sample, in the order of requests."""
    found = collections.OrderedDict.fromkeys((span.request, span.sample) for span in spans)
    return {key: place for place, key in enumerate(found)}


def _time_unit(longest: float) -> tuple[float, str]:
    return (1000.0, "ms") if longest < 1 else (1.0, "s")
