"""Who runs: rows, pages and priorities as plain numbers. Counts in, a `Schedule` out; it knows no device and no array.

Samples wait in the order of their rank (priority, then first come, first served) for a row and for the pages that they
and the older ones take until the host looks again. Pages are given by the device, step by step, by the same count
(`CacheConfig.pages_mapped`): where a schedule was too hopeful, younger rows give theirs up and nothing else happens.
"""

import bisect
import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from paged_jax.cache.config import CacheConfig
from paged_jax.engine.request import WAITING, Sample

_rank = operator.attrgetter("rank")
Pages = tuple[int, ...]
"""A number of pages in each group of layers."""


class Admission(NamedTuple):
    """A sample that begins; the samples of a request that begin together compute their prompt once, in `source`."""

    sample: Sample
    source: Sample | None


class _Place(NamedTuple):
    row: int  # the first
    outranked: list[Sample]  # who loses rows


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What happens before the next visit, in this order, and how long the visit is."""

    paused: list[tuple[int, Sample]]  # rows, and whose they were: samples of a higher priority need them
    admitted: list[Admission]
    shortage: Pages  # pages that are to be freed: evict cached prefixes
    num_steps: int  # 0: there is nothing to run
    until_one_ends: bool  # somebody waits for a row


@runtime_checkable
class Prefixes(Protocol):
    """What the scheduler asks of cached prefixes; only `take` and `fetch` change anything."""

    def find(self, sample: Sample) -> tuple[int, Pages]:
        """How many tokens of a sample are cached, and the pages of them that could be evicted as long as nobody takes
        them."""
        ...

    def is_coming(self, sample: Sample) -> bool:
        """Whether a running sample is about to compute tokens that this one could then find: it is passed over."""
        ...

    def evictable(self) -> Pages:
        """Pages that cached prefixes would give up."""
        ...

    def fetch(self, sample: Sample) -> bool:
        """Whether more of a sample's pages are being brought from elsewhere: it is passed over until they are there."""
        ...

    def arriving(self) -> Pages:
        """Pages that are needed now for what is brought."""
        ...

    def take(self, sample: Sample) -> None:
        """The sample begins with the pages that were found; they are not evictable now."""
        ...


class NothingElsewhere:
    """Cached prefixes that are brought from nowhere.

    Args:
        num_groups: of layers.
    """

    def __init__(self, num_groups: int):
        self._nothing = (0,) * num_groups

    def fetch(self, sample: Sample) -> bool:
        """No: there is no elsewhere."""
        return False

    def arriving(self) -> Pages:
        """No pages."""
        return self._nothing

    def restore(self) -> Pages:
        """Dispatch the copies of what was brought; returns how many free pages that took."""
        return self._nothing

    def wait(self) -> None:
        """Nothing runs: wait a little for what is being brought."""


class NoPrefixes(NothingElsewhere):
    """Nothing is cached."""

    def find(self, sample: Sample) -> tuple[int, Pages]:
        """No tokens."""
        return 0, self._nothing

    def is_coming(self, sample: Sample) -> bool:
        """No."""
        return False

    def evictable(self) -> Pages:
        """None."""
        return self._nothing

    def take(self, sample: Sample) -> None:
        """Nothing to take."""


