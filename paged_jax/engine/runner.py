"""The device's side of the engine: a donated batch, and visits that are read one later.

A visit is a few steps of the whole batch in one XLA program. It returns, beside the state, a small snapshot in buffers
of its own, so the next visit may consume the state before the snapshot is read: the device never waits for the host.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.mesh import find_mesh
from paged_jax.cache.page_table import NULL_PAGE
from paged_jax.cache.page_tables import Handles
from paged_jax.decoding import beam_step
from paged_jax.decoding.groups import Groups
from paged_jax.decoding.hypotheses import Hypotheses, Rules, Stopping
from paged_jax.decoding.rows import NO_ROW, Counters, DecodeState
from paged_jax.decoding.step import release, run, start, step
from paged_jax.decoding.stepper import Stepper
from paged_jax.prefix.prefix_cache import Taken
from paged_jax.sampling import BeamParams, SamplingParams, SamplingState

_traces = 0  # of the programs below: each is compiled once


def count_traces(function: Callable) -> Callable:
    """Count the times that jit traces a function."""

    @functools.wraps(function)
    def counted(*arguments):
        global _traces
        _traces += 1
        return function(*arguments)

    return counted


class Found(NamedTuple):
    """What the beams of U groups have found."""

    has_ended: Bool[Array, " U"]
    sequences: Hypotheses


class Snapshot(NamedTuple):
    """What a visit did; X is the most tokens of a row in it, k `Stepper.num_logprobs`, G the groups of layers."""

    tokens: Int32[Array, "B X"]  # drawn in this visit, from the first column on
    logprobs: Float[Array, "B X"]
    top_tokens: Int32[Array, "B X k"]
    top_logprobs: Float[Array, "B X k"]
    num_drawn: Int32[Array, " B"]
    lengths: Int32[Array, " B"]  # tokens that each row caches now
    finish: Int32[Array, " B"]  # of Finish
    num_free: Int32[Array, " G"]
    counters: Counters
    found: Found | None  # None: the batch has no groups


class Start(NamedTuple):
    """A sequence for a row, or for the first row of a group."""

    row: int
    tokens: Sequence[int]  # prompt, and what was drawn already
    num_prompt: int
    params: SamplingParams
    sample: int
    source: int = NO_ROW  # the row that computes its prompt
    beams: BeamParams | None = None  # of the group


class Runner:
    """A batch on the device. Whatever it is told to do, it only dispatches; `read` waits.

    Args:
        stepper: what is static about a step.
        params: the decoder's parameters.
        config: sizes of the cache.
        visit_steps: the most steps of a visit.
        keeps: rows that end keep their pages until they are stopped, or somebody needs them.
        processor_state: of all rows, for the stepper's processor.
        drafter_state: for the stepper's drafter.
        max_beams: the rows of a group of beams; 0: there are no groups.
        sizes: `max_stop_tokens` and `max_bias_tokens` of a row.
    """

    def __init__(
        self,
        stepper: Stepper,
        params: Any,
        config: CacheConfig,
        visit_steps: int,
        keeps: bool = False,
        processor_state: Any = None,
        drafter_state: Any = None,
        max_beams: int = 0,
        **sizes: int,
    ):
        self.stepper, self.params, self.config, self.visit_steps = stepper, params, config, visit_steps
        self.max_beams = max_beams
        self._keeps, self._processor, self._drafter, self._sizes = keeps, processor_state, drafter_state, sizes
        self._unread: collections.deque[tuple[Any, Any]] = collections.deque()
        self._published: list[tuple[Any, Any]] = []
        self._state: DecodeState | None = None
        self._traces_before = _traces

    @property
    def state(self) -> DecodeState:
        """The batch; created when it is first asked for, and after a `reset`."""
        if self._state is None:
            sampling = self.sampling([None] * self.config.max_sequences)
            sizes = self.config, self.config.max_length + 1, self.stepper.token_counts
            mesh, num_logprobs = find_mesh(self.params), self.stepper.num_logprobs or 0
            drafter = jax.tree.map(jnp.copy, self._drafter)  # it is donated
            groups = None
            if self.max_beams:
                num_groups = self.config.max_sequences // self.max_beams
                groups = Groups.create(num_groups, self.max_beams, self.config.max_length)
            create = DecodeState.create if mesh is not None else _create
            self._state = create(*sizes, sampling, mesh, num_logprobs, drafter, groups)
        return self._state

    def reset(self) -> None:
        """Forget everything; the next state is empty. What was dispatched and not read is lost."""
        self._state = None
        self._unread.clear()
        self._published.clear()

    def sampling(self, rows: Sequence[tuple[SamplingParams, int] | None]) -> SamplingState:
        """The sampling state of rows; raises ValueError where one names more tokens than there is room for."""
        processor = jax.tree.map(jnp.copy, self._processor)  # it is donated
        return SamplingState.of(rows, processor=processor, **self._sizes)

    def start(self, starts: Sequence[Start], ages: Sequence[int]) -> None:
        """Put sequences into rows that are free; `ages` are those of all rows, the lowest is served first."""
        num_rows, capacity = self.config.max_sequences, self.config.max_length + 1
        mask, active = np.zeros((2, num_rows), bool)
        tokens = np.zeros((num_rows, capacity), np.int32)
        num_prompt, num_known, limit = np.zeros((3, num_rows), np.int32)
        source = np.full(num_rows, NO_ROW, np.int32)
        each: list[tuple[SamplingParams, int] | None] = [None] * num_rows
        searches = [(row // self.max_beams, beams) for row, *_, beams in starts if beams is not None]
        for first, known, prompt, params, sample, leader, beams in starts:
            active[first] = True
            for row in range(first, first + (1 if beams is None else self.max_beams)):
                mask[row], tokens[row, : len(known)] = True, known
                num_prompt[row], num_known[row], limit[row] = prompt, len(known), prompt + params.max_new_tokens
                source[row], each[row] = leader, (params, sample)
        sampling = self._advance_processor(self.sampling(each), tokens, num_prompt, num_known)
        age = np.asarray(ages, np.int32)
        keeps, groups = active & self._keeps, self._begin_groups(searches)
        self._state = _start(
            self.state, mask, active, keeps, tokens, num_prompt, num_known, limit, age, source, sampling, groups
        )

    def _begin_groups(self, searches: Sequence[tuple[int, BeamParams]]) -> tuple | None:
        """Which groups begin, of what width, by which rules; None: the batch has none."""
        if not self.max_beams:
            return None
        num_groups = self.config.max_sequences // self.max_beams
        begins, widths = np.zeros(num_groups, bool), np.ones(num_groups, np.int32)
        penalty, stopping = np.ones(num_groups, np.float32), np.zeros(num_groups, np.int32)
        for group, beams in searches:
            begins[group], widths[group] = True, beams.width
            penalty[group], stopping[group] = beams.length_penalty, Stopping.of(beams.early_stopping)
        return begins, widths, penalty, stopping

    def _advance_processor(self, sampling: SamplingState, tokens, num_prompt, num_known) -> SamplingState:
        """The processor's state after the tokens that were drawn before."""
        processor, state = self.stepper.processor, sampling.processor
        if processor is not None:
            for i in range(int(np.max(num_known - num_prompt, initial=0))):
                at = np.minimum(num_prompt + i, tokens.shape[1] - 1)
                token = jnp.asarray(tokens[np.arange(len(at)), at])
                state = processor.advance(state, token, jnp.asarray(num_prompt + i < num_known))
        return dataclasses.replace(sampling, processor=state)

    def stop(self, rows: Sequence[int]) -> None:
        """End rows and free their pages."""
        self._state = _stop(self.state, self._mask(rows))

    def attach(self, row: int, taken: Taken) -> None:
        """Let an empty row share pages that hold its first tokens."""
        self._state = _attach(self.state, np.int32(row), taken.pages, taken.first_columns, np.int32(taken.num_tokens))

    def publish(self, key: Any, row: int, num_tokens: int) -> None:
        """Take references to the pages of a row's first tokens; `read` will say which, under this key."""
        self.note(key, self.change(_publish, np.int32(row), np.int32(num_tokens)))

    def change(self, program: Callable[..., tuple[DecodeState, Any]], *arguments: Any) -> Any:
        """Dispatch a program that changes the state, which it consumes; returns what else it returns."""
        self._state, result = program(self.state, *arguments)
        return result

    def note(self, key: Any, arrays: Any) -> None:
        """Arrays that `read` will bring with the next visit, under a key."""
        self._published.append((key, arrays))

    def drop(self, pages: Sequence[Sequence[int]]) -> None:
        """Give up one reference to each of some pages of each group, a table row of them at a time."""
        size = self.config.max_pages_per_sequence
        for first in range(0, max(map(len, pages)), size):
            some = np.full((len(pages), size), NULL_PAGE, np.int32)
            for group, ids in enumerate(pages):
                some[group, : len(ids[first : first + size])] = ids[first : first + size]
            self._state = _drop(self.state, some)

    def visit(self, key: Any, num_steps: int, until_one_ends: bool) -> None:
        """Make up to `num_steps` steps, at most `visit_steps`; until a row ends, if that is asked for."""
        sizes = np.int32(num_steps), np.bool_(until_one_ends)
        self._state, snapshot = _visit(self.stepper, self.visit_steps, self.params, self.state, *sizes)
        for array in jax.tree.leaves(snapshot):
            array.copy_to_host_async()
        published, self._published = self._published, []
        self._unread.append((key, (snapshot, published)))

    @property
    def num_compilations(self) -> int:
        """Programs that were traced and compiled since this runner was made, by all runners of the process."""
        return _traces - self._traces_before

    @property
    def num_unread(self) -> int:
        """Visits whose snapshots were not read."""
        return len(self._unread)

    @property
    def unread(self) -> list[Any]:
        """Their keys, the oldest first."""
        return [key for key, _ in self._unread]

    @property
    def has_notes(self) -> bool:
        """Whether arrays were noted since the last visit."""
        return bool(self._published)

    def read(self) -> tuple[Any, Snapshot, list[tuple[Any, Any]]]:
        """Wait for the oldest visit that was not read: its key, its snapshot, and what was noted before it."""
        key, arrays = self._unread[0]
        snapshot, published = jax.device_get(arrays)
        self._unread.popleft()
        return key, snapshot, published

    def read_published(self) -> list[tuple[Any, Any]]:
        """What was noted since the last visit, while none is on its way."""
        published, self._published = self._published, []
        return jax.device_get(published)

    def _mask(self, rows: Sequence[int]) -> np.ndarray:
        mask = np.zeros(self.config.max_sequences, bool)
        mask[list(rows)] = True
        return mask


