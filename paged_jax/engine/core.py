"""The heart of the engine: one step, and everything that it changes.

What the next step stands on is small: the requests, and what each sample was given so far. All else, from the rows on
the device to the text that is held back, follows from it. So a step that was interrupted anywhere, by whatever was
raised, is mended by beginning anew from there.
"""

import collections
import dataclasses
import itertools
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax

from paged_jax.cache.config import CacheConfig
from paged_jax.decoding.hypotheses import NOTHING
from paged_jax.decoding.rows import NO_ROW, Counters, Finish
from paged_jax.engine.output import Output, Tokenizer
from paged_jax.engine.prefixes import CachedPrefixes, UncachedPrefixes
from paged_jax.engine.request import WAITING, Piece, Request, Sample
from paged_jax.engine.runner import Found, Runner, Snapshot, Start
from paged_jax.engine.scheduler import Admission, Schedule, Scheduler
from paged_jax.engine.session import Session
from paged_jax.engine.stats import Recorder
from paged_jax.engine.stream import Stream
from paged_jax.engine.tiered import TieredPrefixes
from paged_jax.prefix.prefix_cache import PrefixCache
from paged_jax.store.tiers import Tiers

_REASONS = {
    Finish.UNFINISHED: None,
    Finish.STOP_TOKEN: "stop",
    Finish.MAX_TOKENS: "length",
    Finish.TOO_LONG: "length",
}
PREFILL_TOKENS = 16  # a visit with at least this many tokens a step is a measurement of how fast prompts are computed


@dataclasses.dataclass
class Visit:
    """What the host knows of a visit that it has dispatched: `freed` pages were freed before it."""

    num_steps: int
    rows: dict[int, Sample]
    freed: tuple[int, ...]
    dispatched: float = 0.0  # of time.perf_counter


