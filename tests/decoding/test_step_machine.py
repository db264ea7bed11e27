"""Random batches: whoever comes, waits, ends or gives up pages, every row draws what it draws alone.

The long form runs 50,000 steps:

    pytest -n 0 -m long tests/decoding/test_step_machine.py -s
"""

import dataclasses
import functools
import os
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from batch_model import HYBRID, MOST_HELD, PLAIN, SAMPLING, B, Batch, M, Request, S, Stages, Told, stages_of
from hash_decoder import VOCAB
from paged_jax.decoding.plan import first_come_first_served
from paged_jax.decoding.rows import DecodeState
from state_machine import run_machine

COUNTS = Counter()  # of all machines of this process

lengths = st.one_of(st.integers(1, 12), st.integers(1, M * S + 1))
new_tokens = st.integers(1, 16)
kinds = st.integers(0, len(SAMPLING) - 1)
samples = st.integers(0, 2)


def text(seed: int, length: int) -> tuple[int, ...]:
    """One of a few texts, of which prompts are the first tokens."""
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


class StepMachine(RuleBasedStateMachine):
    """Random histories of a batch; `Batch` checks after everything that happens."""

    windows: tuple[int | None, ...] = PLAIN
    stages: Stages | None = None

    def __init__(self):
        super().__init__()
        self.batch = Batch(self.windows, self.stages)

    def free(self) -> list[int]:
        return [row for row in range(B) if not self.batch.rows.active[row]]

    def active(self) -> list[int]:
        return np.flatnonzero(self.batch.rows.active).tolist()

    def leaders(self) -> list[int]:
        """Rows that have drawn nothing yet: others may wait for their prompt."""
        rows = self.batch.rows
        return np.flatnonzero(rows.active & (rows.num_known == rows.num_prompt)).tolist()

    @precondition(lambda self: self.free())
    @rule(
        seed=st.integers(0, 3), length=lengths, num_new=new_tokens, kind=kinds, sample=samples, oldest=st.booleans(),
        keeps=st.booleans(),
    )  # fmt: skip
    def start(self, seed, length, num_new, kind, sample, oldest, keeps):
        request = Request(text(seed, length), num_new, kind, sample)
        self.batch.start(self.free()[0], request, oldest=oldest, keeps=keeps)

    @precondition(lambda self: self.free() and self.leaders())
    @rule(index=st.integers(0, B), num_new=new_tokens, kind=kinds, sample=samples, keeps=st.booleans())
    def start_sample_that_waits(self, index, num_new, kind, sample, keeps):
        leaders = self.leaders()
        source = leaders[index % len(leaders)]
        request = Request(self.batch.requests[source].prompt, num_new, kind, sample)
        self.batch.start(self.free()[0], request, oldest=False, keeps=keeps, source=source)

    @precondition(lambda self: self.free() and self.batch.held)
    @rule(
        index=st.integers(0, 2), length=st.integers(1, 12), num_new=new_tokens, kind=kinds, sample=samples,
        oldest=st.booleans(), keeps=st.booleans(),
    )  # fmt: skip
    def start_behind_a_handle(self, index, length, num_new, kind, sample, oldest, keeps):
        index %= len(self.batch.held)
        prompt = (self.batch.held[index].tokens + text(9, length))[: M * S]
        if len(prompt) > len(self.batch.held[index].tokens):
            request = Request(prompt, num_new, kind, sample)
            self.batch.start(self.free()[0], request, oldest=oldest, keeps=keeps, held=index)

    @precondition(lambda self: self.active())
    @rule(index=st.integers(0, 4 * B))
    def abort(self, index):
        if index < B:  # not too often: a batch that is full is the one that runs short of pages
            active = self.active()
            self.batch.stop(active[index % len(active)])

    @precondition(lambda self: len(self.batch.held) < MOST_HELD and bool(np.any(self.batch.lengths)))
    @rule(index=st.integers(0, B), share=st.floats(0, 1))
    def publish(self, index, share):
        rows = np.flatnonzero(self.batch.lengths)
        row = rows[index % len(rows)]
        self.batch.publish(int(row), round(share * int(self.batch.lengths[row])))

    @precondition(lambda self: self.batch.held)
    @rule(index=st.integers(0, 2))
    def drop(self, index):
        self.batch.drop(index % len(self.batch.held))

    @precondition(lambda self: self.active())
    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            if np.any(self.batch.rows.active):
                self.batch.step()

    @precondition(lambda self: self.active())
    @rule(num_steps=st.integers(1, 10))
    def run(self, num_steps):
        self.batch.run(num_steps)

    def teardown(self):
        if not self.batch.is_sound:
            return  # a check has failed, and is what is reported
        self.batch.finish()
        counters = self.batch.counters
        COUNTS["steps"] += int(np.sum(counters.steps))
        COUNTS["preemptions"] += int(counters.preemptions)
        COUNTS["recomputed tokens"] += int(counters.recomputed_tokens)
        COUNTS["accepted drafts"] += int(counters.accepted_tokens)
        COUNTS["rejected drafts"] += int(counters.drafted_tokens - counters.accepted_tokens)


