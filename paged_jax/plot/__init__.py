"""Pictures of the memory: for a notebook by matplotlib (the extra `notebook`), for a terminal as text.

A `draw_...` function makes a figure and returns it; what ends in `_map` or `_tree` is text for a terminal. Those of
pages, forks and bytes take what you have in hand: an `Engine`, a `KVCache`, its `PageTables`. Those of time take an
engine's events, or measurements of yours. Colours go from light to dark, so that they can
be told apart without seeing colour and in print.
"""

from paged_jax.memory import CACHED, FREE, OWNED, page_states
from paged_jax.plot.forks import Branch, draw_forks, fork_tree, sharing_branches
from paged_jax.plot.pages import draw_pages, page_map
from paged_jax.plot.requests import (
    Latencies,
    Span,
    draw_latencies,
    draw_timeline,
    latencies,
    request_spans,
    timeline_map,
)
from paged_jax.plot.totals import CapacityPoint, draw_bytes, draw_capacity, draw_occupancy

__all__ = [
    "CACHED",
    "FREE",
    "OWNED",
    "Branch",
    "CapacityPoint",
    "Latencies",
    "Span",
    "draw_bytes",
    "draw_capacity",
    "draw_forks",
    "draw_latencies",
    "draw_occupancy",
    "draw_pages",
    "draw_timeline",
    "fork_tree",
    "latencies",
    "page_map",
    "page_states",
    "request_spans",
    "sharing_branches",
    "timeline_map",
]
