"""Hours of random use: no page is lost, memory stays where it is, and the log of events is bounded.

    python -m benchmarks.soak [--minutes 30] [--json]

Prompts of any length come to an engine with the demo model, whose pool is so small that rows are preempted all the
time; requests are aborted, sessions are forked and closed, and the parameters change. Whenever the engine has nothing
left to do, every page must be free or in the prefix cache, and a prompt that was never seen before under this salt must
draw the tokens that it drew the first time. The first tenth of the time is warm-up; then memory may grow by 5 %.
"""

import argparse
import collections
import itertools
import pathlib
import random
import resource
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.report import Report, add_json_option
from paged_jax import Engine, SamplingParams, models
from paged_jax.engine.session import Session

PERIODS = 10  # of a run; the first is warm-up
MOST_GROWTH = 0.05
BURST = 100  # requests between two quiet moments
PROBE = SamplingParams(max_new_tokens=12)


def resident_bytes() -> int:
    """Memory of this process, as Linux counts it."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def leaked_pages(engine: Engine) -> int:
    """References to pages that nobody holds, or that somebody holds and nobody counted, while nothing runs."""
    wrong = 0
    for table, ids in zip(engine.tables.groups, engine.cached_pages(), strict=True):
        expected = np.bincount(ids, minlength=table.num_pages)
        expected[0] = 1  # the null page
        wrong += int(np.sum(np.asarray(table.refcounts) != expected)) + int(np.sum(np.asarray(table.lengths) != 0))
    return wrong


class Soak:
    """Random use of one engine, and what must hold all the while.

    Args:
        engine: that nobody else uses.
        versions: parameters, between which it changes; it begins with the first.
        vocab_size: V; prompts hold any of these tokens.
        seed: of everything random.
    """

    def __init__(self, engine: Engine, versions: Sequence[Any], vocab_size: int, seed: int = 0):
        self.engine, self.versions, self.vocab_size = engine, versions, vocab_size
        self.rng, self.version = random.Random(seed), 0
        self.counts = dict.fromkeys(("requests", "aborts", "forks", "updates", "looks", "events"), 0)
        self.longest_log = 0
        self._beginnings = [self._tokens(engine.config.max_length // 2) for _ in range(4)]
        self._running: dict[int, SamplingParams] = {}
        self._ended: collections.Counter[int] = collections.Counter()  # samples of each request
        self._drawn: collections.Counter[tuple[int, int]] = collections.Counter()
        self._sessions: list[Session] = []
        self._answers: dict[int, tuple[int, ...]] = {}  # of the probe, by version
        self._last_event: Any = None

    def burst(self) -> None:
        """Some requests and all that goes with them, until nothing is left to do; then look."""
        for _ in range(BURST):
            self._add()
            kind = self.rng.random()
            if kind < 0.05:
                self._abort()
            elif kind < 0.10:
                self._fork()
            elif kind < 0.105:
                self._update()
            while len(self._running) > 2 * self.engine.config.max_sequences or self.rng.random() < 0.5:
                self._step()
        while self.engine.has_work:
            self._step()
        self._look()

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(self.vocab_size) for _ in range(count)]

    def _add(self) -> None:
        beginning = self.rng.choice(self._beginnings)
        prompt = beginning[: self.rng.randint(0, len(beginning))] + self._tokens(self.rng.randint(1, 8))
        params = SamplingParams(
            max_new_tokens=self.rng.randint(1, self.engine.config.max_length // 4),
            temperature=self.rng.choice((0.0, 1.0)),
            num_samples=self.rng.choice((1, 1, 1, 2, 3)),
            seed=self.rng.randrange(2**31),
        )
        salt, priority = self.rng.choice(("", "", "", "other")), self.rng.choice((0, 0, 0, 1, -1))
        self._running[self.engine.add_request(prompt, params, priority=priority, salt=salt)] = params
        self.counts["requests"] += 1

    def _abort(self) -> None:
        number = self.rng.choice(list(self._running))
        del self._running[number]
        self.engine.abort(number)
        self.counts["aborts"] += 1

    def _fork(self) -> None:
        """Grow a tree of sessions by one, which all others run beside; close one where there are many."""
        if not self._sessions:
            self._sessions.append(self.engine.session(self._tokens(8)))
        parent = self.rng.choice(self._sessions)
        (answer,) = parent.generate(SamplingParams(max_new_tokens=4, temperature=1.0, seed=self.rng.randrange(2**31)))
        child = parent.fork(answer, self._tokens(2))
        self._sessions.append(child)
        if len(self._sessions) > 6 or len(child.tokens) > self.engine.config.max_length // 2:
            self._sessions.remove(oldest := max(self._sessions, key=lambda session: len(session.tokens)))
            oldest.close()
        self.counts["forks"] += 1

    def _update(self) -> None:
        self.version = (self.version + 1) % len(self.versions)
        self.engine.update_params(self.versions[self.version])
        self.counts["updates"] += 1

    def _step(self) -> None:
        for piece in self.engine.step():
            params = self._running[piece.request]  # else a piece came after the abort, or after the last
            self._drawn[piece.request, piece.sample] += len(piece.tokens)
            if piece.finish_reason is not None:
                drawn, most = self._drawn.pop((piece.request, piece.sample)), params.max_new_tokens
                is_right = drawn == most if piece.finish_reason == "length" else piece.finish_reason == "stop"
                assert is_right, f"{piece.finish_reason} after {drawn} tokens of {most}: {piece.error}"
                self._ended[piece.request] += 1
                if self._ended[piece.request] == params.num_samples:
                    del self._running[piece.request], self._ended[piece.request]
        events = self.engine.events
        new = itertools.takewhile(lambda event: event is not self._last_event, reversed(events))
        self.counts["events"] += sum(1 for _ in new)
        self._last_event = events[-1] if events else None
        self.longest_log = max(self.longest_log, len(events))

    def _look(self) -> None:
        assert not self._running, f"requests {list(self._running)} never ended"
        self._drawn.clear()  # of requests that were aborted
        self._ended.clear()
        prompt = self._beginnings[0][:20]
        ((probe,),) = self.engine.generate([prompt], PROBE, salt=f"probe {self.counts['looks']}")
        first = self._answers.setdefault(self.version, probe.tokens)
        assert probe.tokens == first, f"version {self.version} drew {probe.tokens}, before {first}"
        self.engine.step()
        leaked = leaked_pages(self.engine)
        assert leaked == 0, f"{leaked} references to pages are wrong after {self.counts['requests']} requests"
        self.counts["looks"] += 1


def make_soak() -> Soak:
    """The demo model in float32, 8 rows of 256 tokens, and a pool for three of them."""
    sizes: dict[str, Any] = {"max_sequences": 8, "max_length": 256, "num_pages": 1 + 48, "token_counts": (8, 64)}
    engine = Engine.from_pretrained(models.DEMO, dtype="float32", visit_steps=2, **sizes)
    model = models.load(models.DEMO, "float32")
    other = jax.tree.map(lambda x: x * x.dtype.type(1.01), model.params)
    return Soak(engine, [model.params, other], model.config.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    add_json_option(parser)
    options = parser.parse_args()
    soak = make_soak()
    report = Report("soak", f"random use of an engine with the demo model for {options.minutes:g} minutes")
    begin = time.monotonic()
    for period in range(1, PERIODS + 1):
        sizes = []
        while not sizes or time.monotonic() - begin < options.minutes * 60 * period / PERIODS:
            soak.burst()
            sizes.append(resident_bytes())
        statistics = soak.engine.stats()
        report.add(
            minutes=(time.monotonic() - begin) / 60,
            **soak.counts,
            longest_log=soak.longest_log,
            preemptions=statistics.preemptions,
            evicted_pages=statistics.evicted_pages,
            compilations=statistics.compilations,
            MiB=float(np.mean(sizes)) / 2**20,
            arrays_MiB=sum(array.nbytes for array in jax.live_arrays()) / 2**20,
        )
        print(", ".join(f"{name} {value:.6g}" for name, value in report.rows[-1].items()), flush=True)
    report.finish(options)
    first, last = report.rows[0], report.rows[-1]
    growth = last["MiB"] / first["MiB"] - 1
    compiled = last["compilations"] - first["compilations"]
    print(f"after the first period memory grew by {growth:.2%}, and {compiled} programs were compiled")
    assert growth < MOST_GROWTH, f"memory grew by {growth:.1%}, more than {MOST_GROWTH:.0%}"


if __name__ == "__main__":
    main()
