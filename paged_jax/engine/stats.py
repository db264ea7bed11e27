"""What an engine did: a bounded log of events, counts, and both for Prometheus."""

import collections
import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from paged_jax.engine.request import Piece, Sample

Kind = Literal["queued", "admitted", "prefilled", "decoded", "preempted", "finished", "evicted", "offloaded", "loaded"]


_TIERS = {"host": "host memory", "store": "the store"}
TIER_FIELDS = ("loaded_tokens", "declined_tokens", "saved_pages", "tier_pages", "tier_bytes")


class Event(NamedTuple):
    """One thing that happened in an `Engine`, which lists the last of them in `events`.

    `count` depends on the kind:

    - "queued" and "prefilled": tokens of the prompt;
    - "admitted": those of them that were cached already;
    - "decoded": tokens of the piece;
    - "finished": all tokens that were drawn;
    - "preempted": how often. It names the sample if the sample has not caught up again when the host looks; otherwise
      only the number is known;
    - "evicted" and "offloaded" (to a slower tier): pages;
    - "loaded" (from a slower tier): tokens.
    """

    seconds: float  # of time.monotonic
    kind: Kind
    request: int | None
    sample: int | None
    count: int
    note: str = ""  # why it finished; which tier


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What an `Engine` did so far, from its method `stats`.

    A prompt counts once for each sample of a request, however often it was computed.
    """

    requests: int = 0  # that were admitted
    samples: int = 0
    finished: int = 0  # samples, whatever the reason
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the prefix cache or shared with another sample of the request
    drawn_tokens: int = 0  # that were handed out
    computed_tokens: int = 0
    drafted_tokens: int = 0  # drafts among these
    accepted_tokens: int = 0  # drafts that were drawn
    preemptions: int = 0  # times that a sample gave up its pages or its row
    recomputed_tokens: int = 0  # whose pages were given up so
    evicted_pages: int = 0
    restarts: int = 0  # times that all samples began again, after an error or with new parameters
    compilations: int = 0
    steps: dict[int, int] = dataclasses.field(default_factory=dict)  # of each token count
    waiting: int = 0  # samples, now
    running: int = 0
    free_pages: tuple[int, ...] = ()  # of each group of layers, when the host last looked
    cached_pages: tuple[int, ...] = ()  # held by the prefix cache
    num_pages: tuple[int, ...] = ()
    loaded_tokens: dict[str, int] = dataclasses.field(default_factory=dict)  # from "host" memory and from the "store"
    declined_tokens: dict[str, int] = dataclasses.field(default_factory=dict)  # that were cheaper to compute
    saved_pages: dict[str, int] = dataclasses.field(default_factory=dict)  # written to the "store", or "dropped"
    tier_pages: dict[str, int] = dataclasses.field(default_factory=dict)  # in "host" memory, now
    tier_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds_to_first_token: float = 0.0  # mean
    seconds_per_token: float = 0.0  # mean, of those after the first

    @property
    def occupancy(self) -> float:
        """Share of the pages that are not free, in the group that has the fewest left."""
        return max((1 - free / of for free, of in zip(self.free_pages, self.num_pages, strict=True)), default=0.0)

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that did not have to be computed."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def summary(self) -> str:
        """What matters most, in one line."""
        parts = [
            f"{self.running} samples run, {self.waiting} wait, {self.finished} have ended",
            f"{self.occupancy:.0%} of the pages in use",
            f"{self.hit_rate:.0%} of the prompt tokens found cached",
            f"{self.preemptions} preemptions",
        ]
        parts += [f"{count} tokens loaded from {_TIERS[tier]}" for tier, count in self.loaded_tokens.items()]
        parts += [f"{count} pages in {_TIERS[tier]}" for tier, count in self.tier_pages.items()]
        parts += [f"{self.saved_pages['store']} pages stored"] if "store" in self.saved_pages else []
        return "; ".join(parts)


class Recorder:
    """Counts, and remembers the last events.

    Args:
        max_events: that are remembered.
    """

    def __init__(self, max_events: int):
        self.events: collections.deque[Event] = collections.deque(maxlen=max_events)
        self.counts: collections.Counter[str] = collections.Counter()
        self._first: dict[Sample, float] = {}  # when the first token of a running sample came
        self._seconds = {"first": 0.0, "rest": 0.0}

    def queued(self, sample: Sample) -> None:
        """A sample waits for a row: since its request was made, or after a restart since now."""
        self._note("queued", sample, sample.num_prompt, seconds=None if sample.was_admitted else sample.request.seconds)

    def admitted(self, sample: Sample, num_cached: int) -> None:
        """A sample got a row; only its first time counts."""
        self._note("admitted", sample, num_cached)
        if sample.was_admitted:
            return
        sample.was_admitted = True
        request = sample.request
        self.counts["requests"] += not any(s.was_admitted for s in request.samples if s is not sample)
        self.counts.update(samples=1, prompt_tokens=sample.num_prompt, cached_tokens=num_cached)

    def handed_out(self, sample: Sample, piece: Piece) -> None:
        """A piece of a sample came; called once for each."""
        now = time.monotonic()
        count = len(piece.tokens)
        self.counts["drawn_tokens"] += count
        if count and sample not in self._first:
            self._first[sample] = now
            self._note("prefilled", sample, sample.num_prompt)
            self._seconds["first"] += now - sample.request.seconds
            self.counts["firsts"] += 1
        if count:
            self._note("decoded", sample, count)

    def finished(self, sample: Sample, reason: str) -> None:
        """A sample ended."""
        self._note("finished", sample, len(sample.drawn), reason)
        self.counts["finished"] += 1
        first = self._first.pop(sample, None)
        if first is not None:
            self._seconds["rest"] += time.monotonic() - first
            self.counts["rest"] += len(sample.drawn) - 1

    def preempted(self, num_times: int, samples: Sequence[Sample] = ()) -> None:
        """Samples gave up their pages or their rows; for some of the times it is known which."""
        for sample in samples:
            self._note("preempted", sample, 1)
        if num_times > len(samples):
            self._note("preempted", None, num_times - len(samples))
        self.counts["preemptions"] += num_times

    def restarted(self) -> None:
        """All samples begin again."""
        self.counts["restarts"] += 1

    def evicted(self, num_pages: int) -> None:
        """Cached pages were given up."""
        if num_pages:
            self._note("evicted", None, num_pages)
            self.counts["evicted_pages"] += num_pages

    def moved(self, kind: Literal["offloaded", "loaded"], tier: str, count: int, sample: Sample | None = None) -> None:
        """Pages went to a slower tier, or came back from it."""
        self._note(kind, sample, count, tier)

    def statistics(self, **now: Any) -> Statistics:
        """All counts; `now` are the fields of the present moment."""
        names = {field.name for field in dataclasses.fields(Statistics)}
        counts = {name: count for name, count in self.counts.items() if name in names}
        return Statistics(
            **counts,
            **now,
            seconds_to_first_token=self._seconds["first"] / max(1, self.counts["firsts"]),
            seconds_per_token=self._seconds["rest"] / max(1, self.counts["rest"]),
        )

    def _note(
        self, kind: Kind, sample: Sample | None, count: int, note: str = "", seconds: float | None = None
    ) -> None:
        who = (None, None) if sample is None else (sample.request.number, sample.number)
        self.events.append(Event(time.monotonic() if seconds is None else seconds, kind, *who, count, note))


def prometheus_text(statistics: Statistics) -> str:
    """The statistics in the text format of Prometheus, by `prometheus_client` (the extra `metrics`).

    Counters end in `_total`; pages carry a label `group`, steps a label `tokens`.

    Examples:
        >>> print(prometheus_text(Statistics(drawn_tokens=7, free_pages=(3,))))
        # HELP ...
        paged_jax_drawn_tokens_total 7.0
        ...
        paged_jax_free_pages{group="0"} 3.0
        ...
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    gauges = {"waiting", "running", "free_pages", "cached_pages", "num_pages"}
    gauges |= {"tier_pages", "tier_bytes", "seconds_to_first_token", "seconds_per_token"}
    labels = {"steps": "tokens"} | dict.fromkeys(TIER_FIELDS, "tier")

    class Collector:
        def collect(self):
            for field in dataclasses.fields(statistics):
                value = getattr(statistics, field.name)
                family = GaugeMetricFamily if field.name in gauges else CounterMetricFamily
                name, help_text = f"paged_jax_{field.name}", field.name.replace("_", " ")
                if isinstance(value, tuple | dict):
                    metric = family(name, help_text, labels=[labels.get(field.name, "group")])
                    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
                        metric.add_metric([str(key)], one)
                    yield metric
                else:
                    yield family(name, help_text, value=value)

    registry = CollectorRegistry()
    registry.register(Collector())
    return generate_latest(registry).decode()