# One program in the place of one for each array. With a mesh each array knows its devices, and is created by itself.
_create = jax.jit(DecodeState.create, static_argnums=(0, 1, 2, 4, 5))


# Compiled once for all engines of one decoder and one config. The state is donated: a call that raises may have
# consumed it, and what it held is lost.
@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
@count_traces
def _visit(
    stepper: Stepper, visit_steps: int, params: Any, state: DecodeState, num_steps, until_one_ends
) -> tuple[DecodeState, Snapshot]:
    before = state.rows.num_known
    which = step if state.groups is None else beam_step.step
    state = run(stepper, params, state, num_steps, until_one_ends=until_one_ends, step=which)
    rows, tables = state.rows, state.cache.tables
    most = visit_steps * (1 + stepper.num_drafts)
    place = before[:, None] + jnp.arange(most, dtype=jnp.int32)[None, :]
    row = jnp.arange(len(before), dtype=jnp.int32)[:, None]

    def new(x: Array) -> Array:
        return x.at[row, place].get(mode="fill", fill_value=0)

    # Written anew, so that no buffer of the snapshot is one of the state, which the next visit consumes.
    found = None if state.groups is None else Found(state.groups.have_ended(rows), state.groups.finished)
    copies = jax.tree.map(jnp.copy, (tables.lengths, rows.finish, tables.num_free, state.counters, found))
    num_drawn = rows.num_known - before
    return state, Snapshot(
        new(rows.tokens), new(rows.logprobs), new(rows.top_tokens), new(rows.top_logprobs), num_drawn, *copies
    )