def machine_of(windows, stages: Stages | None = None, check_at_the_end: bool = True) -> type[StepMachine]:
    class Machine(StepMachine):
        if not check_at_the_end:

            def teardown(self):
                pass

    Machine.windows, Machine.stages = windows, stages
    return Machine


@functools.cache
def mixed_stages() -> Stages:
    """A step verifies drafts; `run` is that of a stepper without a drafter, which `alone` has compiled."""
    stages = Stages(PLAIN, drafter=Told(3))
    stages.run = stages_of(PLAIN).run
    return stages


def test_random_batches():
    """With drafts, of which some are right, and without: nothing else is drawn, and rejected ones leave no trace."""
    COUNTS.clear()
    run_machine(machine_of(PLAIN, mixed_stages()), num_examples=25, num_steps=25)
    assert COUNTS["steps"] >= 1000 and COUNTS["preemptions"] >= 10, COUNTS
    assert COUNTS["accepted drafts"] >= 50 and COUNTS["rejected drafts"] >= 50, COUNTS
    assert mixed_stages().num_traces == 1


@pytest.mark.long  # programs of their own
@pytest.mark.parametrize("drafter", [None, Told(3)], ids=["without", "drafts"])
@pytest.mark.parametrize("windows", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_random_batches_of_one_kind_of_step(windows, drafter):
    COUNTS.clear()
    stages = Stages(windows, drafter=drafter)
    run_machine(machine_of(windows, stages), num_examples=25, num_steps=25)
    assert COUNTS["steps"] >= 500 and COUNTS["preemptions"] >= 5, COUNTS
    assert drafter is None or COUNTS["accepted drafts"] >= 50 and COUNTS["rejected drafts"] >= 50, COUNTS
    assert stages.num_traces == 1


def test_nobody_takes_the_pages_that_an_older_row_gave_up():
    """Two samples share all that they hold, so an older row is the youngest that owns pages."""
    machine = machine_of(PLAIN, mixed_stages())()
    machine.start(seed=0, length=10, num_new=1, kind=0, sample=0, oldest=False, keeps=False)
    for sample in (0, 2):
        machine.start_sample_that_waits(index=0, num_new=1, kind=0, sample=sample, keeps=False)
    machine.start(seed=0, length=14, num_new=5, kind=0, sample=0, oldest=True, keeps=False)
    machine.run(num_steps=5)
    machine.start(seed=0, length=1, num_new=1, kind=0, sample=0, oldest=True, keeps=False)
    machine.step(num_steps=1)
    assert machine.batch.counters.preemptions == 1
    machine.teardown()


def shortest_first(state: DecodeState, budget: int):
    """Another policy: the shortest prompts first."""
    age = state.rows.num_prompt * B + jnp.arange(B, dtype=jnp.int32)
    rows = dataclasses.replace(state.rows, age=age)
    return first_come_first_served(dataclasses.replace(state, rows=rows), budget)


def test_another_plan_changes_the_order_but_not_the_tokens():
    ends = []
    other = Stages(PLAIN, plan=shortest_first, drafter=Told(3))
    other.compute, other.end = mixed_stages().compute, mixed_stages().end  # are compiled once
    for stages in (mixed_stages(), other):
        batch = Batch(PLAIN, stages)
        batch.start(0, Request(tuple(range(16)), 2, 0, 0), oldest=False, keeps=False)
        batch.start(1, Request(tuple(range(3)), 2, 0, 0), oldest=False, keeps=False)
        order = []
        while np.any(batch.rows.active):
            was_active = batch.rows.active
            state, counts, _ = stages.make_room(batch.state)
            state, drawn = stages.compute(state, counts)
            batch.state, _ = stages.end(state, drawn)
            batch.see()  # each row has drawn what it draws alone
            order += np.flatnonzero(was_active & ~batch.rows.active).tolist()
        ends.append(order)
    assert ends == [[0, 1], [1, 0]]


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("windows", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_long_random_batches(windows):
    target = int(os.environ.get("NUM_STEPS", 50_000)) // 2
    COUNTS.clear()
    while COUNTS["steps"] < target:
        run_machine(machine_of(windows), num_examples=100, num_steps=50, derandomize=False)
        print(dict(COUNTS), flush=True)
    assert stages_of(windows).num_traces == 1
