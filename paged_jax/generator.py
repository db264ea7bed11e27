"""Prompts in, tokens out: the host says which sequences run, the device makes many steps between two visits."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.mesh import find_mesh
from paged_jax.cache.page_table import PageTable
from paged_jax.decoding.rows import NO_ROW, DecodeState, Finish
from paged_jax.decoding.step import Stepper, release, run, start, token_counts_for
from paged_jax.forward import Forward
from paged_jax.prefix.cache import PrefixCache
from paged_jax.sampling import SamplingParams, SamplingState


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of one sample; `finish` is None while more will come, else "stop", "length"."""

    request: int
    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished sample of a request; `tokens` leaves out the prompt. The log-probabilities are the model's own."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a generator has done so far; each prompt is counted once, however often it was tried or preempted."""

    requests: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache or shared with another sample of the prompt
    drawn_tokens: int
    preemptions: int  # times that a sample gave up its pages
    recomputed_tokens: int
    steps: dict[int, int]  # of each token count


@dataclasses.dataclass
class _Sample:
    """One sample on its way, waiting or running."""

    request: int
    number: int
    params: SamplingParams
    prompt: list[int]
    drawn: list[int] = dataclasses.field(default_factory=list)
    row: int = NO_ROW  # while it waits
    num_cached: int = 0  # tokens whose pages its row holds, when the host last looked
    is_found: bool = False  # by others, in the prefix cache


