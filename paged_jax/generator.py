"""Prompts in, tokens out: the host plans which sequences run, the device decodes many steps between two visits."""

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
from paged_jax.decoding import DecodeState, Finish, Forward, decode_loop, prefill, start, stop
from paged_jax.prefix.cache import PrefixCache
from paged_jax.sampling import SamplingParams, SamplingState


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens of one sample; `finish` is None while more will come, else "stop", "length"."""

    request: int
    sample: int
    tokens: tuple[int, ...]
    finish: str | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished sample of a request; `tokens` leaves out the prompt."""

    tokens: tuple[int, ...]
    finish: str


@dataclasses.dataclass
class _Sample:
    """One sample on its way, waiting or running."""

    request: int
    number: int
    params: SamplingParams
    num_prompt: int
    tokens: list[int]  # the prompt, then what was drawn
    row: int = -1  # -1 while it waits
    num_cached: int = 0  # tokens of the context that the prefix cache held when it was given its row

    @property
    def context(self) -> list[int]:
        """What must be cached before it decodes: all but the token that the next step feeds."""
        return self.tokens[:-1]

    @property
    def remaining(self) -> int:
        return self.num_prompt + self.params.max_new_tokens - len(self.tokens)


class Generator:
    """A batch of fixed size through which any number of requests pass.

    Requests are served first come, first served. Prompts are prefilled in chunks; samples of one prompt share its
    pages by `fork`, prompts with a common beginning share it through the prefix cache. When pages run short, cached
    prefixes are evicted, then the newest samples give up their pages and are computed again later, to the same tokens.

    Args:
        forward: the decoder, see `paged_jax.decoding.Forward`.
        params: its parameters, any pytree. Split over a mesh axis "model", they say where the pages go: each device
            holds those of its own KV heads.
        config: sizes of the cache.
        prefill_tokens: T of a prefill step; prompts are cut at its multiples.
        steps_per_visit: decode steps between two visits of the host, and so tokens in a chunk.
        prefix_cache: keep the pages of prompts for later prompts that begin alike; None: unless layers have windows.
        decode_text: from tokens to text; needed for `SamplingParams.stop_strings` alone.

    Example:
        >>> generator = Generator(model.forward, model.params, config)
        >>> generator.submit([1, 2, 3], SamplingParams(max_new_tokens=8))
        0
        >>> for chunk in generator.stream():
        ...     print(chunk.request, chunk.tokens)
    """

    max_stop_tokens = 8

    def __init__(
        self,
        forward: Forward,
        params: Any,
        config: CacheConfig,
        *,
        prefill_tokens: int = 256,
        steps_per_visit: int = 16,
        prefix_cache: bool | None = None,
        decode_text: Callable[[Sequence[int]], str] | None = None,
    ):
        for name, value in (("prefill_tokens", prefill_tokens), ("steps_per_visit", steps_per_visit)):
            if value < 1:
                raise ValueError(f"Generator({name}={value}): {name} must be at least 1")
        if prefix_cache and config.has_windows:
            raise ValueError(
                "prefix_cache=True, but some layers give up the pages behind their windows, where a later prompt would "
                "look: leave it out, or create the cache config with windows=() to keep all pages"
            )
        self.config = config
        self.params = params
        self.cache = None if config.has_windows or prefix_cache is False else PrefixCache(config.page_size)
        self.state = DecodeState.create(config, steps_per_visit, self.max_stop_tokens, find_mesh(params))
        self._prefill_tokens = prefill_tokens
        self._decode_text = decode_text
        self._waiting: collections.deque[_Sample] = collections.deque()
        self._running: dict[int, _Sample] = {}  # by row, oldest first
        self._num_requests = 0
        self._forward = forward

    def submit(self, prompt: Sequence[int], sampling: SamplingParams = SamplingParams()) -> int:  # noqa: B008  frozen
        """Queue a prompt; returns its request number.

        Raises:
            ValueError: it is empty, or could never fit: longer than a row, or than the whole pool.
        """
        prompt = [int(token) for token in prompt]
        if not prompt:
            raise ValueError("the prompt has 0 tokens; it needs at least 1 (for example a begin-of-text token)")
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
        if len(sampling.stop_tokens) > self.max_stop_tokens:
            raise ValueError(f"{len(sampling.stop_tokens)} stop tokens; at most {self.max_stop_tokens} are supported")
        for name in _UNSUPPORTED:
            if getattr(sampling, name) != getattr(SamplingParams(), name):
                raise NotImplementedError(
                    f"SamplingParams({name}={getattr(sampling, name)!r}): the Generator does not support it; "
                    "paged_jax.sampling.draw does"
                )
        if sampling.stop_strings and self._decode_text is None:
            raise ValueError("stop_strings need to read the text: pass decode_text to the Generator")
        request, self._num_requests = self._num_requests, self._num_requests + 1
        for number in range(sampling.num_samples):
            self._waiting.append(_Sample(request, number, sampling, len(prompt), list(prompt)))
        return request

    def abort(self, request: int) -> None:
        """Forget a request, wherever it is; its pages are free at once."""
        self._waiting = collections.deque(s for s in self._waiting if s.request != request)
        self._release([s for s in self._running.values() if s.request == request])

    def stream(self) -> Iterator[Chunk]:
        """Serve everything that was submitted, chunk by chunk; more may be submitted meanwhile."""
        while self._waiting or self._running:
            self._admit()
            self.state, refused = _decode(self._forward, self.params, self.state)
            yield from self._collect()
            if np.any(np.asarray(refused)):
                self._make_room(int(np.sum(refused)))

    def run(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  frozen
    ) -> list[list[Completion]]:
        """All samples of all prompts, in their order."""
        prompts = list(prompts)
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        requests = [self.submit(prompt, params) for prompt, params in zip(prompts, each, strict=True)]
        tokens: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        finish = {}
        for chunk in self.stream():
            tokens[chunk.request, chunk.sample] += chunk.tokens
            finish[chunk.request, chunk.sample] = chunk.finish
        return [
            [Completion(tuple(tokens[r, i]), finish[r, i]) for i in range(params.num_samples)]
            for r, params in zip(requests, each, strict=True)
        ]

    # ---- admission -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Move samples from the queue into free rows, in order, while pages last; prefill them and let them decode."""
        while True:
            leaders, followers = self._choose()
            if not leaders:
                return
            self._compute_contexts(leaders)
            if followers:
                parents, children = np.full((2, self.config.max_sequences), -1, np.int32)
                for i, (parent, child) in enumerate(followers):
                    parents[i], children[i] = parent.row, child.row
                self.state = _fork(self.state, parents, children)
            self._begin(leaders + [child for _, child in followers])

    def _choose(self) -> tuple[list[_Sample], list[tuple[_Sample, _Sample]]]:
        """Give rows to the next samples: leaders compute their context, followers fork a leader of the same tokens."""
        page_size = self.config.page_size
        rows = [row for row in range(self.config.max_sequences) if row not in self._running]
        planned = np.zeros(len(self.config.groups), int)  # pages that those chosen before will take in each group
        leaders: list[_Sample] = []
        followers: list[tuple[_Sample, _Sample]] = []
        while self._waiting and rows:
            sample = self._waiting[0]
            leader = next((s for s in leaders if s.tokens == sample.tokens), None)
            if leader is None and any(self._will_share(sample, s) for s in leaders):
                break  # the next round finds these pages in the prefix cache
            sample.row = rows[0]
            if leader is None:
                self._match(sample)
            own = np.array(1) if leader else self._count_pages(len(sample.tokens)) - sample.num_cached // page_size
            need = planned + own + len(self._running)  # whoever runs may take one page more before it must wait
            if np.any(self._evict(need) < need):
                self._release([sample])
                break
            planned += own
            if leader:
                followers.append((leader, sample))
            else:
                leaders.append(sample)
            self._running[rows.pop(0)] = self._waiting.popleft()
        return leaders, followers

    def _count_pages(self, num_tokens: int) -> np.ndarray:
        """The most pages that a sequence of this length maps at once in each group while it is prefilled; [G]."""
        step = self._prefill_tokens
        return np.array([self.config.pages_mapped(group.window, num_tokens, step) for group in self.config.groups])

    def _will_share(self, sample: _Sample, leader: _Sample) -> bool:
        """Whether `leader` is about to compute pages that `sample` could then find in the prefix cache."""
        if self.cache is None:
            return False
        common = 0
        for ours, theirs in zip(sample.context, leader.context, strict=False):
            if ours != theirs:
                break
            common += 1
        page_size = self.config.page_size
        return common // page_size * page_size > leader.num_cached

    def _match(self, sample: _Sample) -> None:
        """Attach what the prefix cache knows of the sample's context to its row."""
        sample.num_cached = 0
        if self.cache is not None:
            table, sample.num_cached = self.cache.match(self._table, sample.row, sample.tokens)
            self._set_table(table)

    def _compute_contexts(self, samples: list[_Sample]) -> None:
        """Prefill in steps of T packed tokens; a sample's pieces end at multiples of T, whatever was cached."""
        num_tokens = self._prefill_tokens
        done = {sample.row: sample.num_cached for sample in samples}
        left = sorted((s for s in samples if s.num_cached < len(s.context)), key=lambda s: s.row)
        while left:
            packed: list[int] = []
            query_lens = np.zeros(self.config.max_sequences, np.int32)
            for sample in left:
                at = done[sample.row]
                piece = sample.context[at : (at // num_tokens + 1) * num_tokens]
                if len(packed) + len(piece) <= num_tokens:
                    packed += piece
                    query_lens[sample.row] = len(piece)
                    done[sample.row] += len(piece)
            tokens = np.zeros(num_tokens, np.int32)
            tokens[: len(packed)] = packed
            self.state, granted = _prefill(self._forward, self.params, self.state, tokens, query_lens)
            assert np.all(np.asarray(granted) | (query_lens == 0)), "pages that were counted as free were refused"
            left = [s for s in left if done[s.row] < len(s.context)]
        if self.cache is not None:
            for sample in samples:
                self._set_table(self.cache.insert(self._table, sample.row, sample.context))

    def _begin(self, samples: list[_Sample]) -> None:
        num_rows = self.config.max_sequences
        rows = np.zeros(num_rows, bool)
        feed, remaining = np.zeros((2, num_rows), np.int32)
        by_row: list[tuple[SamplingParams, int] | None] = [None] * num_rows
        for sample in samples:
            rows[sample.row] = True
            feed[sample.row] = sample.tokens[-1]
            remaining[sample.row] = sample.remaining
            by_row[sample.row] = sample.params, sample.number
        sampler = SamplingState.of(by_row, max_stop_tokens=self.max_stop_tokens)
        self.state = _start(self.state, rows, feed, remaining, sampler)

    # ---- after a visit ---------------------------------------------------------------------------------------

    def _collect(self) -> list[Chunk]:
        """Read what the device drew; forget who has finished."""
        state = self.state
        tokens, num_tokens, finish = jax.device_get((state.tokens, state.num_tokens, state.finish))
        chunks, ended = [], []
        for row, sample in list(self._running.items()):
            drawn = tokens[row, : num_tokens[row]].tolist()
            reason = _REASONS[Finish(finish[row])]
            stopped = self._ends_with_stop_string(sample, drawn)
            if stopped is not None:
                if reason is None:
                    ended.append(sample)
                drawn, reason = drawn[:stopped], "stop"
            sample.tokens += drawn
            if drawn or reason:
                chunks.append(Chunk(sample.request, sample.number, tuple(drawn), reason))
            if reason:
                del self._running[row]
        self._release(ended)
        return chunks

    def _ends_with_stop_string(self, sample: _Sample, drawn: list[int]) -> int | None:
        """How many of the drawn tokens it takes to complete a stop string; None if they complete none."""
        strings = sample.params.stop_strings
        if not strings or self._decode_text is None:
            return None
        before = sample.tokens[sample.num_prompt :]
        for count in range(1, len(drawn) + 1):
            text = self._decode_text(before + drawn[:count])
            if any(string in text for string in strings):
                return count
        return None

    def _make_room(self, num_pages: int) -> None:
        """Free some pages: cached prefixes first, then the newest samples, which will be computed again."""
        need = np.full(len(self.config.groups), num_pages)
        while np.any(self._evict(need) < need) and len(self._running) > 1:
            row, sample = self._running.popitem()
            self._release([sample])
            self._waiting.appendleft(sample)
        self.state = dataclasses.replace(self.state, tables=self.state.tables.clear_fault())

    def _evict(self, need: np.ndarray) -> np.ndarray:
        """Evict cached prefixes until so many pages are free in each group, or none is left; returns how many are."""
        free = np.asarray(self.state.tables.num_free)
        if self.cache is not None and np.any(free < need):
            self._set_table(self.cache.evict(self._table, int(np.max(need - free))))
            free = np.asarray(self.state.tables.num_free)
        return free

    def _release(self, samples: list[_Sample]) -> None:
        """Free the pages of some samples, which leave their rows."""
        if samples:
            rows = np.zeros(self.config.max_sequences, bool)
            for sample in samples:
                rows[sample.row] = True
                self._running.pop(sample.row, None)
                sample.row = -1
            self.state = _stop(self.state, rows)

    @property
    def _table(self) -> PageTable:
        """The table of the only group, where prefixes are cached."""
        (table,) = self.state.tables.groups
        return table

    def _set_table(self, table: PageTable) -> None:
        tables = dataclasses.replace(self.state.tables, groups=(table,))
        self.state = dataclasses.replace(self.state, tables=tables)


def generate(
    forward: Forward,
    params: Any,
    prompts: Iterable[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008  frozen
    *,
    config: CacheConfig,
    **options: Any,
) -> list[list[Completion]]:
    """All samples of all prompts: one `Generator`, run once.

    Args:
        forward: the decoder, see `paged_jax.decoding.Forward`.
        params: its parameters.
        prompts: token ids, any lengths.
        sampling: for all prompts, or one for each.
        config: sizes of the cache.
        options: of the `Generator`.

    Returns:
        For each prompt its samples.
    """
    return Generator(forward, params, config, **options).run(prompts, sampling)


_UNSUPPORTED = (  # they need all tokens of a row, or sparse biases: the decode loop has neither
    "min_new_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "forbidden_tokens",
)
_REASONS = {
    Finish.UNFINISHED: None,
    Finish.STOP_TOKEN: "stop",
    Finish.MAX_TOKENS: "length",
    Finish.ROW_FULL: "length",
}


# Compiled once for all generators of one decoder and one config.
_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=2)
_start = jax.jit(start, donate_argnums=0)
_stop = jax.jit(stop, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(forward: Forward, params: Any, state: DecodeState) -> tuple[DecodeState, jax.Array]:
    """Decode into an empty buffer."""
    return decode_loop(forward, params, state.empty_buffer())


@functools.partial(jax.jit, donate_argnums=0)
def _fork(state: DecodeState, parents: jax.Array, children: jax.Array) -> DecodeState:
    tables, _ = state.tables.fork(parents, children)
    return dataclasses.replace(state, tables=tables)
