"""The engine: any number of requests through a batch of fixed size."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.page_tables import PageTables
from paged_jax.decoding.draft import Drafter
from paged_jax.decoding.stepper import Stepper, token_counts_for
from paged_jax.engine.core import Core
from paged_jax.engine.intake import Intake, Prompt, as_batch, find_folder, vocab_size
from paged_jax.engine.output import Tokenizer
from paged_jax.engine.request import Completion, Piece, Request, Sample
from paged_jax.engine.runner import Runner
from paged_jax.engine.scheduler import Scheduler
from paged_jax.engine.session import Session
from paged_jax.engine.stats import Event, Recorder, Statistics
from paged_jax.engine.stream import Stream
from paged_jax.forward import Forward
from paged_jax.prefix.policies import LeastRecentlyUsed, Policy
from paged_jax.prefix.prefix_cache import PrefixCache
from paged_jax.sampling import BeamParams, Processor, SamplingParams
from paged_jax.store import PageStore
from paged_jax.store.fingerprint import fingerprint
from paged_jax.store.tiers import Tiers

LONG_BATCH = 32  # prompts, from which on a bar shows how far they are


class Engine:
    """A batch of fixed size through which any number of requests pass.

    Requests are served by priority, then first come, first served. Prompts are prefilled in chunks beside the rows that
    decode; the samples of a request share the pages of its prompt. When pages run short, the newest samples give theirs
    up and are computed again later, to the same tokens: a draw depends only on seed, sample number and position.

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
        token_counts: of the steps, see `Stepper`; longer prompts are cut at the largest. None: those of
            `token_counts_for`.
        prefill_passes: how many of the largest of them can prefill, see `Stepper`.
        visit_steps: the most steps between two looks of the host, and so, without drafts, the most tokens of a piece. A
            request that comes waits for two visits, and each costs the host a few milliseconds.
        drafter: proposes tokens that a step verifies, such as `Lookup`; see `Stepper`.
        drafter_state: before anything is drafted, where the drafter has one.
        processor: changes the logits of every row, see `paged_jax.sampling.Processor`.
        processor_state: of all rows before their first token, where the processor has one.
        num_logprobs: how many of the most likely tokens come with each token; None: no log-probabilities but
            those of beam searches.
        max_stop_tokens: the most stop tokens of a request, beside the engine's.
        max_bias_tokens: the most tokens that a request biases or forbids.
        max_beams: the widest beam search of a request, which takes that many rows; 0: there are none.
        prefix_cache: keep the pages of prompts and answers for later prompts that begin alike.
        eviction: which of them go first; see `paged_jax.prefix.policies`.
        host_cache_bytes: of host memory for pages that the pool gives up, or a size such as "4GiB"; they come back when
            they are needed.
        store: of pages, which outlives this process and which others share: a folder, a URL such as
            "s3://bucket/prefix", or a `Store` or `ObjectStore` of `paged_jax.store`.
        max_kept_pages: the most pages that sessions keep; None: half of those of the pool.
        max_events: of the log, which forgets the oldest.

    Raises:
        ValueError: an argument has a value that it cannot have; the message names it, the value and the rule.

    Examples:
        >>> engine = Engine.from_pretrained(models.DEMO, max_sequences=8, max_length=512, token_counts=(8, 64))
        >>> (completion,) = engine.generate("import os\\n", SamplingParams(max_new_tokens=8))[0]
        >>> len(completion.tokens), completion.finish_reason
        (8, 'length')
        >>> request = engine.add_request("class Node:\\n", SamplingParams(max_new_tokens=8))
        >>> text = "".join(piece.text for piece in engine.stream(request))
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
        prefill_passes: int = 1,
        visit_steps: int = 8,
        drafter: Drafter | None = None,
        drafter_state: Any = None,
        processor: Processor | None = None,
        processor_state: Any = None,
        num_logprobs: int | None = 0,
        max_stop_tokens: int = 8,
        max_bias_tokens: int = 0,
        max_beams: int = 0,
        prefix_cache: bool = True,
        eviction: Callable[[], Policy] = LeastRecentlyUsed,
        host_cache_bytes: int | float | str = 0,
        store: PageStore | str | Path | None = None,
        max_kept_pages: int | None = None,
        max_events: int = 10_000,
    ):
        if not isinstance(config, CacheConfig):
            raise ValueError(f"config must be a CacheConfig, got a {type(config).__name__}")
        if visit_steps < 1:
            raise ValueError(f"Engine(visit_steps={visit_steps}): visit_steps must be at least 1")
        stop_tokens = SamplingParams(stop_tokens=stop_tokens).stop_tokens
        num_drafts = 0 if drafter is None else drafter.num_drafts
        counts = token_counts or token_counts_for(
            config.max_sequences, num_drafts=num_drafts, prefill_passes=prefill_passes
        )
        stepper = Stepper(
            forward,
            counts,
            drafter=drafter,
            processor=processor,
            num_logprobs=num_logprobs,
            prefill_passes=prefill_passes,
        )
        if (host_cache_bytes or store is not None) and not prefix_cache:
            raise ValueError(
                "host_cache_bytes and store keep cached prefixes: leave prefix_cache on, or both of them out"
            )
        stepper.check_rows(config.max_sequences)
        _check_beams(max_beams, config, stepper)
        self.config, self.tokenizer = config, tokenizer
        self._intake = Intake(
            tokenizer,
            tuple(stop_tokens),
            functools.cache(functools.partial(vocab_size, forward, _shapes(params), config)),
            max_beams,
            Scheduler(config, counts[-1], visit_steps).check,
        )
        runner = Runner(
            stepper,
            params,
            config,
            visit_steps,
            keeps=prefix_cache,
            processor_state=processor_state,
            drafter_state=drafter_state,
            max_stop_tokens=max_stop_tokens + len(stop_tokens),
            max_bias_tokens=max_bias_tokens,
            max_beams=max_beams,
        )
        kept = (config.num_pages - 1) // 2 if max_kept_pages is None else max_kept_pages
        make_cache = functools.partial(PrefixCache, config, eviction, None, kept) if prefix_cache else None
        tiers = Tiers(config, host_cache_bytes, store) if host_cache_bytes or store is not None else None
        self._fingerprint = functools.partial(fingerprint, forward, config=config) if store is not None else None
        self._core = Core(runner, tokenizer, make_cache, Recorder(max_events), tiers, self._version(params, 0))
        self._numbers, self._orders, self._updates = itertools.count(), itertools.count(), 0
        self._is_closed = False

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        max_sequences: int = 16,
        max_length: int = 2048,
        page_size: int = 16,
        num_pages: int | None = None,
        dtype: Any = None,
        cache_dtype: Any = None,
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
            cache_dtype: of the pages, where it is another: "int8", "float8_e4m3fn", ...
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
            dtype=cache_dtype or model.dtype,
        )
        options = {"stop_tokens": model.stop_tokens} | options
        return cls(model.forward, model.params, config, model.tokenizer, **options)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what has not ended, wait until what was cached is in the store, and end the threads.

        An engine without a store has no threads. One that nobody refers to ends its threads, too, but aborts nothing.
        """
        self._is_closed = True
        self._core.close()

    # ---- requests --------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamParams | Any = SamplingParams(),  # noqa: B008  frozen
        *,
        priority: int | Any = 0,
        salt: str = "",
        adapter: str = "",
        echo: bool = False,
        best_of: int | None = None,
    ) -> int:
        """Queue a prompt; from any thread.

        Args:
            prompt: a text, token ids, or the messages of a chat, of which an assistant's last one is continued.
            params: how it is continued: by samples, or by a beam search, whose sequences come when it is over.
            priority: the lowest is served first, and takes rows and pages from others.
            salt: cached prefixes are found only under the salt that they were computed with.
            adapter: likewise, for adapters of the weights.
            echo: the text begins with that of the prompt.
            best_of: draw this many samples, and hand out the `params.num_samples` of the greatest mean log-probability,
                the best as sample 0, when all have ended.

        Returns:
            The number of the request.

        Raises:
            ValueError: the prompt or the parameters are wrong, or could never fit; nothing is queued.
        """
        request = self._make(prompt, params, priority, salt, adapter, echo, best_of)
        self._core.queue(request)
        return request.number

    def abort(self, request: int) -> None:
        """Forget a request, from any thread: no piece of it comes any more, and its pages are free after the next step.

        Nothing happens to a request that has ended and whose pieces were taken.
        """
        self._core.abort(request)

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
            return self._core.stream()
        return self._core.claim(request)

    def step(self) -> list[Piece]:
        """Make one step of the engine; for loops of your own.

        Returns:
            The pieces that nobody else asked for; often none, because visits are read one later.
        """
        self._core.advance()
        return self._core.take()

    def session(self, prompt: Prompt | None = None, *, salt: str = "", adapter: str = "") -> Session:
        """A conversation, or a node of a search, whose pages stay cached; see `Session`.

        Args:
            prompt: what it begins with; None: nothing yet.
            salt: of its requests.
            adapter: of its requests.
        """
        return Session(self, () if prompt is None else self._intake.tokens(prompt), salt, adapter)

    def update_params(self, params: Any) -> None:
        """Go on with other parameters: what was cached is unreachable at once, and nothing is compiled again.

        Samples that run keep the tokens that they were given, and compute everything again.

        Args:
            params: of the same structure, shapes and dtypes, on the same devices.

        Raises:
            ValueError: they differ in one of these.
        """
        if _shapes(params) != _shapes(self._core.runner.params):
            raise ValueError("the new parameters have another structure, shape or dtype: make a new Engine for them")
        self._updates += 1

        def change() -> None:
            self._core.version = self._version(params, self._updates)
            self._core.runner.params = params

        self._core.begin_anew(change)

    def tokens_of(self, what: Prompt | Completion, *, is_first: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, or of what was drawn; with the tokens that begin a text only if it is the first."""
        if isinstance(what, Completion):
            return what.tokens
        if isinstance(what, str) and not is_first and self.tokenizer is not None:
            what = self.tokenizer.encode(what, special_tokens=False)
        return self._intake.tokens(what)

    def remember(self, session: Session) -> None:
        """A session has begun, grown or ended: the next step keeps other pages for it. Sessions call this."""
        self._core.sessions.append(session)

    def stats(self) -> Statistics:
        """What was done so far, as the host last saw it; waits for nothing."""
        core = self._core
        return core.recorder.statistics(
            compilations=core.runner.num_compilations,
            steps={count: core.recorder.counts[f"steps {count}"] for count in core.runner.stepper.token_counts},
            waiting=len(core.scheduler.waiting),
            running=len(core.scheduler.running),
            free_pages=core.free,
            cached_pages=core.cache.num_pages if core.cache is not None else (0,) * len(core.free),
            num_pages=tuple(group.num_pages - 1 for group in self.config.groups),
            **(core.tiers.statistics() if core.tiers is not None else {}),
        )

    def flush(self) -> None:
        """Wait until all pages that were cached by the last step are in the store, if there is one."""
        if self._core.tiers is not None and not self._is_closed:
            self._core.tiers.flush()

    @property
    def events(self) -> list[Event]:
        """What happened last, the oldest first."""
        return list(self._core.recorder.events)

    @property
    def tables(self) -> PageTables:
        """Who owns which pages, after the last visit; for reports. The next step consumes it, so read it at once."""
        return self._core.runner.state.cache.tables

    def cached_pages(self) -> list[np.ndarray]:
        """The ids of the pages that the prefix cache holds, one for each reference, in each group; for reports."""
        cache = self._core.cache
        return cache.pages() if cache is not None else [np.zeros(0, np.int32) for _ in self.config.groups]

    def __repr__(self) -> str:
        return f"Engine: {self.stats().summary}\n{self.tables!r}"

    def _repr_html_(self) -> str:
        return f"<div>Engine: {self.stats().summary}</div>{self.tables._repr_html_()}"

    @property
    def tiers(self) -> Tiers | None:
        """Where pages go that leave the pool, and what they cost to bring back; None: nowhere."""
        return self._core.tiers

    @property
    def has_work(self) -> bool:
        """Whether some request has not ended, or has pieces that nobody took."""
        return bool(self._core.requests or self._core.pieces)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | BeamParams | Sequence[SamplingParams | BeamParams] = SamplingParams(),  # noqa: B008  frozen
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> list[list[Completion]]:
        """All samples of all prompts, in their order; of a beam search its sequences, the best first.

        Args:
            prompts: a list of prompts, or a single one; see `add_request`.
            params: of all, or one for each.
            progress: show a bar; None: on a terminal, from 32 prompts on.
            options: of `add_request`, for all.

        Raises:
            ValueError: a prompt is wrong, or could never fit; none is queued.
        """
        prompts = as_batch(prompts)
        each = [params] * len(prompts) if isinstance(params, SamplingParams | BeamParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} params: give one, or one for each")
        requests = [self._make(prompt, one, **options) for prompt, one in zip(prompts, each, strict=True)]
        show = progress if progress is not None else len(requests) >= LONG_BATCH and sys.stderr.isatty()
        completions: list[list[Completion]] = []
        try:
            streams = [self._core.queue(request, is_claimed=True) for request in requests]
            pairs = track(
                list(zip(requests, streams, strict=True)), "prompts", console=Console(stderr=True), disable=not show
            )
            for request, stream in pairs:
                pieces = list(stream)
                num_found = len({piece.sample for piece in pieces})  # a search may find fewer
                samples = range(request.num_wanted if request.beams is None else num_found)
                completions.append([Completion.join(p for p in pieces if p.sample == i) for i in samples])
        except BaseException:
            for request in requests:
                self.abort(request.number)
            raise
        return completions

    def _version(self, params: Any, number: int) -> int | str:
        """What these parameters are known by: in a store they outlive the process, so a number is not enough."""
        return number if self._fingerprint is None else self._fingerprint(params).hex()

    def _make(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamParams | Any,
        priority: int | Any = 0,
        salt: str = "",
        adapter: str = "",
        echo: bool = False,
        best_of: int | None = None,
    ) -> Request:
        """A request, checked."""
        if self._is_closed:
            raise ValueError("this engine is closed: make another one")
        tokens = self._intake.tokens(prompt)
        beams = params if isinstance(params, BeamParams) else None
        num_rows = 1 if beams is None else self._core.runner.max_beams
        params = self._intake.params(params, len(tokens), best_of)
        if best_of is not None and self._core.runner.stepper.num_logprobs is None:
            raise ValueError(
                f"best_of={best_of} compares log-probabilities: make the engine with num_logprobs=0 or more"
            )
        self._core.runner.sampling([(params, 0)])  # raises where it names more tokens than there is room for
        text = ""
        if echo:
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(tokens) if self.tokenizer else ""
        core, number = self._core, next(self._numbers)
        if not isinstance(priority, int | np.integer):
            raise ValueError(f"priority={priority!r} must be a whole number: the lowest is served first")
        request = Request(
            number, tokens, params, int(priority), salt, adapter, best_of, beams, echo=text, pieces=core.pieces
        )
        request.samples = [
            Sample(request, i, next(self._orders), core.output(request), num_rows) for i in range(request.num_drawn)
        ]
        return request


def _check_beams(max_beams: int, config: CacheConfig, stepper: Stepper) -> None:
    if not 0 <= max_beams <= config.max_sequences:
        raise ValueError(
            f"Engine(max_beams={max_beams}): beams need a row each, so give a number from 0 to the "
            f"max_sequences={config.max_sequences} of the cache"
        )
    if max_beams and stepper.drafter is not None:
        raise ValueError(f"Engine(max_beams={max_beams}, drafter=...): drafts are for rows that draw; leave one out")


def _shapes(params: Any) -> Any:
    """Of a pytree, so that nothing but the runner holds the parameters."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