class Scheduler:
    """The samples that wait and those that are in rows.

    Args:
        config: sizes of the cache.
        step_tokens: the most tokens of a step.
        visit_steps: the most steps of a visit.
        num_drafts: the most drafts of a row in a step.
    """

    def __init__(self, config: CacheConfig, step_tokens: int, visit_steps: int, num_drafts: int = 0):
        self._config, self._step_tokens, self._visit_steps = config, step_tokens, visit_steps
        self._most_drawn = 1 + num_drafts  # by a row in a step
        self._none = (0,) * len(config.groups)
        # Of each length up to the longest, kept: they are asked for every row in every visit.
        self._mapped, self._held = functools.cache(self._count_mapped), functools.cache(self._count_held)
        self._waiting: list[Sample] = []  # by rank
        self.running: dict[int, Sample] = {}  # by row

    @property
    def waiting(self) -> Sequence[Sample]:
        """By rank."""
        return self._waiting

    def check(self, num_prompt: int, max_new_tokens: int, width: int = 1) -> None:
        """Raises ValueError, with the numbers, for a sample, or this many beams, that could never run, even alone."""
        config, longest = self._config, num_prompt + max_new_tokens - 1  # the last token drawn is never cached
        sizes = f"a prompt of {num_prompt} tokens with max_new_tokens={max_new_tokens}"
        sizes += f" and {width} beams" if width > 1 else ""
        if longest > config.max_length:
            raise ValueError(
                f"{sizes} needs a row of {longest} tokens, but max_pages_per_sequence={config.max_pages_per_sequence} "
                f"pages of {config.page_size} hold {config.max_length}: shorten it or raise max_pages_per_sequence to "
                f"{-(-longest // config.page_size)}"
            )
        for group, pages in zip(config.groups, self._most(num_prompt, longest, width), strict=True):
            if pages > group.num_pages - 1:
                name, of = ("num_pages", "") if group.window is None else ("window_pages", " of layers with a window")
                raise ValueError(
                    f"{sizes} needs {pages} pages{of}, but the pool has {group.num_pages - 1} besides the null page: "
                    f"shorten it or raise {name} to {pages + 1}"
                )

    def add(self, sample: Sample) -> None:
        """Let a sample wait; its row, if it had one, is free."""
        self.remove(sample)
        sample.row, sample.num_cached, sample.steps_ahead = WAITING, 0, 0
        bisect.insort(self._waiting, sample, key=_rank)

    def remove(self, sample: Sample) -> None:
        """Forget a sample, wherever it is; its row is free. Its `row` still says which that was."""
        if self.running.get(sample.row) is sample:
            del self.running[sample.row]
        place = bisect.bisect_left(self._waiting, sample.rank, key=_rank)
        if place < len(self._waiting) and self._waiting[place] is sample:
            del self._waiting[place]

    def plan(self, free: Pages, prefixes: "Prefixes") -> Schedule:
        """Give rows to the samples that are next, as long as there are pages for all that run.

        Args:
            free: pages that were free when the host last looked.
            prefixes: what is cached.
        """
        admitted: list[Admission] = []
        paused: list[tuple[int, Sample]] = []
        fetching: list[Sample] = []
        for sample in list(self._waiting):
            place = self._place(sample)
            if place is None:
                break
            of_request = (a.sample for a in admitted if a.sample.request is sample.request and not a.sample.stop_at)
            source = next(of_request, None)
            if source is None and prefixes.is_coming(sample):
                continue
            num_found, taken = (sample.num_prompt - 1, None) if source else prefixes.find(sample)
            num_shared = num_found - num_found % self._config.page_size  # of a page filled in part it takes a copy
            room = _add(free, prefixes.evictable(), _negative(taken) if taken else self._none)
            if not self._fits(sample, num_shared, room, fetching):
                break
            if source is None and prefixes.fetch(sample):
                fetching.append(sample)
                continue
            if source is None:
                prefixes.take(sample)
            for other in place.outranked:
                del self.running[other.row]
                paused.append((other.row, other))
            self._waiting.remove(sample)
            sample.row, sample.num_cached = place.row, num_shared
            self.running[sample.row] = sample
            admitted.append(Admission(sample, source))
        for _, sample in paused:
            self.add(sample)
        num_steps = self._steps()
        shortage = tuple(max(0, n) for n in _add(self._needed(num_steps), prefixes.arriving(), _negative(free)))
        for sample in self.running.values():
            sample.steps_ahead += num_steps
        return Schedule(paused, admitted, shortage, num_steps, bool(self._waiting))

    def ages(self) -> list[int]:
        """The age of each row, by rank: the device serves the lowest first."""
        by_age = sorted(self.running.values(), key=_rank)
        rows = [row for sample in by_age for row in sample.rows_from(sample.row)]
        order = {row: age for age, row in enumerate(rows)}
        return [order.get(row, len(order)) for row in range(self._config.max_sequences)]

    # ---- counting --------------------------------------------------------------------------------------------

    def _place(self, sample: Sample) -> _Place | None:
        """Free rows for a sample, or those of samples of a lower priority, the last of them; None: it waits.

        Beams take a whole group of rows: the highest, since others take the lowest rows.
        """
        if sample.num_rows > 1:
            size = sample.num_rows
            firsts = reversed(range(0, self._config.max_sequences - size + 1, size))
            in_groups = [_Place(first, self._in_rows(sample.rows_from(first))) for first in firsts]
            places = [place for place in in_groups if all(_is_outranked(other, sample) for other in place.outranked)]
            return min(places, key=lambda place: len(place.outranked), default=None)
        taken = {row for other in self.running.values() for row in other.rows_from(other.row)}
        free = next((row for row in range(self._config.max_sequences) if row not in taken), None)
        if free is not None:
            return _Place(free, [])
        last = max(self.running.values(), key=_rank)
        return _Place(last.row, [last]) if _is_outranked(last, sample) else None

    def _in_rows(self, rows: range) -> list[Sample]:
        """The samples that have some of these rows."""
        return [s for s in self.running.values() if s.row < rows.stop and s.rows_from(s.row).stop > rows.start]

    def _fits(self, sample: Sample, num_shared: int, room: Pages, fetching: Sequence[Sample]) -> bool:
        """Whether there are pages for a sample and all that are served before it; those after it would give up theirs.

        Those whose pages are being brought count as if they ran. The first of all always fits: it can run alone.
        """
        before = [*fetching, *(s for s in self.running.values() if s.rank < sample.rank)]
        after = [s for s in self.running.values() if s.rank > sample.rank]
        growths = [self._growth(s, s.num_cached, self._visit_steps) for s in before]
        needed = _add(self._growth(sample, num_shared, self._visit_steps), *growths)
        room = _add(room, *(self._held(s.num_cached) for s in after))
        return not before or all(map(operator.le, needed, room))

    def _steps(self) -> int:
        """Steps of the next visit: one while a prompt is computed, whose first token is waited for; few if a row is."""
        if not self.running:
            return 0
        if any(sample.num_cached < sample.num_prompt - 1 for sample in self.running.values()):
            return 1
        return max(1, self._visit_steps // 4) if self._waiting else self._visit_steps

    def _needed(self, num_steps: int) -> Pages:
        """The most pages that the running samples take until the end of the next visit, beside those they have."""
        return _add(self._none, *(self._growth(s, s.num_cached, num_steps) for s in self.running.values()))

    def _growth(self, sample: Sample, num_cached: int, num_steps: int) -> Pages:
        """The most pages that a sample takes until the end of the next visit."""
        most_drawn = (sample.steps_ahead + num_steps) * self._most_drawn
        num_known = sample.num_known
        if sample.request.beams is not None:  # of whose tokens the host knows nothing
            num_known = max(num_known, num_cached + 1)
        most = self._most(sample.num_prompt, min(num_known + most_drawn, sample.longest), sample.width)
        return tuple(max(0, pages - held) for pages, held in zip(most, self._held(num_cached), strict=True))

    def _most(self, num_prompt: int, length: int, width: int) -> Pages:
        """The most pages that `width` rows of this length map at once.

        Beams share those of their prompt, which one of them computes; then each computes a token a step.
        """
        if width == 1 or length <= num_prompt:
            return self._mapped(length)
        config, shared = self._config, num_prompt // self._config.page_size
        kept = (shared if group.window is None else 0 for group in config.groups)
        each = (config.pages_mapped(group.window, length, 1) for group in config.groups)
        beams = (same + width * (pages - same) for same, pages in zip(kept, each, strict=True))
        return tuple(map(max, self._mapped(num_prompt), beams))

    def _count_mapped(self, num_tokens: int) -> Pages:
        """The most pages that a row of this length maps at once."""
        groups = self._config.groups
        return tuple(self._config.pages_mapped(group.window, num_tokens, self._step_tokens) for group in groups)

    def _count_held(self, num_cached: int) -> Pages:
        """The fewest pages that a row with this many cached tokens holds."""
        visible = (num_cached if g.window is None else min(num_cached, g.window - 1) for g in self._config.groups)
        return tuple(-(-tokens // self._config.page_size) for tokens in visible)


def _is_outranked(one: Sample, other: Sample) -> bool:
    return one.request.priority > other.request.priority


def _add(*pages: Pages) -> Pages:
    return tuple(map(sum, zip(*pages, strict=True)))


def _negative(pages: Pages) -> Pages:
    return tuple(-n for n in pages)
