"""How the samples of an engine use the prefix cache: they find pages, pin them, publish theirs, and give them back.

The index of prefixes lies on the host, the references to pages on the device. A row publishes its pages when it has
computed its prompt, and when it ends. The host reads the ids of these pages with the next snapshot, and only then can
other samples find them. So no id in the index is ever stale, and the host does not wait for the device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from paged_jax.cache.config import CacheConfig
from paged_jax.engine.request import Request, Sample
from paged_jax.engine.runner import Runner
from paged_jax.engine.scheduler import NoPrefixes, NothingElsewhere, Pages, Scheduler
from paged_jax.engine.session import Session
from paged_jax.prefix.digests import Namespace
from paged_jax.prefix.prefix_cache import Match, PrefixCache, Taken


@dataclasses.dataclass(frozen=True)
class Publication:
    """What a row publishes: its first tokens, and what it pins."""

    sample: Sample
    tokens: list[int]
    namespace: Namespace
    taken: Taken
    row_goes_on: bool
    is_fork: bool  # prompts part where it ends


class CachedPrefixes(NothingElsewhere):
    """The prefix cache, as the scheduler and a step of the engine see it.

    Args:
        config: sizes of the cache.
        runner: where pages are attached, published and dropped.
        scheduler: who waits and runs.
        cache: of prefixes; empty.
        version: of the weights.
    """

    def __init__(
        self, config: CacheConfig, runner: Runner, scheduler: Scheduler, cache: PrefixCache, version: int | str
    ):
        super().__init__(len(config.groups))
        self._config, self._runner = config, runner
        self._running, self._waiting = scheduler.running, scheduler.waiting
        self.cache, self._version = cache, version
        self._found: tuple[Sample, Match] | None = None
        self._taken: dict[Sample, Taken] = {}  # of running samples
        self._published: dict[Sample, int] = {}  # tokens of running samples that others find, or soon will
        self._is_found: set[Sample] = set()  # running samples whose prompts others find
        self._kept: dict[Session, Taken] = {}
        self._growing: dict[Session, None] = {}  # of which not all is cached yet
        self._leaving: set[Sample] = set()  # which will find what they publish now

    # ---- what the scheduler asks -----------------------------------------------------------------------------

    def find(self, sample: Sample) -> tuple[int, Pages]:
        """How many tokens of a sample are cached, and the pages of them that could be evicted until it takes them."""
        match = self.cache.lookup(sample.tokens, self.namespace(sample.request))
        self._found = sample, match
        return match.num_tokens, match.num_evictable

    def is_coming(self, sample: Sample) -> bool:
        """Whether others are about to compute, or to publish, whole pages that this one could then find."""
        others = [*self._leaving, *(s for s in self._running.values() if s not in self._is_found)]
        if sample in self._leaving:
            return True
        coming = max((self._coming(sample, other) for other in others), default=0)
        return coming > 0 and coming > self.find(sample)[0]

    def _coming(self, sample: Sample, other: Sample) -> int:
        """Tokens of a sample that it will find once another has published its own."""
        common = self._common(sample, other)
        if not self._config.has_windows:
            return common
        return other.stop_at if common >= other.stop_at else 0

    def evictable(self) -> Pages:
        """Pages that nobody uses."""
        return self.cache.num_evictable

    def take(self, sample: Sample) -> None:
        """Pin what was found for a sample."""
        assert self._found is not None and self._found[0] is sample, "it was looked up just now"
        match = self._found[1]
        self._taken[sample] = self.cache.take(match, counted=not sample.was_admitted)
        if self._config.has_windows:
            others = [s for s in self._waiting[: self._config.max_sequences] if s is not sample]
            parts_at = max([match.parts_at, *(self._common(other, sample) for other in others)])
            sample.stop_at = parts_at if parts_at > max(match.num_tokens, sample.stop_at) else 0

    # ---- a step of the engine --------------------------------------------------------------------------------

    def attach(self, sample: Sample) -> int:
        """Let the row of an admitted sample share what it found; returns the number of tokens."""
        taken = self._taken[sample]
        if taken.num_tokens:
            self._runner.attach(sample.row, taken)
        if taken.num_tokens >= self._whole(sample):
            self._published[sample] = taken.num_tokens
            self._is_found.add(sample)
        return taken.num_tokens

    def evict(self, shortage: Pages) -> Pages:
        """Free pages that nobody uses; returns how many of each group."""
        if not any(shortage):
            return shortage
        dropped = self.cache.evict(shortage)
        while self._kept and any(len(ids) < count for ids, count in zip(dropped, shortage, strict=True)):
            session = next(iter(self._kept))  # what has been kept for longest
            self._growing.pop(session, None)
            given = self.cache.give_back(self._kept.pop(session))
            missing = [max(0, count - len(ids)) for ids, count in zip(dropped, shortage, strict=True)]
            more = self.cache.evict(missing)
            dropped = [[*a, *b, *c] for a, b, c in zip(dropped, given, more, strict=True)]
        self._runner.drop(dropped)
        return tuple(map(len, dropped))

    def watch(self, sample: Sample) -> None:
        """After a visit: publish a prompt that is computed, unpin what the row has given up."""
        taken = self._taken.get(sample)
        if taken is not None and sample.num_cached < max(taken.num_tokens, self._published.get(sample, 0)):
            self._runner.drop(self.cache.give_back(self._taken.pop(sample)))
        whole = self._whole(sample)
        if not self._config.has_windows and sample not in self._published and sample.num_cached >= whole:
            self._publish(sample, whole, row_goes_on=True)

    def leave(self, sample: Sample, row: int) -> None:
        """A sample leaves its row, which still holds its pages: publish them; of beams, those of their prompt."""
        num_known = sample.num_known if sample.request.beams is None else sample.num_prompt
        has_slid = self._config.has_windows and sample.num_cached > num_known
        self._publish(sample, 0 if has_slid else min(sample.num_cached, num_known), row_goes_on=False, row=row)
        self._leaving.add(sample)
        self._taken.pop(sample, None)
        self._published.pop(sample, None)
        self._is_found.discard(sample)

    def insert(self, published: Sequence[tuple[Any, Any]]) -> None:
        """What was published can be found from now on."""
        if not published:
            return
        for publication, handles in published:
            pins = publication.taken if publication.row_goes_on and not publication.taken.is_over else None
            what = publication.tokens, publication.namespace, handles, pins, publication.is_fork
            self._runner.drop(self.cache.insert(*what))
            if publication.row_goes_on and publication.sample in self._published:
                self._is_found.add(publication.sample)
            if not publication.row_goes_on:
                self._leaving.discard(publication.sample)
            if not publication.row_goes_on and not publication.taken.is_over:
                self._runner.drop(self.cache.give_back(publication.taken))
        for session in list(self._growing):
            self.keep(session)

    def keep(self, session: Session) -> None:
        """Keep the pages of a session as it is now, and let go of those that were kept for it before."""
        kept = self._kept.pop(session, None)
        if not session.is_closed:
            namespace = Namespace(session.salt, session.adapter, self._version)
            self._kept[session] = self.cache.keep(session.tokens, namespace)
            self._growing[session] = None
            if self._kept[session].num_tokens >= len(session.tokens) - 1:
                del self._growing[session]
        if kept is not None:
            self._runner.drop(self.cache.give_back(kept))

    def namespace(self, request: Request) -> Namespace:
        """Where the pages of a request are found."""
        return Namespace(request.salt, request.adapter, self._version)

    def _publish(self, sample: Sample, num_tokens: int, row_goes_on: bool, row: int | None = None) -> None:
        taken = self._taken.get(sample) or self.cache.take(self.cache.lookup([0]), counted=False)
        key = Publication(
            sample,
            sample.tokens,
            self.namespace(sample.request),
            taken,
            row_goes_on,
            is_fork=num_tokens == sample.stop_at,
        )
        self._taken[sample] = taken
        self._published[sample] = num_tokens
        self._runner.publish(key, sample.row if row is None else row, num_tokens)

    def _whole(self, sample: Sample) -> int:
        """Tokens of the prompt in whole pages, one token left to compute: a row that goes on copies nothing."""
        return (sample.num_prompt - 1) // self._config.page_size * self._config.page_size

    def _common(self, sample: Sample, other: Sample) -> int:
        """Tokens in whole pages with which the prompts of both begin; 0 where they may not share."""
        size, num_common = self._config.page_size, 0
        ours, theirs = sample.request, other.request
        if self.namespace(ours) != self.namespace(theirs) or theirs.priority > ours.priority:
            return 0
        most = min(self._whole(sample), self._whole(other))
        while num_common < most and _page(ours.prompt, num_common, size) == _page(theirs.prompt, num_common, size):
            num_common += size
        return num_common


class UncachedPrefixes(NoPrefixes):
    """No prefix is cached."""

    def attach(self, sample: Sample) -> int:
        """No tokens."""
        return 0

    def evict(self, shortage: Pages) -> Pages:
        """No pages."""
        return self.evictable()

    def watch(self, sample: Sample) -> None:
        """Nothing is published."""

    def leave(self, sample: Sample, row: int) -> None:
        """Nothing is published."""

    def insert(self, published: Sequence[tuple[Any, Any]]) -> None:
        """Nothing was published."""

    def keep(self, session: Session) -> None:
        """Nothing is kept."""


def _page(tokens: Sequence[int], start: int, size: int) -> Sequence[int]:
    return tokens[start : start + size]
