"""A batch in flight beside plain Python: what each of its rows draws alone, and what a step may do to the pages.

Every step runs in three stages, each compiled once: plan and reserve, compute, share and commit. So the pages can be
looked at between them, and a broken stage can take the place of one of them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hash_decoder as decoder
from paged_jax.cache import invariants
from paged_jax.cache.fault import Fault
from paged_jax.cache.page_table import NULL_PAGE
from paged_jax.decoding.draft import Drafter, Drafts
from paged_jax.decoding.plan import first_come_first_served
from paged_jax.decoding.room import reserve
from paged_jax.decoding.rows import NO_ROW, NO_TOKEN, DecodeState, Finish, Rows
from paged_jax.decoding.step import ask, commit, compute, release, run, share_prompts, start
from paged_jax.decoding.stepper import Stepper
from paged_jax.sampling import SamplingParams, SamplingState

B, M, S = 4, 8, decoder.PAGE_SIZE
CAPACITY, TOKEN_COUNTS = M * S + 1, (6, 8)
PLAIN, HYBRID = (None,), (None, 6)
CONFIGS = {
    PLAIN: decoder.config(1 + 8, B, M, PLAIN),
    HYBRID: decoder.config(1 + 9, B, M, HYBRID, window_pages=1 + 6),
}
SAMPLING = (
    SamplingParams(stop_tokens=(5, 9, 31)),
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(temperature=0.8, seed=7, top_p=0.9, stop_tokens=tuple(range(4))),
)
PARAMS = jnp.int32(0)
MOST_HELD = 2
NOTHING = jnp.zeros(B, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a row is to draw."""

    prompt: tuple[int, ...]
    num_new: int
    kind: int  # of SAMPLING
    sample: int


@dataclasses.dataclass(frozen=True)
class Alone:
    """What a request draws when nothing else runs."""

    tokens: tuple[int, ...]
    logprobs: np.ndarray
    finish: int


class Stages:
    """A step in parts that are compiled once, and what happens between steps."""

    def __init__(
        self, windows, *, plan=first_come_first_served, reserve=reserve, share_prompts=share_prompts, commit=commit,
        drafter: Drafter | None = None,
    ):  # fmt: skip
        self.num_traces = 0
        self.stepper = Stepper(decoder.forward_with(windows), TOKEN_COUNTS, plan=plan, drafter=drafter)

        @jax.jit
        def make_room(state):
            self.num_traces += 1
            state, asked = ask(self.stepper, state)
            return *reserve(state, asked), asked

        @jax.jit
        def end(state, drawn):
            state, ended = commit(share_prompts(state), drawn)
            return release(state, ended & ~state.rows.keeps), ended

        self.make_room, self.end = make_room, end
        self.compute = jax.jit(lambda state, counts: compute(self.stepper, PARAMS, state, counts))
        self.run = jax.jit(lambda state, num_steps: run(self.stepper, PARAMS, state, num_steps))


@functools.cache
def stages_of(windows) -> Stages:
    return Stages(windows)


@dataclasses.dataclass(frozen=True)
class Told:
    """Drafts what a row's hints say, which are tokens at the places where the row would know them."""

    num_drafts: int

    def propose(self, state, rows: Rows, asks) -> tuple[Drafts, Any]:
        place = rows.num_known[:, None] + jnp.arange(self.num_drafts, dtype=jnp.int32)[None, :]
        row = jnp.arange(len(rows.active), dtype=jnp.int32)[:, None]
        tokens = rows.hints.at[row, place].get(mode="fill", fill_value=NO_TOKEN)
        is_told = jnp.cumprod((tokens != NO_TOKEN).astype(jnp.int32), axis=1)
        return Drafts(tokens, jnp.sum(is_told, axis=1, dtype=jnp.int32)), state


@jax.jit
def _start(state: DecodeState, row, tokens, numbers, sampling, hints) -> DecodeState:
    mask = jnp.arange(B) == row
    num_prompt, limit, age, source, keeps = (jnp.full(B, number) for number in numbers)
    new = dataclasses.replace(
        state.rows,
        tokens=jnp.broadcast_to(tokens, (B, CAPACITY)), num_prompt=num_prompt, num_known=num_prompt, limit=limit,
        age=age, source=source, keeps=keeps == 1, active=mask, finish=jnp.zeros(B, jnp.int32),
        hints=jnp.broadcast_to(hints, (B, CAPACITY)),
        sampling=jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])), sampling),
    )  # fmt: skip
    return start(state, mask, new)


