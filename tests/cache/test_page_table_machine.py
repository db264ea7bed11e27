"""Random histories of a page table, against plain Python lists and a shadow of what the pages hold.

The long form runs at least 200,000 transitions, in about ten minutes:

    pytest -n 0 -m long tests/test_page_table_machine.py -s
"""

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from paged_jax.cache import invariants
from state_machine import run_machine
from table_model import NAMES, TRANSITIONS, WINDOWS, B, Driver, M, S, Transitions

COUNTS = Counter()  # transitions of all machines of this process

slots = st.integers(-1, B)
few_tokens = st.lists(st.sampled_from([0, 0, 1, 1, 1, 2, S]), min_size=B, max_size=B)
many_tokens = st.lists(st.integers(-1, M * S + 1), min_size=B, max_size=B)


class PageTableMachine(RuleBasedStateMachine):
    """Random transitions; `Driver` checks after every one of them."""

    transitions: Any = TRANSITIONS

    def __init__(self):
        super().__init__()
        self.driver = Driver(self.transitions)

    @rule(new_tokens=few_tokens, num_steps=st.integers(1, 6))
    def decode(self, new_tokens, num_steps):
        for _ in range(num_steps):
            self.driver.reserve(new_tokens)

    @rule(new_tokens=many_tokens)
    def prefill(self, new_tokens):
        self.driver.reserve(new_tokens)

    @rule(new_tokens=few_tokens, priority=st.lists(st.integers(-2, 2), min_size=B, max_size=B))
    def reserve_by_priority(self, new_tokens, priority):
        self.driver.reserve(new_tokens, priority)

    @rule(mask=st.integers(0, 2**B - 1), again=st.booleans())
    def release(self, mask, again):
        mask = [bool(mask >> b & 1) for b in range(B)]
        self.driver.release(mask)
        if again:
            self.driver.reserve([S + 1 if m else 1 for m in mask])

    @rule(cut=st.lists(st.integers(0, S + 1), min_size=B, max_size=B))
    def truncate(self, cut):
        self.driver.truncate([max(len(row.tokens) - n, 0) for row, n in zip(self.driver.rows, cut, strict=True)])

    @rule(lengths=st.lists(st.integers(-1, M * S + 1), min_size=B, max_size=B))
    def truncate_to_anything(self, lengths):
        self.driver.truncate(lengths)

    @rule(window=st.sampled_from(WINDOWS))
    def slide(self, window):
        self.driver.slide(window)

    @rule(pairs=st.lists(st.tuples(slots, slots), min_size=4, max_size=4))
    def fork(self, pairs):
        self.driver.fork(pairs)

    @rule(parents=st.lists(st.integers(0, B - 1), min_size=4, max_size=4), append=st.booleans())
    def fork_to_empty_rows(self, parents, append):
        empty = [b for b in range(B) if not self.driver.rows[b].tokens] + [-1] * 4
        self.driver.fork(list(zip(parents, empty[:4], strict=True)))
        if append:
            self.driver.reserve([1] * B)

    @rule(parents=st.lists(slots, min_size=B, max_size=B))
    def permute(self, parents):
        self.driver.permute(parents)

    @rule(steps=st.lists(st.lists(st.integers(0, B - 1), min_size=B, max_size=B), min_size=1, max_size=4))
    def beam_search(self, steps):
        for parents in steps:
            self.driver.permute(parents)
            self.driver.reserve([1] * B)

    @rule(slot=slots, num_tokens=st.integers(-1, M * S + 1), first_column=st.integers(0, M))
    def publish_anything(self, slot, num_tokens, first_column):
        self.driver.publish(slot, num_tokens, first_column)

    @precondition(lambda self: len(self.driver.held) < 6)
    @rule(slot=st.integers(0, B - 1), share=st.floats(0, 1))
    def publish(self, slot, share):
        self.driver.publish(slot, round(share * len(self.driver.rows[slot].tokens)))

    @precondition(lambda self: self.driver.held)
    @rule(slot=slots, index=st.integers(0, 100), append=st.booleans())
    def attach(self, slot, index, append):
        self.driver.attach(slot, self.driver.held[index % len(self.driver.held)].handle)
        if append:
            self.driver.reserve([1] * B)

    @precondition(lambda self: self.driver.held)
    @rule(index=st.integers(0, 100))
    def drop(self, index):
        self.driver.drop(self.driver.held[index % len(self.driver.held)].handle)

    @rule(slot=st.integers(0, B - 1), share=st.floats(0, 1), both=st.booleans(), ends=st.booleans())
    def drop_pages(self, slot, share, both, ends):
        for _ in range(2):
            self.driver.publish(slot, round(share * len(self.driver.rows[slot].tokens)))
        if ends:
            self.driver.release([b == slot for b in range(B)])
        self.driver.drop_pages(self.driver.held[-1 - both :])

    @precondition(lambda self: self.driver.dropped)
    @rule(slot=slots)
    def use_a_stale_handle(self, slot):
        handle = self.driver.dropped[-1]
        if self.driver.is_seen_to_be_stale(handle):
            self.driver.attach(slot, handle)
            self.driver.drop(handle)

    @rule()
    def clear_fault(self):
        self.driver.clear_fault()

    @rule(really=st.integers(0, 9))
    def reset(self, really):
        if really == 0:
            self.driver.reset()

    def teardown(self):
        driver = self.driver
        held = [held.handle for held in driver.held]
        invariants.check(driver.table, held)
        driver.release_everything()
        invariants.check(driver.table)
        COUNTS["transitions"] += driver.num_transitions


def test_random_histories():
    COUNTS.clear()
    run_machine(PageTableMachine, num_examples=60, num_steps=40)
    assert COUNTS["transitions"] >= 2000


def test_one_trace_a_transition():
    """Growing sequences, changing ids and refcounts: after one call each transition is never traced again."""
    transitions: Any = Transitions()
    driver = Driver(transitions)
    driver.reserve([1] * B)
    driver.reserve([1] * B, priority=[0] * B)
    driver.fork([(0, 1)] * 4)
    driver.permute(range(B))
    driver.truncate([1] * B)
    driver.publish(0, 1)
    driver.release([True] * B)
    driver.attach(0, driver.held[0].handle)
    driver.drop(driver.held[0].handle)
    driver.drop_pages([])
    for window in WINDOWS:
        driver.slide(window)
    driver.clear_fault()
    driver.reset()
    before = dict(transitions.num_traces)

    class Machine(PageTableMachine):
        pass

    Machine.transitions = transitions
    run_machine(Machine, num_examples=10, num_steps=40)
    assert before == transitions.num_traces == {**dict.fromkeys(NAMES, 1), "reserve": 2, "slide": len(WINDOWS)}


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_long_random_histories():
    target = int(os.environ.get("NUM_TRANSITIONS", 200_000))
    COUNTS.clear()
    while COUNTS["transitions"] < target:
        run_machine(PageTableMachine, num_examples=100, num_steps=50, derandomize=False)
        print(f"{COUNTS['transitions']} transitions", flush=True)
