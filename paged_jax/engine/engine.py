"""The engine: any number of requests through a batch of fixed size."""

import collections
import functools
import itertools
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_tables import PageTables
from paged_jax.decoding.rows import NO_ROW, Counters, Finish
from paged_jax.decoding.step import Stepper, token_counts_for
from paged_jax.engine.intake import Intake, Prompt, as_batch, find_folder
from paged_jax.engine.output import Output, Tokenizer
from paged_jax.engine.prefixes import CachedPrefixes, UncachedPrefixes
from paged_jax.engine.request import Completion, Piece, Request, Sample
from paged_jax.engine.runner import Runner, Snapshot, Start
from paged_jax.engine.scheduler import Admission, Scheduler
from paged_jax.engine.stats import Event, Recorder, Statistics
from paged_jax.engine.stream import Stream
from paged_jax.forward import Forward
from paged_jax.prefix.policies import LeastRecentlyUsed, Policy
from paged_jax.prefix.prefix_cache import PrefixCache
from paged_jax.sampling import Processor, SamplingParams

LONG_BATCH = 32  # prompts, from which on a bar shows how far they are
_REASONS = {
    Finish.UNFINISHED: None,
    Finish.STOP_TOKEN: "stop",
    Finish.MAX_TOKENS: "length",
    Finish.TOO_LONG: "length",
}