class Core:
    """Requests that have not ended, and the step that serves them.

    `queue`, `abort`, `claim` and `sessions` may be used from any thread, while a step runs in another.

    Args:
        runner: the device.
        tokenizer: of the text; None: there is none.
        make_cache: an empty prefix cache; None: no prefix is cached.
        recorder: of what happens.
        tiers: where pages go that leave the pool; None: nowhere.
        version: of the parameters.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        make_cache: Callable[[], PrefixCache] | None,
        recorder: Recorder,
        tiers: Tiers | None = None,
        version: int | str = 0,
    ):
        self.runner, self.recorder, self.tiers = runner, recorder, tiers
        self.requests: dict[int, Request] = {}  # that have not ended
        self._known: weakref.WeakValueDictionary[int, Request] = weakref.WeakValueDictionary()  # and whose streams live
        self.pieces: collections.deque[Piece] = collections.deque()  # of requests that no stream claimed
        self.sessions: collections.deque[Session] = collections.deque()  # that changed since the last step
        self.version = version
        self._config: CacheConfig = runner.config
        self._tokenizer, self._make_cache = tokenizer, make_cache
        self._has_logprobs = runner.stepper.num_logprobs is not None
        self._news: collections.deque[Request] = collections.deque()  # added or aborted since the last step
        self._aborted: set[int] = set()  # since the last step: of these no piece is given any more
        self._stepping = threading.RLock()
        self._is_interrupted = False  # the last step did not come to its end
        self._committing: collections.deque[tuple[Sample, Piece, int]] = collections.deque()  # at most one
        self._begin()

    def _begin(self) -> None:
        """All that can be made anew: everything but the requests."""
        stepper = self.runner.stepper
        sizes = self._config, stepper.token_counts[-1], self.runner.visit_steps, stepper.num_drafts
        self.scheduler = Scheduler(*sizes)
        self.cache = None if self._make_cache is None else self._make_cache()
        self._prefixes: CachedPrefixes | UncachedPrefixes = UncachedPrefixes(len(self._config.groups))
        if self.cache is not None:
            parts = self._config, self.runner, self.scheduler, self.cache, self.version
            self._prefixes = TieredPrefixes(*parts, self.tiers, self.recorder) if self.tiers else CachedPrefixes(*parts)
        self._freed = (0,) * len(self._config.groups)  # pages, before the last visit
        self.free = tuple(group.num_pages - 1 for group in self._config.groups)  # pages, when the host last looked
        self._ended: list[Sample] = []  # whose rows were not stopped yet
        self._counters: Counters | None = None  # of the device, when the host last looked
        self._is_stuck = False  # the last visit that was read computed nothing
        self._last_read = 0.0

    # ---- requests --------------------------------------------------------------------------------------------

    def queue(self, request: Request, is_claimed: bool = False) -> Stream:
        """Serve a request from the next step on; the stream is that of all, unless it claims its pieces."""
        if is_claimed:
            request.pieces = collections.deque()
        self._known[request.number] = self.requests[request.number] = request
        self._news.append(request)
        return Stream(request.pieces, lambda: self._has_ended(request), self._is_void, self.advance)

    def abort(self, number: int) -> None:
        """Take back what was put out of a request, and end it with the next step."""
        request = self._known.get(number)
        if request is not None:
            self._aborted.add(number)
            request.is_aborted = True
            self._news.append(request)
        self._recall(number)

    def claim(self, number: int) -> Stream:
        """The pieces of one request from now on.

        Raises:
            ValueError: there is no such request.
        """
        request = self.requests.get(number)
        if request is not None and request.pieces is self.pieces:
            request.pieces = collections.deque()
        pieces = collections.deque() if request is None else request.pieces
        pieces.extendleft(reversed(self._recall(number)))
        if request is None and not pieces:
            raise ValueError(f"request {number} is not here: it was never added, or its last piece was taken")

        def has_ended() -> bool:
            ended = request is None or self._has_ended(request)
            pieces.extendleft(reversed(self._recall(number)))  # that a step put out while this stream began
            return ended

        return Stream(pieces, has_ended, self._is_void, self.advance)

    def stream(self) -> Stream:
        """The pieces that nobody claimed."""
        return Stream(self.pieces, self._is_idle, self._is_void, self.advance)

    def take(self) -> list[Piece]:
        """The pieces of that stream that are there; all stay, if anything is raised."""
        taken: list[Piece] = []
        try:  # one call takes all: before it nothing is taken, and after it `taken` holds them
            taken.extend(map(collections.deque.popleft, itertools.repeat(self.pieces, len(self.pieces))))
            return list(itertools.filterfalse(self._is_void, taken))  # no loop, in which an error may miss the handler
        except BaseException:
            self.pieces.extendleft(reversed(taken))
            raise

    def _is_void(self, piece: Piece) -> bool:
        return piece.request in self._aborted

    def _has_ended(self, request: Request) -> bool:
        """No piece of a request will be handed out any more."""
        return request.is_aborted or request.number not in self.requests

    def _is_idle(self) -> bool:
        """Nothing will come in `pieces` any more."""
        return all(request.pieces is not self.pieces for request in list(self.requests.values()))

    def output(self, request: Request) -> Output:
        """The text of a sample, from its beginning."""
        return Output(self._tokenizer, request.prompt, request.params, request.echo)

    def begin_anew(self, change: Callable[[], None]) -> None:
        """Change something between two steps on which all that was computed depends."""
        with self._stepping:
            self._is_interrupted = True
            change()

    def close(self) -> None:
        """Abort all requests, and close the tiers; not in the middle of a step of another thread."""
        with self._stepping:
            try:
                for number in list(self.requests):
                    self.abort(number)
                while self.requests:
                    self.advance()
            finally:
                if self.tiers is not None:
                    self.tiers.close()

    def _recall(self, number: int) -> list[Piece]:
        """Take back the pieces of a request that were put out for everybody."""
        pieces = [piece for piece in list(self.pieces) if piece.request == number]
        for piece in pieces:
            self.pieces.remove(piece)
        return pieces

    # ---- a step ----------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One step. Whatever it raises, the next one begins from what was handed out."""
        with self._stepping:
            if self._is_interrupted:
                self._start_again()
            self._is_interrupted = True
            self._listen()  # to what was added and aborted
            self._retire()  # the rows of samples that have ended
            schedule = self._admit()  # samples to rows, by counts
            self._dispatch(schedule)  # the next visit, before the last one is read
            self._hand_out()  # what the last one drew
            self._retire()
            self._is_interrupted = False

    def _start_again(self) -> None:
        """After a step that was interrupted anywhere: nothing is trusted but the requests and what they were given."""
        self.recorder.restarted()
        self.runner.reset()
        self._begin()
        if self._committing:
            self._apply()
        for request in list(self.requests.values()):
            if request.is_finished and not request.is_aborted:
                del self.requests[request.number]  # its last piece was handed out
                continue
            for sample in request.samples:
                sample.row, sample.stop_at = WAITING, 0
                sample.output = self.output(request)
                sample.num_told = 0
            self._news.append(request)

    def _listen(self) -> None:
        while self._news:
            request = self._news[0]
            for sample in request.samples:
                if sample.finish_reason is None and request.is_aborted:
                    self._end(sample, "abort")
                elif sample.finish_reason is None:
                    self.scheduler.add(sample)
                    self.recorder.queued(sample)
            if request.is_aborted:
                self.requests.pop(request.number, None)
                self._recall(request.number)
                if request.pieces is not self.pieces:
                    request.pieces.clear()
                self._aborted.discard(request.number)
            self._news.popleft()
        while self.sessions:
            self._prefixes.keep(self.sessions[0])
            self.sessions.popleft()

    def _admit(self) -> Schedule:
        freed = [visit.freed for visit in self.runner.unread]
        free = tuple(map(sum, zip(self.free, *freed, strict=True)))  # with what visits on their way have freed
        schedule = self.scheduler.plan(free, self._prefixes)
        for row, sample in schedule.paused:
            self._prefixes.leave(sample, row)
            self.recorder.preempted(1, [sample])
        if schedule.paused:
            self.runner.stop([each for row, sample in schedule.paused for each in sample.rows_from(row)])
        for sample, source in schedule.admitted:
            num_found = sample.num_prompt - 1 if source else self._prefixes.attach(sample)
            self.recorder.admitted(sample, num_found)
        if schedule.admitted:
            starts = [_start(admission) for admission in schedule.admitted]
            self.runner.start(starts, self.scheduler.ages())
        evicted = self._prefixes.evict(schedule.shortage)
        self.recorder.evicted(sum(evicted))
        self._freed = tuple(map(operator.sub, evicted, self._prefixes.restore()))
        return schedule

    def _dispatch(self, schedule: Schedule) -> None:
        if schedule.num_steps:
            visit = Visit(schedule.num_steps, dict(self.scheduler.running), self._freed)
            self.runner.visit(visit, schedule.num_steps, schedule.until_one_ends)
            visit.dispatched = time.perf_counter()  # programs are compiled before that
        else:
            self.free = tuple(map(operator.add, self.free, self._freed))  # no visit will say
            self._prefixes.wait()

    def _hand_out(self) -> None:
        """Read the visit before the one that was just dispatched."""
        if self.runner.num_unread > 1:
            self._read()
        if self._is_stuck:
            self._begin_searches_again()

    def _read(self) -> None:
        visit, snapshot, published = self.runner.read()
        self._prefixes.insert(published)
        self.free = tuple(snapshot.num_free.tolist())
        lost = [sample for row, sample in visit.rows.items() if self._has_lost_pages(sample, row, snapshot)]
        self._count(snapshot.counters, visit, lost)
        for row, sample in visit.rows.items():
            if self.scheduler.running.get(row) is sample:  # else it was aborted or paused meanwhile
                sample.steps_ahead -= visit.num_steps
                sample.num_cached = int(snapshot.lengths[row])
                if sample.stop_at:
                    self._pass_on(sample, row, bool(snapshot.finish[row]))
                    continue
                if sample.request.beams is None:
                    self._commit(sample, self._piece(sample, row, snapshot))
                elif (found := snapshot.found) is not None and found.has_ended[row // sample.num_rows]:
                    sample.held = dict(enumerate(self._sequences(sample, row // sample.num_rows, found)))
                    self._commit(sample, sample.held[0])
                if self.scheduler.running.get(row) is sample:
                    self._prefixes.watch(sample)

    def _has_lost_pages(self, sample: Sample, row: int, snapshot: Snapshot) -> bool:
        """Whether a sample that goes on has fewer tokens cached than when the host last looked."""
        goes_on = self.scheduler.running.get(row) is sample and snapshot.finish[row] == Finish.UNFINISHED
        return bool(goes_on) and int(snapshot.lengths[row]) < sample.num_cached

    def _count(self, counters: Counters, visit: Visit, preempted: list[Sample]) -> None:
        """What the device did since the host last looked; these samples lost pages meanwhile, and perhaps others."""
        before, counts = self._counters, self.recorder.counts
        new = counters if before is None else jax.tree.map(operator.sub, counters, before)
        self._counters = counters
        self._is_stuck = int(new.computed_tokens) == 0 < int(sum(new.steps))
        num_times = int(new.preemptions)
        self.recorder.preempted(num_times, preempted[:num_times])
        start, self._last_read = max(visit.dispatched, self._last_read), time.perf_counter()
        if self.tiers is not None:
            self.tiers.visits.measured(1, self._last_read - start)
        if self.tiers is not None and new.computed_tokens >= PREFILL_TOKENS * visit.num_steps:
            self.tiers.prefill.measured(int(new.computed_tokens), self._last_read - start)
        names = "computed_tokens", "recomputed_tokens", "drafted_tokens", "accepted_tokens"
        counts.update({name: int(getattr(new, name)) for name in names})
        counts.update({f"steps {t}": int(n) for t, n in zip(self.runner.stepper.token_counts, new.steps, strict=True)})

    def _pass_on(self, sample: Sample, row: int, is_there: bool) -> None:
        """A sample that came to where prompts part leaves its row for others to find its pages; it waits again."""
        if is_there:
            self._prefixes.leave(sample, row)
            self.scheduler.add(sample)
            self.recorder.queued(sample)
            self.runner.stop([row])

    def _begin_searches_again(self) -> None:
        """Nobody could go on: beams that gave up pages to older samples share them no longer, and need too many.

        From their prompts on they share them again, and the oldest always has enough.
        """
        while self.runner.num_unread:
            self._read()
        self._is_stuck = False
        for row, sample in list(self.scheduler.running.items()):
            if sample.request.beams is not None:
                self._prefixes.leave(sample, row)
                self.runner.stop(sample.rows_from(row))
                self.scheduler.add(sample)
                self.recorder.preempted(1, [sample])

    def _retire(self) -> None:
        for sample in self._ended:
            self._prefixes.leave(sample, sample.row)
        if self._ended:
            self.runner.stop([row for sample in self._ended for row in sample.rows_from(sample.row)])
            self._ended = []
        if not self.scheduler.running:  # then nothing is gained by reading late
            while self.runner.num_unread:
                self._read()
            while self.runner.has_notes:
                self._prefixes.insert(self.runner.read_published())

    # ---- pieces ----------------------------------------------------------------------------------------------

    def _piece(self, sample: Sample, row: int, snapshot: Snapshot) -> Piece:
        """What a sample drew in a visit."""
        request, count = sample.request, int(snapshot.num_drawn[row])
        tokens = snapshot.tokens[row, :count].tolist()
        reason = _REASONS[Finish(int(snapshot.finish[row]))]
        try:
            if sample.num_told < len(sample.drawn):  # it began anew, and so did its text
                sample.output.push(sample.drawn)
            text, count, is_stopped = sample.output.push(tokens, is_last=reason is not None)
            sample.num_told = len(sample.drawn) + count
        except Exception as error:  # whatever a tokenizer raises, it concerns this sample alone
            return Piece(request.number, sample.number, (), "", (), (), "error", f"{type(error).__name__}: {error}")
        tops = snapshot.top_tokens[row, :count].tolist(), snapshot.top_logprobs[row, :count].tolist()
        return Piece(
            request=request.number,
            sample=sample.number,
            tokens=tuple(tokens[:count]),
            text=text,
            logprobs=tuple(snapshot.logprobs[row, :count].tolist()) if self._has_logprobs else (),
            top_logprobs=tuple(tuple(zip(*pair, strict=True)) for pair in zip(*tops, strict=True)),
            finish_reason="stop" if is_stopped else reason,
        )

    def _sequences(self, sample: Sample, group: int, found: Found) -> list[Piece]:
        """What a beam search has found, the best first; a piece without tokens if there is nothing."""
        request, pieces = sample.request, []
        each = zip(*(x[group].tolist() for x in found.sequences), strict=True)
        for tokens, logprobs, length, score, is_stopped in list(each)[: request.num_wanted]:
            if score > NOTHING or not pieces:
                given = tuple(tokens[:length]), "", tuple(logprobs[:length]), (), "stop" if is_stopped else "length"
                piece = Piece(request.number, len(pieces), *given, score=score)
                try:
                    text = self.output(request).push(tokens[:length], is_last=True).text
                    pieces.append(dataclasses.replace(piece, text=text))
                except Exception as error:  # as for samples
                    what = f"{type(error).__name__}: {error}"
                    pieces.append(dataclasses.replace(piece, finish_reason="error", error=what))
        return pieces

    def _commit(self, sample: Sample, piece: Piece) -> None:
        """Hand out a piece, wholly or not at all: a step that is interrupted here is completed by the next one."""
        if piece.tokens or piece.text or piece.finish_reason:
            self._committing.append((sample, piece, len(sample.drawn)))
            self._apply()

    def _apply(self) -> None:
        sample, piece, start = commit = self._committing[0]
        request = sample.request
        sample.drawn[start:] = piece.tokens
        sample.logprobs[start:] = piece.logprobs
        sample.finish_reason = piece.finish_reason
        sample.held[start] = piece
        self.recorder.handed_out(sample, piece)
        if piece.finish_reason is not None:
            self._end(sample, piece.finish_reason)
        pieces = request.chosen() if request.is_held else [piece]
        given = [] if request.is_aborted else pieces
        # One call hands it out and forgets the commit, so that an interrupt comes before both or after both.
        forget: Iterator[Any] = iter(self._committing.popleft, commit)  # yields nothing
        request.pieces.extend(itertools.chain(given, forget))
        if request.is_finished:  # until here it has work to be done, so whoever was interrupted comes back for it
            self.requests.pop(request.number, None)

    def _end(self, sample: Sample, reason: str) -> None:
        sample.finish_reason = reason
        self.recorder.finished(sample, reason)
        self.scheduler.remove(sample)
        if sample.row != WAITING:
            self._ended.append(sample)


def _start(admission: Admission) -> Start:
    sample, source = admission
    row = NO_ROW if source is None else source.row
    params, tokens, num_prompt = sample.request.params, sample.tokens, sample.num_prompt
    if sample.stop_at:  # it ends there, with a token that nobody gets
        num_prompt, tokens = sample.stop_at, tokens[: sample.stop_at]
        params = dataclasses.replace(params, max_new_tokens=1, min_new_tokens=0)
    beams = None if sample.stop_at else sample.request.beams
    return Start(sample.row, tokens, num_prompt, params, sample.number, row, beams)
