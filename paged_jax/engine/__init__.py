"""The engine: requests that come and go, text that streams, prefixes that are found again."""

from paged_jax.engine.engine import Engine
from paged_jax.engine.request import Completion, Piece
from paged_jax.engine.stats import Event, Statistics, prometheus_text

__all__ = ["Completion", "Engine", "Event", "Piece", "Statistics", "prometheus_text"]
