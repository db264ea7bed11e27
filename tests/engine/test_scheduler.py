"""The scheduler by itself: random histories against what must always hold, and broken schedulers that they find."""

import inspect
import types

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from paged_jax.cache.config import CacheConfig
from paged_jax.engine import scheduler
from paged_jax.engine.output import Output
from paged_jax.engine.request import Request, Sample
from paged_jax.sampling import BeamParams, SamplingParams
from state_machine import run_machine

CONFIG = CacheConfig(
    num_layers=2, num_kv_heads=1, head_dim=64, num_pages=1 + 12, max_sequences=3, max_pages_per_sequence=8, page_size=4,
    windows=(None, 6), window_pages=1 + 12,
)  # fmt: skip
STEP_TOKENS, VISIT_STEPS, MAX_BEAMS = 8, 4, 2


def pages(num_tokens: int, step_tokens: int = STEP_TOKENS) -> tuple[int, int]:
    """The most that a row of this length maps in the two groups, by hand."""
    full = -(-num_tokens // 4)
    return full, min(full, -(-(6 + step_tokens - 2) // 4) + 1)


def most_pages(sample: Sample, length: int) -> tuple[int, int]:
    """The most that a sample of this length maps; beams have the pages of their prompt in common, but for windows."""
    if sample.width == 1 or length <= sample.num_prompt:
        return pages(length)
    full, window = pages(length, step_tokens=1)
    common, width = sample.num_prompt // 4, sample.width
    return common + width * (full - common), max(width * window, pages(sample.num_prompt)[1])


class Machine(RuleBasedStateMachine):
    """Samples come, run, draw and end at random; the plain model is a list of them and an honest count of pages."""

    module: types.ModuleType = scheduler

    def __init__(self):
        super().__init__()
        self.scheduler = self.module.Scheduler(CONFIG, STEP_TOKENS, VISIT_STEPS)
        self.prefixes = self.module.NoPrefixes(2)
        self.samples: list[Sample] = []  # that have not ended
        self.visits: list[tuple[int, dict[int, Sample]]] = []  # on their way
        self.beam_tokens: dict[Sample, int] = {}  # that beams have, of which the host knows nothing
        self.order = 0
        self.is_sound = True  # no check has failed

    def free(self) -> tuple[int, ...]:
        """Pages that the running samples leave."""
        held = [most_pages(s, s.num_cached) for s in self.scheduler.running.values()]
        return tuple(12 - sum(h[group] for h in held) for group in range(2))

    @rule(
        num_prompt=st.integers(1, 24), num_new=st.integers(1, 8), priority=st.sampled_from((0, 0, 0, -1, 1)),
        count=st.integers(1, 3),
    )  # fmt: skip
    def add(self, num_prompt, num_new, priority, count):
        params = SamplingParams(max_new_tokens=num_new)
        self.scheduler.check(num_prompt, num_new)
        request = Request(self.order, (1,) * num_prompt, params, priority)
        output = Output(None, request.prompt, params)
        request.samples = [Sample(request, i, self.order + i, output) for i in range(count)]
        self.order += count
        for sample in request.samples:
            self.scheduler.add(sample)
        self.samples += request.samples

    @rule(
        num_prompt=st.integers(1, 24), num_new=st.integers(1, 8), priority=st.sampled_from((0, 0, 0, -1, 1)),
        width=st.integers(1, MAX_BEAMS),
    )  # fmt: skip
    def search(self, num_prompt, num_new, priority, width):
        beams = BeamParams(width, num_new)
        self.scheduler.check(num_prompt, num_new, width)
        request = Request(self.order, (1,) * num_prompt, beams.sampling, priority, beams=beams)
        sample = Sample(request, 0, self.order, Output(None, request.prompt, request.params), MAX_BEAMS)
        request.samples = [sample]
        self.order += 1
        self.scheduler.add(sample)
        self.samples.append(sample)
        self.beam_tokens[sample] = 0

    @precondition(lambda self: self.samples)
    @rule(index=st.integers(0, 50))
    def abort(self, index):
        sample = self.samples.pop(index % len(self.samples))
        self.scheduler.remove(sample)

    @precondition(lambda self: self.samples)
    @rule(progress=st.lists(st.integers(0, VISIT_STEPS), min_size=3, max_size=3))
    def step(self, progress):
        self.advance(progress)

    def advance(self, progress: list[int]) -> None:
        """A plan, and what the device makes of it: rows draw, and the youngest give up pages where they run short."""
        waiting, running, free = list(self.scheduler.waiting), dict(self.scheduler.running), self.free()
        pages_held = {sample: held(sample) for sample in running.values()}
        plan = self.scheduler.plan(free, self.prefixes)
        self.is_sound = False
        self.check(plan, waiting, running, free, pages_held)
        self.is_sound = True
        self.visits.append((plan.num_steps, dict(self.scheduler.running)))
        if len(self.visits) < 2 and self.scheduler.running:
            return  # a visit is read one later
        num_steps, rows = self.visits.pop(0)
        for row, sample in rows.items():
            if self.scheduler.running.get(row) is not sample:
                continue
            sample.steps_ahead -= num_steps
            num_known = sample.num_known + self.beam_tokens.get(sample, 0)
            new = min(progress[row], num_steps, sample.longest + 1 - num_known)
            if sample in self.beam_tokens:
                self.beam_tokens[sample] += new
            else:
                sample.drawn += [1] * new
            sample.num_cached = min(num_known + new, sample.longest)
            if num_known + new > sample.longest:
                self.scheduler.remove(sample)
                self.samples.remove(sample)
        for sample in sorted(self.scheduler.running.values(), key=lambda s: s.rank, reverse=True):
            if min(self.free()) < 0:
                sample.num_cached = 0

    def check(self, plan, waiting, running, free, pages_held):
        now = self.scheduler.running
        assert sorted(now) == sorted({s.row for s in now.values()}), "a row for each, and each in its row"
        rows = [row for s in now.values() for row in s.rows_from(s.row)]
        assert len(rows) == len(set(rows)) and all(row < CONFIG.max_sequences for row in rows), "each row once"
        assert all(row % s.num_rows == 0 for row, s in now.items()), "beams are a group of the batch"
        assert set(self.scheduler.waiting) | set(now.values()) == set(self.samples), "nobody is forgotten"
        assert not set(self.scheduler.waiting) & set(now.values())
        assert bool(now) == bool(self.samples) and (plan.num_steps > 0) == bool(now), "somebody always runs"
        assert list(self.scheduler.waiting) == sorted(self.scheduler.waiting, key=lambda s: s.rank)
        ages = self.scheduler.ages()
        by_age = sorted(now.values(), key=lambda s: ages[s.row])
        assert by_age == sorted(now.values(), key=lambda s: s.rank), "the device serves by rank"
        assert len({ages[row] for row in rows}) == len(rows), "each row has an age of its own"
        admitted = [a.sample for a in plan.admitted]
        assert [s for s in waiting if s in admitted] == admitted, "in their order"
        passed_over = [s for s in self.scheduler.waiting if admitted and s.rank < admitted[-1].rank]
        assert not passed_over, "nobody is overtaken"
        for row, sample in plan.paused:
            urgent = [s for s in now.values() if row in s.rows_from(s.row)]
            assert running[row] is sample and urgent[0].request.priority < sample.request.priority
        if self.scheduler.waiting and not admitted:
            first = self.scheduler.waiting[0]
            least = max(s.request.priority for s in now.values())
            served_before = [s for s in now.values() if s.rank < first.rank]
            assert least <= first.request.priority or served_before, "the first of all waits for a row"
        for sample, source in plan.admitted:
            assert source is None or (source.request is sample.request and source.rank < sample.rank)
            before = [s for s in now.values() if s.rank < sample.rank]
            after = [s for s in now.values() if s.rank > sample.rank and s not in admitted]
            if before:  # all of them and it find pages until the host looks again, at the cost of those after it
                needed = [self.growth(s, VISIT_STEPS - plan.num_steps) for s in [*before, sample]]
                after += [s for _, s in plan.paused]
                room = [f + sum(pages_held[s][g] for s in after) for g, f in enumerate(free)]
                assert all(sum(n[g] for n in needed) <= room[g] for g in range(2)), "pages that are not there"
        needed = [self.growth(s) for s in now.values()]
        assert list(plan.shortage) == [max(0, sum(n[g] for n in needed) - free[g]) for g in range(2)]

    @staticmethod
    def growth(sample: Sample, more_steps: int = 0) -> list[int]:
        """Pages that a sample takes until the end of the planned visit."""
        num_known = sample.num_known if sample.request.beams is None else max(sample.num_prompt, sample.num_cached + 1)
        length = min(num_known + sample.steps_ahead + more_steps, sample.longest)
        return [max(0, most - has) for most, has in zip(most_pages(sample, length), held(sample), strict=True)]

    def teardown(self):
        for _ in range(1000):
            if not self.samples or not self.is_sound:
                return
            self.advance([VISIT_STEPS] * 3)
        raise AssertionError("somebody waits for ever")


def held(sample: Sample) -> tuple[int, int]:
    """Pages that the row of a sample holds at least."""
    return -(-sample.num_cached // 4), -(-min(sample.num_cached, 5) // 4)


def machine_of(module: types.ModuleType) -> type[Machine]:
    class Mutant(Machine):
        pass

    Mutant.module = module
    return Mutant


def test_random_histories():
    run_machine(Machine, 15, 25, shrink=False)


# the line, and what it becomes
MUTANTS = {
    "newcomers come first": ("bisect.insort(self._waiting, sample, key=_rank)", "self._waiting.insert(0, sample)"),
    "nobody counts pages": ("return not before or all(map(operator.le, needed, room))", "return True"),
    "who comes before is not counted": ("if s.rank < sample.rank)]", "if s.rank < (-9, 0))]"),
    "pages in flight are forgotten": ("(sample.steps_ahead + num_steps)", "num_steps"),
    "windows hold everything": ("num_cached if g.window is None else min(num_cached, g.window - 1)", "num_cached"),
    "a row is given twice": ("place.row, num_shared", "0, num_shared"),
    "equals take rows from each other": (
        "one.request.priority > other.request.priority", "one.request.priority >= other.request.priority"
    ),
    "priorities take no rows": ("one.request.priority > other.request.priority", "False"),
    "beams stand anywhere": ("max_sequences - size + 1, size)", "max_sequences - size + 1)"),
    "the rows of beams go to others": ("for row in other.rows_from(other.row)}", "for row in (other.row,)}"),
    "beams take the pages of one row": ("if width == 1 or length <= num_prompt:", "if True:"),
    "beams share no prompt": ("num_prompt // self._config.page_size", "0"),
    "what beams have cached is not counted": ("max(num_known, num_cached + 1)", "num_known"),
    "who is paused is forgotten": ("        for _, sample in paused:\n            self.add(sample)\n", ""),
    "a sample that has ended keeps its row": ("            del self.running[sample.row]\n", "            pass\n"),
    "samples wait for a prompt of others": ("a.sample.request is sample.request and", "True and"),
    "ages are those of the rows": ("order.get(row, len(order))", "row"),
    "nothing is evicted": (
        "max(0, n) for n in _add(self._needed(num_steps), prefixes.arriving(), _negative(free))",
        "0 for n in free",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds(name):
    line, broken_line = MUTANTS[name]
    source = inspect.getsource(scheduler)
    assert source.count(line) == 1, f"{source.count(line)} places hold {line!r}"
    mutant = types.ModuleType(scheduler.__name__)
    exec(compile(source.replace(line, broken_line), "mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, ValueError)):
        run_machine(machine_of(mutant), 60, 30, shrink=False)