class Generator:
    """A batch of fixed size through which any number of requests pass.

    Requests are served first come, first served. Prompts are prefilled in chunks beside the rows that decode; samples
    of one prompt share its pages, prompts with a common beginning share it through the prefix cache. When pages run
    short, cached prefixes are evicted, then the newest samples give up their pages and are computed again later, to
    the same tokens.

    Args:
        forward: the decoder, see `paged_jax.Forward`.
        params: its parameters, any pytree. Split over a mesh axis "model", they say where the pages go: each device
            holds those of its own KV heads.
        config: sizes of the cache.
        token_counts: of the steps, see `Stepper`; longer prompts are cut at the largest. None: some for so many rows.
        steps_per_visit: steps between two visits of the host, and so tokens in a chunk.
        prefix_cache: keep the pages of prompts and answers for later prompts that begin alike; None: unless layers
            have windows.
        decode_text: from tokens to text; needed for `SamplingParams.stop_strings` only.
        max_stop_tokens: the most stop tokens of a request.
        max_bias_tokens: the most tokens that a request biases or forbids.

    Example:
        >>> generator = Generator(model.forward, model.params, config)
        >>> generator.submit([1, 2, 3], SamplingParams(max_new_tokens=8))
        0
        >>> for chunk in generator.stream():
        ...     print(chunk.request, chunk.tokens)
    """

    def __init__(
        self,
        forward: Forward,
        params: Any,
        config: CacheConfig,
        *,
        token_counts: tuple[int, ...] | None = None,
        steps_per_visit: int = 16,
        prefix_cache: bool | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
        max_stop_tokens: int = 8,
        max_bias_tokens: int = 0,
    ):
        if steps_per_visit < 1:
            raise ValueError(f"Generator(steps_per_visit={steps_per_visit}): steps_per_visit must be at least 1")
        if prefix_cache and config.has_windows:
            raise ValueError(
                "prefix_cache=True, but some layers give up the pages behind their windows, where a later prompt would "
                "look: leave it out, or create the cache config with windows=() to keep all pages"
            )
        self.config = config
        self.params = params
        self.cache = None if config.has_windows or prefix_cache is False else PrefixCache(config.page_size)
        self._stepper = Stepper(forward, token_counts or token_counts_for(config.max_sequences))
        self._widths = {"max_stop_tokens": max_stop_tokens, "max_bias_tokens": max_bias_tokens}
        idle = SamplingState.create(config.max_sequences, **self._widths)
        mesh = find_mesh(params)
        self.state = DecodeState.create(config, config.max_length + 1, self._stepper.token_counts, idle, mesh)
        self._steps_per_visit = steps_per_visit
        self._decode_text = decode_text
        self._waiting: collections.deque[_Sample] = collections.deque()
        self._running: dict[int, _Sample] = {}  # by row, oldest first
        self._num_requests = self._num_started = 0
        self._prompt_tokens = self._cached_tokens = 0

    # ---- requests --------------------------------------------------------------------------------------------

    def submit(self, prompt: Iterable, sampling: SamplingParams = SamplingParams()) -> int:  # noqa: B008  frozen
        """Queue a prompt; returns its request number.

        Raises:
            ValueError: it is empty or no list of token ids, or could never fit: longer than a row, or than the pool.
        """
        if isinstance(prompt, str):
            raise ValueError(f"the prompt is the text {prompt[:20]!r}: pass token ids, such as tokenizer.encode(text)")
        prompt = [int(token) for token in prompt]
        self._check(prompt, sampling)
        request, self._num_requests = self._num_requests, self._num_requests + 1
        self._prompt_tokens += len(prompt) * sampling.num_samples
        for number in range(sampling.num_samples):
            self._waiting.append(_Sample(request, number, sampling, prompt))
        return request

    def abort(self, request: int) -> None:
        """Forget a request, wherever it is; its pages are free at once."""
        self._waiting = collections.deque(s for s in self._waiting if s.request != request)
        self._stop([s for s in self._running.values() if s.request == request])

    def stream(self) -> Iterator[Chunk]:
        """Serve everything that was submitted, chunk by chunk; more may be submitted meanwhile."""
        while self._waiting or self._running:
            self._admit()
            self._evict(self._needed_pages())
            self.state = _run(self._stepper, self.params, self.state, self._steps_per_visit, bool(self._waiting))
            yield from self._collect()

    def run(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  frozen
    ) -> list[list[Completion]]:
        """All samples of all prompts, in their order."""
        prompts = list(prompts)
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        requests = [self.submit(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
        chunks: dict[tuple[int, int], list[Chunk]] = collections.defaultdict(list)
        for chunk in self.stream():
            chunks[chunk.request, chunk.sample].append(chunk)
        pairs = zip(requests, each, strict=True)
        return [[_complete(chunks[r, i]) for i in range(params.num_samples)] for r, params in pairs]

    @property
    def statistics(self) -> Statistics:
        """What was done so far; waits for the device."""
        counters = jax.device_get(self.state.counters)
        return Statistics(
            requests=self._num_requests,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            drawn_tokens=int(counters.drawn_tokens),
            preemptions=int(counters.preemptions),
            recomputed_tokens=int(counters.recomputed_tokens),
            steps=dict(zip(self._stepper.token_counts, counters.steps.tolist(), strict=True)),
        )

    def _check(self, prompt: list[int], sampling: SamplingParams) -> None:
        if not prompt:
            raise ValueError("the prompt has 0 tokens; it needs at least 1 (for example a begin-of-text token)")
        if min(prompt) < 0:
            raise ValueError(f"the prompt holds {min(prompt)}: token ids are at least 0")
        longest = len(prompt) + sampling.max_new_tokens - 1  # the last token drawn is never cached
        sizes = f"a prompt of {len(prompt)} tokens with max_new_tokens={sampling.max_new_tokens}"
        if longest > self.config.max_length:
            raise ValueError(
                f"{sizes} needs a row of {longest} tokens, but max_pages_per_sequence="
                f"{self.config.max_pages_per_sequence} pages of {self.config.page_size} hold {self.config.max_length}: "
                f"shorten it or raise max_pages_per_sequence to {-(-longest // self.config.page_size)}"
            )
        for group, pages in zip(self.config.groups, self._count_pages(longest).tolist(), strict=True):
            if pages > group.num_pages - 1:
                name, of = ("num_pages", "") if group.window is None else ("window_pages", " of layers with a window")
                raise ValueError(
                    f"{sizes} needs {pages} pages{of}, but the pool has {group.num_pages - 1} besides the null page: "
                    f"shorten it or raise {name} to {pages + 1}"
                )
        SamplingState.of([(sampling, 0)], **self._widths)  # raises where it names more tokens than there is room for
        if sampling.stop_strings and self._decode_text is None:
            raise ValueError("stop_strings need to read the text: pass decode_text to the Generator")

    # ---- admission -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give free rows to the next samples, in order, while there are pages for their prompts."""
        rows = [row for row in range(self.config.max_sequences) if row not in self._running]
        new: list[_Sample] = []
        sources: dict[int, int] = {}  # of rows that wait for another row's prompt
        while self._waiting and rows:
            sample = self._waiting[0]
            leader = next((s for s in new if s.request == sample.request), None)
            if leader is None and any(self._will_share(sample, s) for s in self._running.values()):
                break  # a later visit finds these pages in the prefix cache
            if leader:
                sample.num_cached = len(sample.prompt) - 1
            elif self.cache is not None:
                sample.num_cached = self.cache.lookup(sample.prompt)
            need = self._needed_pages() + self._pages_to_come(sample)
            if self._running and np.any(self._available_pages() < need):
                sample.num_cached = 0
                break
            sample.row = rows.pop(0)
            if leader:
                sources[sample.row] = leader.row
            elif self.cache is not None:
                table, sample.num_cached = self.cache.match(self._table, sample.row, sample.prompt)
                self._set_table(table)
            self._cached_tokens += sample.num_cached
            new.append(sample)
            self._running[sample.row] = self._waiting.popleft()
        if new:
            self._start(new, sources)

    def _count_pages(self, num_tokens: int) -> np.ndarray:
        """The most pages that a sequence of this length maps at once in each group while it is prefilled; [G]."""
        step = self._stepper.token_counts[-1]
        return np.array([self.config.pages_mapped(group.window, num_tokens, step) for group in self.config.groups])

    def _needed_pages(self) -> np.ndarray:
        """The most pages that the running samples take in the next visit, in each group."""
        return sum((self._pages_to_come(s) for s in self._running.values()), np.zeros(len(self.config.groups), int))

    def _pages_to_come(self, sample: _Sample) -> np.ndarray:
        """The most pages that a sample takes in the next visit, in each group; one of them may be a copy."""
        longest = len(sample.prompt) + sample.params.max_new_tokens - 1
        length = min(len(sample.prompt) + len(sample.drawn) + self._steps_per_visit, longest)
        return np.maximum(self._count_pages(length) - sample.num_cached // self.config.page_size, 0)

    def _will_share(self, sample: _Sample, other: _Sample) -> bool:
        """Whether `other` is about to compute pages that `sample` could then find in the prefix cache."""
        if self.cache is None or other.is_found:
            return False
        common = 0
        for ours, theirs in zip(sample.prompt[:-1], other.prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        page_size = self.config.page_size
        return common // page_size * page_size > self.cache.lookup(sample.prompt)

    def _start(self, new: list[_Sample], sources: dict[int, int]) -> None:
        num_rows, capacity = self.state.rows.tokens.shape
        mask, tokens = np.zeros(num_rows, bool), np.zeros((num_rows, capacity), np.int32)
        num_prompt, limit, age = np.zeros((3, num_rows), np.int32)
        source = np.full(num_rows, NO_ROW, np.int32)
        each: list[tuple[SamplingParams, int] | None] = [None] * num_rows
        for sample in new:
            row, length = sample.row, len(sample.prompt)
            mask[row], tokens[row, :length], num_prompt[row] = True, sample.prompt, length
            limit[row], age[row] = length + sample.params.max_new_tokens, self._num_started
            source[row] = sources.get(row, NO_ROW)
            each[row] = sample.params, sample.number
            self._num_started += 1
        sampling = SamplingState.of(each, **self._widths)
        keeps = mask & (self.cache is not None)
        self.state = _start(self.state, mask, tokens, num_prompt, limit, age, source, keeps, sampling)

    def _available_pages(self) -> np.ndarray:
        """Pages that are free, or that only the prefix cache holds, in each group."""
        free = np.asarray(self.state.cache.tables.num_free)
        return free if self.cache is None else free + self.cache.num_unused(self._table)

    def _evict(self, need: np.ndarray) -> None:
        """Evict cached prefixes until so many pages are free in each group, or none is left."""
        free = np.asarray(self.state.cache.tables.num_free)
        if self.cache is not None and np.any(free < need):
            self._set_table(self.cache.evict(self._table, int(np.max(need - free))))

    # ---- after a visit ---------------------------------------------------------------------------------------

    def _collect(self) -> list[Chunk]:
        """Read what the device drew; forget who has finished."""
        rows, lengths = self.state.rows, self.state.cache.tables.lengths
        tokens, logprobs, num_known, finish, lengths = jax.device_get(
            (rows.tokens, rows.logprobs, rows.num_known, rows.finish, lengths)
        )
        chunks, ended = [], []
        for row, sample in self._running.items():
            sample.num_cached = int(lengths[row])
            self._remember(sample, tokens[row], int(lengths[row]), bool(finish[row]))
            begin = len(sample.prompt) + len(sample.drawn)
            drawn = tokens[row, begin : num_known[row]].tolist()
            reason = _REASONS[Finish(finish[row])]
            stopped = self._ends_with_stop_string(sample, drawn)
            if stopped is not None:
                drawn, reason = drawn[:stopped], "stop"
            sample.drawn += drawn
            if drawn or reason:
                values = tuple(logprobs[row, begin : begin + len(drawn)].tolist())
                chunks.append(Chunk(sample.request, sample.number, tuple(drawn), values, reason))
            if reason:
                ended.append(sample)
        self._stop(ended)
        return chunks

    def _remember(self, sample: _Sample, tokens: np.ndarray, length: int, has_ended: bool) -> None:
        """Cache the pages of a prompt once they are computed, and of prompt and answer at the end."""
        num_prompt = len(sample.prompt)
        if self.cache is None or length < num_prompt or (sample.is_found and not has_ended):
            return
        known = tokens[: length if has_ended else num_prompt].tolist()
        self._set_table(self.cache.insert(self._table, sample.row, known))
        sample.is_found = True

    def _ends_with_stop_string(self, sample: _Sample, drawn: list[int]) -> int | None:
        """How many of the drawn tokens it takes to complete a stop string; None if they complete none."""
        strings = sample.params.stop_strings
        if not strings or self._decode_text is None:
            return None
        for count in range(1, len(drawn) + 1):
            text = self._decode_text(sample.drawn + drawn[:count])
            if any(string in text for string in strings):
                return count
        return None

    def _stop(self, samples: list[_Sample]) -> None:
        """Take some samples out of their rows and free their pages."""
        if samples:
            rows = np.zeros(self.config.max_sequences, bool)
            for sample in samples:
                rows[sample.row] = True
                del self._running[sample.row]
            self.state = _stop(self.state, rows)

    @property
    def _table(self) -> PageTable:
        """The table of the only group, where prefixes are cached."""
        (table,) = self.state.cache.tables.groups
        return table

    def _set_table(self, table: PageTable) -> None:
        tables = dataclasses.replace(self.state.cache.tables, groups=(table,))
        self.state = dataclasses.replace(self.state, cache=dataclasses.replace(self.state.cache, tables=tables))


def _complete(chunks: list[Chunk]) -> Completion:
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    logprobs = tuple(value for chunk in chunks for value in chunk.logprobs)
    finish = chunks[-1].finish
    assert finish is not None, "a sample ended without a reason"
    return Completion(tokens, logprobs, finish)


_REASONS = {
    Finish.UNFINISHED: None,
    Finish.STOP_TOKEN: "stop",
    Finish.MAX_TOKENS: "length",
    Finish.TOO_LONG: "length",
}


# Compiled once for all generators of one decoder and one config.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _run(stepper: Stepper, params: Any, state: DecodeState, max_steps, until_one_ends) -> DecodeState:
    return run(stepper, params, state, max_steps, until_one_ends=until_one_ends)


@functools.partial(jax.jit, donate_argnums=0)
def _start(state: DecodeState, mask, tokens, num_prompt, limit, age, source, keeps, sampling) -> DecodeState:
    """Put prompts into the rows of the mask."""
    rows = dataclasses.replace(
        state.rows,
        tokens=tokens, num_prompt=num_prompt, num_known=num_prompt, limit=limit, age=age, source=source, keeps=keeps,
        active=mask, finish=state.rows.finish * 0, sampling=sampling,
    )  # fmt: skip
    return start(state, mask, rows)


@functools.partial(jax.jit, donate_argnums=0)
def _stop(state: DecodeState, mask) -> DecodeState:
    """End some rows and free their pages; rows that wait for one of them compute their prompt themselves."""
    rows = state.rows
    waits_in_vain = (rows.source != NO_ROW) & mask[rows.source]
    source = jax.numpy.where(waits_in_vain, NO_ROW, rows.source)
    rows = dataclasses.replace(rows, active=rows.active & ~mask, source=source)
    return release(dataclasses.replace(state, rows=rows), mask)