@jax.jit
def _stop(state: DecodeState, row) -> DecodeState:
    """As the generator ends a row, whoever waits for it computes the prompt itself."""
    mask = jnp.arange(B) == row
    source = jnp.where(state.rows.source == row, NO_ROW, state.rows.source)
    rows = dataclasses.replace(state.rows, active=state.rows.active & ~mask, source=source)
    return release(dataclasses.replace(state, rows=rows), mask)


@jax.jit
def _transition(state: DecodeState, what, row, num_tokens, handles):
    """Publish (0), attach (1) or drop (2); one program for all three."""

    def publish(tables):
        return tables.publish(row, num_tokens)

    def attach(tables):
        return tables.attach(row, handles)[0], handles

    def drop(tables):
        return tables.drop(handles), handles

    tables, handles = jax.lax.switch(what, [publish, attach, drop], state.cache.tables)
    return state.with_tables(tables), handles


@functools.cache
def _sampling_row(kind: int, sample: int) -> SamplingState:
    return SamplingState.of([(SAMPLING[kind], sample)])


@functools.cache
def empty_state(windows) -> DecodeState:
    state = jax.jit(DecodeState.create, static_argnums=(0, 1, 2))(CONFIGS[windows], CAPACITY, TOKEN_COUNTS)
    rows = Rows.create(B, CAPACITY, state.rows.sampling, num_hints=CAPACITY)
    return dataclasses.replace(state, rows=rows)


@functools.cache
def alone(windows, request: Request) -> Alone:
    """What a request draws alone, once checked against the dense decoder."""
    state = _put(empty_state(windows), 0, request)
    rows = jax.device_get(stages_of(windows).run(state, np.int32(1000)).rows)
    known, num_prompt = int(rows.num_known[0]), len(request.prompt)
    tokens, logprobs = tuple(rows.tokens[0, :known].tolist()), rows.logprobs[0, :known]
    drawn, prompt = list(tokens[num_prompt:]), list(request.prompt)
    expected = decoder.dense_logprobs(prompt, drawn, windows)
    assert np.allclose(logprobs[num_prompt:], expected, atol=1e-5, rtol=0)
    params, most = SAMPLING[request.kind], min(request.num_new, CAPACITY - num_prompt)
    if params.temperature == 0:
        assert drawn == decoder.dense_greedy(prompt, most, windows, tuple(params.stop_tokens))
    return Alone(tokens, logprobs, int(rows.finish[0]))


def _put(
    state: DecodeState, row: int, request: Request, age: int = 0, source: int = NO_ROW, keeps: bool = False, hints=()
):
    told = np.full(CAPACITY, NO_TOKEN, np.int32)
    told[: len(hints)] = hints
    num_prompt, tokens = len(request.prompt), np.zeros(CAPACITY, np.int32)
    tokens[:num_prompt] = request.prompt
    numbers = tuple(np.int32(x) for x in (num_prompt, num_prompt + request.num_new, age, source, keeps))
    return _start(state, np.int32(row), tokens, numbers, _sampling_row(request.kind, request.sample), told)


@dataclasses.dataclass
class Held:
    """A handle that is out, and the tokens whose pages it holds."""

    handles: Any
    tokens: tuple[int, ...]


class Seen(NamedTuple):
    """A state on the host, without its pages."""

    groups: Any
    windows: list[int | None]
    lengths: np.ndarray
    rows: Any
    counters: Any