class Engine:
    """A batch of fixed size through which any number of requests pass.

    Requests are served by priority, then first come, first served. Prompts are prefilled in chunks beside the rows that
    decode; the samples of a request share the pages of its prompt. When pages run short, the newest samples give theirs
    up and are computed again later, to the same tokens: a draw depends on seed, sample number and position alone.

    Whatever raises, and whenever, in a step, Ctrl-C included: every request keeps what it was given so far, and the
    next step starts all of them again from there, on an empty cache.

    `add_request`, `abort` and streams may be used from any thread.

    Args:
        forward: the decoder, see `paged_jax.Forward`.
        params: its parameters, any pytree. Split over a mesh axis "model", they say where the pages go: each device
            holds those of its own KV heads.
        config: sizes of the cache.
        tokenizer: from text to tokens and back; None: prompts are token ids, and pieces have no text.
        stop_tokens: end every sample, beside those of its request.
        token_counts: of the steps, see `Stepper`; longer prompts are cut at the largest. None: some for so many rows.
        visit_steps: the most steps between two looks of the host, and so the most tokens of a piece.
        processor: changes the logits of every row, see `paged_jax.sampling.Processor`.
        processor_state: of all rows before their first token, where the processor has one.
        num_logprobs: how many of the most likely tokens come with each token; None: no log-probabilities at all.
        max_stop_tokens: the most stop tokens of a request, beside the engine's.
        max_bias_tokens: the most tokens that a request biases or forbids.
        prefix_cache: keep the pages of prompts and answers for later prompts that begin alike.
        eviction: which of them go first; see `paged_jax.prefix.policies`.
        max_kept_pages: the most pages that sessions keep; None: half of those of the pool.
        max_events: of the log, which forgets the oldest.

    Example:
        >>> engine = Engine.from_pretrained(models.DEMO)
        >>> engine.generate(["import os\\n"], SamplingParams(max_new_tokens=8))[0][0].text
        >>> engine.add_request("class Node:\\n", SamplingParams(max_new_tokens=8))
        >>> for piece in engine.stream():
        ...     print(piece.text, end="")
    """

    def __init__(
        self,
        forward: Forward,
        params: Any,
        config: CacheConfig,
        tokenizer: Tokenizer | None = None,
        *,
        stop_tokens: Sequence[int] = (),
        token_counts: tuple[int, ...] | None = None,
        visit_steps: int = 8,
        processor: Processor | None = None,
        processor_state: Any = None,
        num_logprobs: int | None = 0,
        max_stop_tokens: int = 8,
        max_bias_tokens: int = 0,
        prefix_cache: bool = True,
        eviction: Callable[[], Policy] = LeastRecentlyUsed,
        max_kept_pages: int | None = None,
        max_events: int = 10_000,
    ):
        if visit_steps < 1:
            raise ValueError(f"Engine(visit_steps={visit_steps}): visit_steps must be at least 1")
        counts = token_counts or token_counts_for(config.max_sequences)
        stepper = Stepper(forward, counts, processor=processor, num_logprobs=num_logprobs)
        if counts[-1] < config.max_sequences:
            raise ValueError(
                f"Engine(token_counts={counts}): the largest must hold a token of each of {config.max_sequences} rows"
            )
        self.config, self.tokenizer = config, tokenizer
        self._intake = Intake(
            tokenizer,
            tuple(stop_tokens),
            functools.cache(lambda: _vocab_size(forward, params, config)),
            Scheduler(config, counts[-1], visit_steps).check,
        )
        self._runner = Runner(
            stepper,
            params,
            config,
            visit_steps,
            keeps=prefix_cache,
            processor_state=processor_state,
            max_stop_tokens=max_stop_tokens + len(stop_tokens),
            max_bias_tokens=max_bias_tokens,
        )
        self._requests: dict[int, Request] = {}  # that have not ended
        self._news: collections.deque[Request] = collections.deque()  # added or aborted since the last step
        self._numbers, self._orders = itertools.count(), itertools.count()
        self._pieces: collections.deque[Piece] = collections.deque()  # of requests that no stream claimed
        self._giving = threading.Lock()  # while pieces are put out, or taken back
        self._stepping = threading.RLock()
        self._is_interrupted = False  # the last step did not come to its end
        self._committing: tuple[Sample, Piece, int] | None = None
        self._recorder = Recorder(max_events)
        kept = (config.num_pages - 1) // 2 if max_kept_pages is None else max_kept_pages
        self._make_cache = functools.partial(PrefixCache, config, eviction, None, kept) if prefix_cache else None
        self._version = 0  # of the parameters
        self._begin()

    def _begin(self) -> None:
        """All that can be made anew: everything but the requests."""
        sizes = self.config, self._runner.stepper.token_counts[-1], self._runner.visit_steps
        self._scheduler = Scheduler(*sizes)
        self._cache = None if self._make_cache is None else self._make_cache()
        self._prefixes: CachedPrefixes | UncachedPrefixes = UncachedPrefixes(len(self.config.groups))
        if self._cache is not None:
            running = self._scheduler.running
            self._prefixes = CachedPrefixes(self.config, self._runner, running, self._cache, self._version)
        self._evicted = self._prefixes.evict((0,) * len(self.config.groups))  # pages, before the last visit
        self._free = tuple(group.num_pages - 1 for group in self.config.groups)  # pages, when the host last looked
        self._ended: list[Sample] = []  # whose rows were not stopped yet
        self._counters: Counters | None = None  # of the device, when the host last looked

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        max_sequences: int = 16,
        max_length: int = 2048,
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: str | None = None,
        sharding: Any = None,
        **options: Any,
    ) -> "Engine":
        """An engine for a checkpoint.

        Args:
            folder: with config.json, model.safetensors and tokenizer.json; or the name of a Hugging Face repository
                that its library downloaded before.
            max_sequences: rows: samples that run at the same time.
            max_length: tokens of the longest sequence.
            page_size: tokens in a page.
            num_pages: of the pool; None: enough for all rows at their longest.
            dtype: of weights and pages; None: the checkpoint's.
            sharding: of the weights, see `models.load`.
            options: other arguments of `Engine`.

        Raises:
            ValueError: there is no such folder, or something in it is wrong.
        """
        from paged_jax import models  # Flax and tokenizers, for whom checkpoints need them

        model = models.load(find_folder(folder), dtype, sharding=sharding)
        pages_per_row = -(-max_length // max(1, page_size))
        config = model.cache_config(
            num_pages=max_sequences * pages_per_row + 1 if num_pages is None else num_pages,
            max_sequences=max_sequences,
            max_pages_per_sequence=pages_per_row,
            page_size=page_size,
        )
        options = {"stop_tokens": model.stop_tokens} | options
        return cls(model.forward, model.params, config, model.tokenizer, **options)

    # ---- requests --------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | Any = SamplingParams(),  # noqa: B008  frozen
        *,
        priority: int = 0,
        salt: str = "",
        adapter: str = "",
        echo: bool = False,
        best_of: int | None = None,
    ) -> int:
        """Queue a prompt; from any thread.

        Args:
            prompt: a text, token ids, or the messages of a chat, of which an assistant's last one is continued.
            params: how it is continued.
            priority: the lowest is served first, and takes rows and pages from others.
            salt: cached prefixes are found only under the salt that they were computed with.
            adapter: likewise, for adapters of the weights.
            echo: the text begins with that of the prompt.
            best_of: draw so many samples, and hand out the `params.num_samples` of the greatest mean log-probability,
                the best as sample 0, when all have ended.

        Returns:
            The number of the request.

        Raises:
            ValueError: the prompt or the parameters are wrong, or could never fit; nothing is queued.
        """
        request = self._make(prompt, params, priority, salt, adapter, echo, best_of)
        self._queue(request)
        return request.number

    def abort(self, request: int) -> None:
        """Forget a request, from any thread: no piece of it comes any more, and its pages are free after the next step.

        Nothing happens to a request that has ended and whose pieces were taken.
        """
        found = self._requests.get(request)
        with self._giving:
            if found is not None:
                found.is_aborted = True
                self._news.append(found)
            self._recall(request)

    def stream(self, request: int | None = None) -> Stream:
        """Pieces as they come, for `for` and for `async for`.

            for piece in engine.stream(): ...
            async for piece in engine.stream(engine.add_request(prompt)): ...

        Args:
            request: only this one, whose pieces no other stream gives; None: all that nobody else asked for.

        Returns:
            An iterator that ends when nothing is left; requests may be added meanwhile.

        Raises:
            ValueError: there is no such request, or all of its pieces were taken.
        """
        if request is None:
            return Stream(self._pieces, self._is_idle, self._advance)
        with self._giving:
            one = self._requests.get(request)
            pieces = self._recall(request)
            if one is None and not pieces:
                raise ValueError(f"request {request} is not here: it was never added, or its last piece was taken")
            if one is None:
                return Stream(pieces, lambda: True, self._advance)
            if one.pieces is self._pieces:
                one.pieces = pieces
        return Stream(one.pieces, lambda: one.is_finished, self._advance)

    def step(self) -> list[Piece]:
        """Make one step of the engine; for loops of your own.

        Returns:
            The pieces that nobody else asked for; often none, because visits are read one later.
        """
        self._advance()
        return [self._pieces.popleft() for _ in range(len(self._pieces))]

    def stats(self) -> Statistics:
        """What was done so far, as the host last saw it; waits for nothing."""
        steps = {count: self._recorder.counts[f"steps {count}"] for count in self._runner.stepper.token_counts}
        return self._recorder.statistics(
            compilations=self._runner.num_compilations,
            steps=steps,
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            free_pages=self._free,
            cached_pages=self._cache.num_pages if self._cache is not None else (0,) * len(self._free),
            num_pages=tuple(group.num_pages - 1 for group in self.config.groups),
        )

    @property
    def events(self) -> list[Event]:
        """What happened last, the oldest first."""
        return list(self._recorder.events)

    @property
    def tables(self) -> PageTables:
        """Who owns which pages, after the last visit; for reports. The next step consumes it, so read it at once."""
        return self._runner.state.cache.tables

    def cached_pages(self) -> list[np.ndarray]:
        """The ids of the pages that the prefix cache holds, one for each reference, in each group; for reports."""
        return self._cache.pages() if self._cache is not None else [np.zeros(0, np.int32) for _ in self._free]

    @property
    def has_work(self) -> bool:
        """Whether some request has not ended, or has pieces that nobody took."""
        return bool(self._requests or self._pieces)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  frozen
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> list[list[Completion]]:
        """All samples of all prompts, in their order.

        Args:
            prompts: a list of prompts, or a single one; see `add_request`.
            params: of all, or one for each.
            progress: show a bar; None: on a terminal, from 32 prompts on.
            options: of `add_request`, for all.

        Raises:
            ValueError: a prompt is wrong, or could never fit; none is queued.
        """
        prompts = as_batch(prompts)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} SamplingParams: give one, or one for each")
        requests = [self._make(prompt, one, **options) for prompt, one in zip(prompts, each, strict=True)]
        show = progress if progress is not None else len(requests) >= LONG_BATCH and sys.stderr.isatty()
        completions: list[list[Completion]] = []
        try:
            for request in requests:
                request.pieces = collections.deque()  # nobody else takes them
                self._queue(request)
            for request in track(requests, "prompts", console=Console(stderr=True), disable=not show):
                pieces = list(Stream(request.pieces, _is_finished(request), self._advance))
                samples = range(request.num_wanted)
                completions.append([Completion.join(p for p in pieces if p.sample == i) for i in samples])
        except BaseException:
            for request in requests:
                self.abort(request.number)
            raise
        return completions

    def _make(
        self,
        prompt: Prompt,
        params: SamplingParams | Any,
        priority: int = 0,
        salt: str = "",
        adapter: str = "",
        echo: bool = False,
        best_of: int | None = None,
    ) -> Request:
        """A request, checked."""
        tokens = self._intake.tokens(prompt)
        params = self._intake.params(params, len(tokens), best_of)
        self._runner.sampling([(params, 0)])  # raises where it names more tokens than there is room for
        text = ""
        if echo:
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(tokens) if self.tokenizer else ""
        request = Request(next(self._numbers), tokens, params, priority, salt, adapter, best_of, text, self._pieces)
        request.samples = [
            Sample(request, number, next(self._orders), self._output(request)) for number in range(request.num_drawn)
        ]
        return request

    def _output(self, request: Request) -> Output:
        return Output(self.tokenizer, request.prompt, request.params, request.echo)

    def _queue(self, request: Request) -> None:
        self._requests[request.number] = request
        self._news.append(request)

    def _recall(self, request: int) -> collections.deque[Piece]:
        """The pieces of a request that were put out and not taken."""
        found = self._requests.get(request)
        if found is not None and found.pieces is not self._pieces:
            pieces = found.pieces.copy()
            found.pieces.clear()
            return pieces
        pieces = collections.deque(piece for piece in self._pieces if piece.request == request)
        for piece in pieces:
            self._pieces.remove(piece)
        return pieces

    def _is_idle(self) -> bool:
        return all(request.pieces is not self._pieces for request in list(self._requests.values()))

    # ---- a step ----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """One step; see `step`."""
        with self._stepping:
            if self._is_interrupted:
                self._start_again()
            self._is_interrupted = True
            self._listen()  # to what was added and aborted
            self._retire()  # the rows of samples that have ended
            self._admit()  # samples to rows, by counts
            self._dispatch()  # the next visit, before the last one is read
            self._hand_out()  # what the last one drew
            self._retire()
            self._is_interrupted = False

    def _start_again(self) -> None:
        """After a step that was interrupted anywhere: nothing is trusted but the requests and what they were given."""
        self._runner.reset()
        self._begin()
        if self._committing is not None:
            self._apply()
        for request in list(self._requests.values()):
            for sample in request.samples:
                sample.row = None
                sample.output = self._output(request)
                sample.output.push(sample.drawn)
            self._news.append(request)

    def _listen(self) -> None:
        while self._news:
            request = self._news[0]
            for sample in request.samples:
                if request.is_aborted:
                    self._end(sample, "abort")
                elif sample.finish_reason is None:
                    self._scheduler.add(sample)
            if request.is_aborted:
                self._requests.pop(request.number, None)
            self._news.popleft()

    def _admit(self) -> None:
        evicted = [key[-1] for key in self._runner.unread]
        free = tuple(map(sum, zip(self._free, *evicted, strict=True)))  # with what visits on their way have freed
        plan = self._scheduler.plan(free, self._prefixes)
        self._plan = plan
        for row, sample in plan.paused:
            self._prefixes.leave(sample, row)
            self._recorder.preempted(1, sample)
        if plan.paused:
            self._runner.stop([row for row, _ in plan.paused])
        for sample, source in plan.admitted:
            num_found = sample.num_prompt - 1 if source else self._prefixes.attach(sample)
            self._recorder.admitted(sample, num_found)
        if plan.admitted:
            starts = [_start(admission) for admission in plan.admitted]
            self._runner.start(starts, self._scheduler.ages())
        self._evicted = self._prefixes.evict(plan.shortage)
        self._recorder.evicted(sum(self._evicted))

    def _dispatch(self) -> None:
        if self._plan.num_steps:
            key = self._plan.num_steps, dict(self._scheduler.running), self._evicted
            self._runner.visit(key, self._plan.num_steps, self._plan.until_one_ends)

    def _hand_out(self) -> None:
        """Read the visit before the one that was just dispatched."""
        if self._runner.num_unread > 1:
            self._read()

    def _read(self) -> None:
        (num_steps, rows, _), snapshot, published = self._runner.read()
        self._prefixes.insert(published)
        self._free = tuple(snapshot.num_free.tolist())
        self._count(snapshot.counters)
        for row, sample in rows.items():
            if self._scheduler.running.get(row) is sample:  # else it was aborted or paused meanwhile
                sample.steps_ahead -= num_steps
                sample.num_cached = int(snapshot.lengths[row])
                self._commit(sample, self._piece(sample, row, snapshot))
                if self._scheduler.running.get(row) is sample:
                    self._prefixes.watch(sample)

    def _count(self, counters: Counters) -> None:
        """What the device did since the host last looked."""
        before, counts = self._counters, self._recorder.counts
        new = counters if before is None else jax.tree.map(operator.sub, counters, before)
        self._counters = counters
        self._recorder.preempted(int(new.preemptions))
        counts.update(computed_tokens=int(new.computed_tokens), recomputed_tokens=int(new.recomputed_tokens))
        counts.update({f"steps {t}": int(n) for t, n in zip(self._runner.stepper.token_counts, new.steps, strict=True)})

    def _retire(self) -> None:
        for sample in self._ended:
            self._prefixes.leave(sample, sample.row)
        if self._ended:
            self._runner.stop([sample.row for sample in self._ended])
            self._ended = []
        if not self._scheduler.running:  # then nothing is gained by reading late
            while self._runner.num_unread:
                self._read()
            self._prefixes.insert(self._runner.read_published())

    # ---- pieces ----------------------------------------------------------------------------------------------

    def _piece(self, sample: Sample, row: int, snapshot: Snapshot) -> Piece:
        """What a sample drew in a visit."""
        request, count = sample.request, int(snapshot.num_drawn[row])
        tokens = snapshot.tokens[row, :count].tolist()
        reason = _REASONS[Finish(int(snapshot.finish[row]))]
        try:
            text, count, is_stopped = sample.output.push(tokens, is_last=reason is not None)
        except Exception as error:  # whatever a tokenizer raises, it concerns this sample alone
            return Piece(request.number, sample.number, (), "", (), (), "error", f"{type(error).__name__}: {error}")
        tops = snapshot.top_tokens[row, :count].tolist(), snapshot.top_logprobs[row, :count].tolist()
        return Piece(
            request=request.number,
            sample=sample.number,
            tokens=tuple(tokens[:count]),
            text=text,
            logprobs=tuple(snapshot.logprobs[row, :count].tolist()),
            top_logprobs=tuple(tuple(zip(*pair, strict=True)) for pair in zip(*tops, strict=True)),
            finish_reason="stop" if is_stopped else reason,
        )

    def _commit(self, sample: Sample, piece: Piece) -> None:
        """Hand out a piece, wholly or not at all: a step that is interrupted here is completed by the next one."""
        if piece.tokens or piece.text or piece.finish_reason:
            self._committing = sample, piece, len(sample.drawn)
            self._apply()

    def _apply(self) -> None:
        assert self._committing is not None, "there is a piece to hand out"
        sample, piece, start = self._committing
        request = sample.request
        sample.drawn[start:] = piece.tokens
        sample.logprobs[start:] = piece.logprobs
        sample.finish_reason = piece.finish_reason
        sample.held[start] = piece
        if piece.finish_reason is not None:
            self._end(sample, piece.finish_reason)
        pieces = request.chosen() if request.best_of is not None else [piece]
        if request.is_finished:
            self._requests.pop(request.number, None)
        self._recorder.handed_out(sample, piece)
        with self._giving:
            given = [] if request.is_aborted else pieces
            self._committing = request.pieces.extend(given)  # None: from this line on, it is handed out

    def _end(self, sample: Sample, reason: str) -> None:
        sample.finish_reason = reason
        self._recorder.finished(sample, reason)
        self._scheduler.remove(sample)
        if sample.row is not None:
            self._ended.append(sample)


def _start(admission: Admission) -> Start:
    sample, source = admission
    assert sample.row is not None, "it was admitted"
    row = NO_ROW if source is None or source.row is None else source.row
    return Start(sample.row, sample.tokens, sample.num_prompt, sample.request.params, sample.number, row)


def _is_finished(request: Request) -> Callable[[], bool]:
    return lambda: request.is_finished


def _vocab_size(forward: Forward, params: Any, config: CacheConfig) -> int:
    """V, from the shape of the logits: the decoder is traced, not run."""

    def logits(params: Any) -> jax.Array:
        cache = KVCache.create(config)
        metadata = AttentionMetadata.decode(cache.tables, active=jnp.zeros(config.max_sequences, bool))
        tokens = jnp.zeros(config.max_sequences, jnp.int32)
        return forward(params, tokens, cache.pool, metadata)[0]

    return jax.eval_shape(logits, params).shape[-1]