@functools.partial(jax.jit, donate_argnums=0)
@count_traces
def _start(
    state: DecodeState, mask, active, keeps, tokens, num_prompt, num_known, limit, age, source, sampling, groups
) -> DecodeState:
    if groups is not None:
        begins, widths, *rules = groups
        taken = jnp.zeros_like(widths)  # any prompt will do: here the host keeps the order of the searches
        groups = state.groups.begin(begins, taken, widths, Rules(*rules))
    ages = dataclasses.replace(state.rows, age=age)  # of all rows: a newcomer may be served before others
    rows = dataclasses.replace(
        ages,
        tokens=tokens, num_prompt=num_prompt, num_known=num_known, limit=limit, source=source,
        active=active, keeps=keeps, finish=state.rows.finish * 0, sampling=sampling,
    )  # fmt: skip
    return start(dataclasses.replace(state, rows=ages, groups=groups), mask, rows)


@functools.partial(jax.jit, donate_argnums=0)
@count_traces
def _stop(state: DecodeState, mask: Bool[Array, " B"]) -> DecodeState:
    """End some rows and free their pages; rows that wait for one of them compute their prompt themselves."""
    rows = state.rows
    waits_in_vain = (rows.source != NO_ROW) & mask[rows.source]
    source = jnp.where(waits_in_vain, NO_ROW, rows.source)
    rows = dataclasses.replace(rows, active=rows.active & ~mask, source=source)
    groups = None if state.groups is None else state.groups.free(mask)
    return release(dataclasses.replace(state, rows=rows, groups=groups), mask)


@functools.partial(jax.jit, donate_argnums=0)
@count_traces
def _attach(state: DecodeState, row, pages, first_columns, num_tokens) -> DecodeState:
    tables = state.cache.tables
    tables, _ = tables.attach(row, tables.handles_to(pages, first_columns, num_tokens))
    return state.with_tables(tables)


@functools.partial(jax.jit, donate_argnums=0)
@count_traces
def _publish(state: DecodeState, row, num_tokens) -> tuple[DecodeState, Handles]:
    tables, handles = state.cache.tables.publish(row, num_tokens)
    handles = lax.optimization_barrier(jax.tree.map(jnp.copy, handles))
    return state.with_tables(tables), handles


@functools.partial(jax.jit, donate_argnums=0)
@count_traces
def _drop(state: DecodeState, pages: Int32[Array, "G n"]) -> DecodeState:
    return state.with_tables(state.cache.tables.drop_pages(pages))