class Batch:
    """Drives a state, and checks after everything that happens."""

    def __init__(self, windows, stages: Stages | None = None):
        self.windows, self.stages = windows, stages or stages_of(windows)
        self.state = empty_state(windows)
        self.requests: dict[int, Request] = {}  # by row, until the row is given to another
        self.held: list[Held] = []
        self.num_steps = 0
        self.see()

    # ---- what happens -----------------------------------------------------------------------------------------

    def start(
        self, row: int, request: Request, *, oldest: bool, keeps: bool, source: int = NO_ROW, held: int = -1, age=None
    ):
        if self.lengths[row]:
            self.stop(row)  # it had ended, and kept its pages until now
        ages = [int(self.rows.age[b]) for b in range(B)] or [0]
        if age is None:
            age = max(ages) + 1 if source != NO_ROW or not oldest else min(ages) - 1
            age += 0 if self.requests else 10_000
        self.state = _put(self.state, row, request, age, source, keeps, self._hints(request))
        self.requests[row] = request
        if held >= 0 and len(request.prompt) <= M * S:
            self._transition(1, row, 0, self.held[held].handles)
        self.see()
        if len(request.prompt) > M * S:
            assert not self.rows.active[row] and self.rows.finish[row] == Finish.TOO_LONG

    def _hints(self, request: Request) -> list[int]:
        """What the request draws, often: drafts of which some are right. Nothing without a drafter."""
        if self.stages.stepper.drafter is None or len(request.prompt) > M * S:
            return []
        tokens = np.array(alone(self.windows, request).tokens)
        rng = np.random.default_rng(tokens)
        wrong = rng.integers(NO_TOKEN, decoder.VOCAB, len(tokens))
        return np.where(rng.random(len(tokens)) < 0.7, tokens, wrong).tolist()

    def stop(self, row: int):
        self.state = _stop(self.state, np.int32(row))
        self.requests.pop(row, None)
        self.see()
        assert not self.lengths[row]

    def publish(self, row: int, num_tokens: int):
        tokens = tuple(self.rows.tokens[row, :num_tokens].tolist())
        handles = self._transition(0, row, num_tokens, self._no_handles())
        got = int(handles[0].num_tokens)
        assert got == num_tokens or (got == 0 and self.windows == HYBRID)
        if self.windows == HYBRID:  # a row that gave up pages is refused, which its table notes
            cache = self.state.cache
            cache = dataclasses.replace(cache, tables=cache.tables.clear_fault())
            self.state = dataclasses.replace(self.state, cache=cache)
        self.held.append(Held(handles, tokens[:got]))
        self.see()

    def drop(self, index: int):
        self._transition(2, 0, 0, self.held.pop(index).handles)
        self.see()

    def _transition(self, what: int, row: int, num_tokens: int, handles):
        numbers = (np.int32(x) for x in (what, row, num_tokens))
        self.state, handles = _transition(self.state, *numbers, handles)
        return handles

    def _no_handles(self):
        return _nothing(self.windows)

    def run(self, num_steps: int):
        """Steps in one program, not looked at between them."""
        self.state = self.stages.run(self.state, np.int32(num_steps))
        self.num_steps += num_steps
        self.see()

    def step(self):
        """One step, looked at between its stages."""
        before, self.is_sound = self.host, False
        self.state, counts, asked = self.stages.make_room(self.state)
        middle = self._seen()
        num_drafts, handles = self.stages.stepper.num_drafts, [held.handles for held in self.held]
        check_room(before, middle, np.asarray(counts), np.asarray(asked), handles, num_drafts)
        self.check_pages(counts)
        self.state, drawn = self.stages.compute(self.state, counts)
        self.state, _ = self.stages.end(self.state, drawn)
        self.num_steps += 1
        self.see()
        check_commit(middle, self.host, np.asarray(counts), num_drafts)

    # ---- what is checked --------------------------------------------------------------------------------------

    def _seen(self) -> "Seen":
        tables = self.state.cache.tables
        groups, rows, counters = jax.device_get((tables.groups, self.state.rows, self.state.counters))
        return Seen(groups, [group.window for group in tables.layout], groups[0].lengths, rows, counters)

    def see(self):
        """Look at the state on the host, and check what holds between steps."""
        self.is_sound, self.host = False, self._seen()
        _, _, self.lengths, self.rows, self.counters = self.host
        self.check_pages()
        for table in self.host.groups:
            assert table.fault & ~int(Fault.OUT_OF_PAGES) == 0, Fault(int(table.fault))
            assert np.array_equal(table.lengths, self.lengths), "groups are in step"
        for row in range(B):
            self._check_row(row)
        self.is_sound = True

    def check_pages(self, appended=NOTHING):
        held = [held.handles for held in self.held]
        held += [self._no_handles()] * (MOST_HELD - len(held))  # one shape, one compilation
        for group, table in enumerate(self.state.cache.tables.groups):
            invariants.check(table, [handles[group] for handles in held], appended)

    def _check_row(self, row: int):
        rows, length, request = self.rows, self.lengths[row], self.requests.get(row)
        if request is None:
            assert not rows.active[row] and length == 0
            return
        known, is_active = int(rows.num_known[row]), bool(rows.active[row])
        assert length < known or (length, known) == (0, 0)
        if len(request.prompt) > M * S:
            assert not is_active and rows.finish[row] == Finish.TOO_LONG and length == 0
            return
        expected = alone(self.windows, request)
        assert tuple(rows.tokens[row, :known].tolist()) == expected.tokens[:known], f"row {row} draws other tokens"
        drawn = slice(len(request.prompt), known)
        rounding = 0 if self.stages.stepper.drafter is None else 1e-5  # with drafts another program computes them
        difference = np.abs(rows.logprobs[row, drawn] - expected.logprobs[drawn])
        assert np.all(difference <= rounding), f"row {row} has other logprobs"
        assert is_active == (known < len(expected.tokens)), f"row {row} ends too late or too early"
        assert rows.finish[row] == (Finish.UNFINISHED if is_active else expected.finish)
        if not is_active:
            assert length in ((0, known - 1) if rows.keeps[row] else (0,)), f"row {row} has ended and holds pages"
        if rows.source[row] != NO_ROW:
            assert length == 0 and known == len(request.prompt)

    def finish(self):
        """Everybody ends once all handles are given up, and nobody holds anything then."""
        while self.held:
            self.drop(0)
        for _ in range(500):
            if not np.any(self.rows.active):
                break
            self.run(8)
        assert not np.any(self.rows.active), "somebody waits for ever"
        for row in range(B):
            self.stop(row)
        for table in self.host.groups:
            assert table.num_free == table.num_pages - 1


@functools.cache
def _nothing(windows):
    """Handles to no pages."""
    return jax.jit(lambda tables: tables.publish(0, 0)[1])(empty_state(windows).cache.tables)


def behind(seen: Seen) -> np.ndarray:
    rows = seen.rows
    return np.where(rows.active & (rows.source == NO_ROW), rows.num_known - seen.lengths, 0)


def mapped(seen: Seen, group: int, row: int) -> list[int]:
    """The pages that a row's next token sees or goes to, in its order."""
    table, window, length = seen.groups[group], seen.windows[group], int(seen.lengths[row])
    first = 0 if window is None else max(length - window + 1, 0) // S
    return table.pages[row, max(first, int(table.first_column[row])) : -(-length // S)].tolist()


def check_room(before, middle, counts, asked, handles, num_drafts: int) -> None:
    """What a plan and a reservation may do."""
    rows, counters, old, new, active = before.rows, before.counters, before.lengths, middle.lengths, before.rows.active
    most = behind(before) + np.where(behind(before) == 1, num_drafts, 0)
    assert np.all((asked >= 0) & (asked <= most)) and np.sum(asked) <= TOKEN_COUNTS[-1], "the plan"
    assert np.all((counts == asked) | (counts == 0)), "all that a row asked for, or nothing"
    lost = np.where(counts > 0, old + counts - new, old - new)
    assert np.all(lost >= 0) and np.all(lost[counts > 0] == 0)
    assert middle.counters.recomputed_tokens - counters.recomputed_tokens == np.sum(lost[active])
    gave_up = active & (lost > 0)
    assert np.sum(gave_up) <= middle.counters.preemptions - counters.preemptions <= np.sum(active)
    owners = [_owners(before, g, [h[g] for h in handles]) for g in range(len(before.groups))]
    takes_part = behind(before) > 0
    if not np.any(takes_part):
        return
    oldest = int(np.argmin(np.where(takes_part, rows.age, 2**31 - 1)))
    assert asked[oldest] > 0, "the oldest is given tokens"
    assert counts[oldest] > 0 or any(_is_blocked(before, g, oldest, asked, handles) for g in range(len(owners)))
    for row in np.flatnonzero(gave_up).tolist():
        assert row != oldest, "the oldest never gives up pages"
        assert not np.any(new[~active]), "rows that have ended give up theirs first"
        younger = active & (rows.age > rows.age[row])
        assert not np.any(counts[younger]), "a younger row goes on where an older one gave up pages"
        if len(owners) == 1 and not _must_give_up_all(before, owners[0], oldest, rows, asked):
            _check_kept(before, owners[0], row, new, lost, rows)


def _owners(seen, group: int, handles) -> dict[int, set]:
    owners: dict[int, set] = {}
    for row in range(B):
        for page in mapped(seen, group, row):
            owners.setdefault(page, set()).add(row)
    for i, handle in enumerate(handles):
        for page in np.asarray(handle.pages).tolist():
            owners.setdefault(page, set()).add(f"handle {i}")
    owners.pop(NULL_PAGE, None)
    return owners


def _num_new_pages(seen, group: int, row: int, asked) -> int:
    length = int(seen.lengths[row])
    return -(-(length + int(asked[row])) // S) - -(-length // S)


def _is_blocked(seen, group: int, row: int, asked, handles) -> bool:
    """Whether handles hold the pages that a row needs."""
    table, own = seen.groups[group], mapped(seen, group, row)
    held = {page for h in handles for page in np.asarray(h[group].pages).tolist() if page}
    copies = seen.lengths[row] % S > 0 and own[-1] in held
    needed = _num_new_pages(seen, group, row, asked) + copies
    return bool(needed > table.num_pages - 1 - len(held | set(own)))


def _must_give_up_all(seen, owners, oldest: int, rows, asked) -> bool:
    """Whether the oldest row needs more than what all others own by themselves."""
    own = [page for page, who in owners.items() if len(who) == 1 and who < set(range(B)) - {oldest}]
    return _num_new_pages(seen, 0, oldest, asked) + 1 > int(seen.groups[0].num_free) + len(own)


def _check_kept(seen, owners, row: int, new, lost, rows) -> None:
    """A row that gave up pages keeps the first ones that it shares with handles, or rows that gave up none."""
    stays = {b for b in range(B) if lost[b] == 0 and rows.active[b]}
    kept = 0
    for page in mapped(seen, 0, row):
        if not any(isinstance(who, str) or (who in stays and who != row) for who in owners[page]):
            break
        kept += 1
    assert new[row] >= min(kept * S, int(seen.lengths[row]) // S * S), "gives up shared pages"


def check_commit(before, after, counts, num_drafts: int) -> None:
    """What computing, sharing and committing may do."""
    (_, _, old, rows, counters), (_, _, new, now, now_counters) = before, after
    draws = (counts > 0) & (old >= rows.num_known)
    num_drawn, drafted = now.num_known - rows.num_known, np.where(draws, old - rows.num_known, 0)
    assert np.array_equal(num_drawn > 0, draws), "who has caught up draws, nobody else"
    assert np.all((num_drawn <= 1 + drafted) & (drafted <= num_drafts)), "a token, and one for each draft"
    source = np.maximum(rows.source, 0)
    is_ready = rows.active & (rows.source != NO_ROW) & (old[source] >= rows.num_prompt - 1)
    assert np.array_equal(now.source, np.where(is_ready, NO_ROW, rows.source))
    released = rows.active & ~now.active & ~rows.keeps
    kept = np.where(draws, np.minimum(old, now.num_known - 1), old)
    assert np.array_equal(new, np.select([released, is_ready], [0 * old, rows.num_prompt - 1], kept))
    assert now_counters.computed_tokens - counters.computed_tokens == np.sum(counts) <= TOKEN_COUNTS[-1]
    assert now_counters.drawn_tokens - counters.drawn_tokens == np.sum(num_drawn)
    assert now_counters.drafted_tokens - counters.drafted_tokens == np.sum(drafted)
    assert now_counters.accepted_tokens - counters.accepted_tokens == np.sum(num_drawn[draws] - 1)
    steps = now_counters.steps - counters.steps
    smallest = np.searchsorted(TOKEN_COUNTS, np.sum(counts))
    assert np.array_equal(steps, np.arange(len(TOKEN_COUNTS)) == smallest)
