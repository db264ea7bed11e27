"""Random traffic through an engine, and errors at any moment in it, for the tests of the engine and of the store."""

import collections
import pathlib
import random
import sys
from typing import Any

import numpy as np

import hash_decoder as decoder
import plain_beams
from engine_cases import Numbers, pool_is_empty
from paged_jax import engine as package
from paged_jax.engine import Completion, Engine
from paged_jax.sampling import BeamParams, SamplingParams

CONFIG = decoder.config(1 + 24)  # so few pages that rows are preempted all the time
HYBRID = (None, 7)
HERE = pathlib.Path(package.__file__).parent


def make_engine(windows=(None, None), **options: Any) -> Engine:
    config = CONFIG if windows == (None, None) else decoder.config(1 + 24, windows=windows, window_pages=1 + 20)
    forward = decoder.forward if windows == (None, None) else decoder.forward_with(windows)
    options.setdefault("tokenizer", Numbers())
    return Engine(forward, np.int32(0), config, token_counts=(8, 32), visit_steps=4, **options)


class Traffic:
    """Requests that come at random, and what came of each."""

    def __init__(self, engine: Engine, seed: int, windows=(None, None)):
        self.engine, self.rng, self.windows = engine, random.Random(seed), windows
        self.prompts: dict[int, list[int]] = {}
        self.params: dict[int, SamplingParams | BeamParams] = {}
        self.max_beams = engine._core.runner.max_beams
        self.pieces = collections.defaultdict(list)
        self.aborted: set[int] = set()
        self.failed: set[tuple[int, int]] = set()
        self.texts = [np.random.default_rng(i).integers(0, decoder.VOCAB, 40).tolist() for i in range(4)]

    def add(self) -> None:
        prompt = self.rng.choice(self.texts)[: self.rng.randint(1, 40)]
        prompt = prompt + [self.rng.randrange(decoder.VOCAB) for _ in range(self.rng.randint(0, 4))]
        params: Any = SamplingParams(
            max_new_tokens=self.rng.randint(1, 16), num_samples=self.rng.choice((1, 1, 1, 2, 3))
        )
        if self.max_beams and self.rng.random() < 0.4:
            width = self.rng.randint(1, self.max_beams)
            params = BeamParams(
                width, self.rng.randint(1, 10), self.rng.randint(1, width), self.rng.choice((0.5, 1.0, 2.0)),
                self.rng.choice((False, True, "never")), (5, 9, 60, 61, 62, 63) if self.rng.random() < 0.5 else (),
            )  # fmt: skip
        number = self.engine.add_request(
            prompt, params, priority=self.rng.choice((0, 0, 0, -1, 1)), salt=self.rng.choice(("", "", "", "other"))
        )
        self.prompts[number], self.params[number] = prompt, params

    def abort(self) -> None:
        number = self.rng.choice(list(self.prompts))
        self.engine.abort(number)
        self.aborted.add(number)

    def step(self) -> None:
        for piece in self.engine.step():
            assert piece.request not in self.aborted, "a piece came after the abort"
            key = piece.request, piece.sample
            assert not self.pieces[key] or self.pieces[key][-1].finish_reason is None, "a piece came after the last"
            self.pieces[key].append(piece)
            if piece.finish_reason == "error":
                self.failed.add(key)

    def check(self) -> None:
        """After all has ended: the tokens are those of a run without any cache, or their beginning."""
        for number, prompt in self.prompts.items():
            params = self.params[number]
            if isinstance(params, BeamParams):
                self.check_beams(number, prompt, params)
                continue
            expected = decoder.dense_greedy(prompt, params.max_new_tokens, self.windows)
            for sample in range(params.num_samples):
                completion = Completion.join(self.pieces[number, sample])
                count = len(completion.tokens)
                assert list(completion.tokens) == expected[:count]
                assert completion.text == Numbers().decode(completion.tokens)
                if number not in self.aborted and (number, sample) not in self.failed:
                    assert count == len(expected) and completion.finish_reason == "length"

    def check_beams(self, number: int, prompt: list[int], params: BeamParams) -> None:
        """The sequences are those that plain Python finds; of an aborted request they may not have come."""
        found = [pieces for key, pieces in sorted(self.pieces.items()) if key[0] == number]
        assert all(len(pieces) == 1 for pieces in found), "a sequence comes as one piece"
        if number in self.aborted and not found:
            return
        tokens = [piece.tokens for (piece,) in found]
        # Two beams may be equally likely but for rounding: then either is right.
        searches = (self.plain_search(prompt, params, noise) for noise in (0, *[1e-6] * 10))
        expected = next(e for e in searches if [sequence.tokens for sequence in e] == tokens)
        for (piece,), sequence in zip(found, expected, strict=True):
            assert np.isclose(piece.score, sequence.score, atol=1e-4, rtol=1e-5)
            assert np.isclose(sum(piece.logprobs), sequence.total, atol=1e-4, rtol=1e-5)
            if piece.finish_reason != "error":
                assert piece.finish_reason == ("stop" if piece.tokens[-1] in params.stop_tokens else "length")
                assert piece.text == Numbers().decode(piece.tokens)

    def plain_search(self, prompt: list[int], params: BeamParams, noise: float) -> list[plain_beams.Sequence]:
        rng = np.random.default_rng(self.rng.randrange(1000))

        def logprobs_after(drawn):
            logits = decoder.dense_logits([*prompt, *drawn], self.windows) + noise * rng.standard_normal(decoder.VOCAB)
            return logits - np.log(np.sum(np.exp(logits)))

        stop, early = tuple(params.stop_tokens), params.early_stopping
        sizes = params.width, params.max_new_tokens
        found = plain_beams.search(logprobs_after, *sizes, penalty=params.length_penalty, early=early, stop=stop)
        return found[: params.num_return]


def run_traffic(num_requests: int, seed: int, windows=(None, None), compiled_late: int = 0, **options: Any) -> Engine:
    """Serve requests; after the first half at most `compiled_late` programs may be compiled."""
    engine = make_engine(windows, **options)
    engine.generate([[1, 2, 3], [1, 2, 3]], SamplingParams(max_new_tokens=2))
    traffic = Traffic(engine, seed, windows)
    compiled = None
    while len(traffic.prompts) < num_requests or engine.has_work:
        if len(traffic.prompts) < num_requests and traffic.rng.random() < 0.5:
            traffic.add()
        if traffic.prompts and traffic.rng.random() < 0.02:
            traffic.abort()
        traffic.step()
        if len(traffic.prompts) == num_requests // 2 and compiled is None:
            compiled = engine.stats().compilations
    traffic.check()
    assert pool_is_empty(engine)
    assert compiled is not None
    assert engine.stats().compilations <= compiled + compiled_late, "something was compiled after the first half"
    return engine


class Interrupted(BaseException):
    """What a test raises where nobody expects anything."""


def raise_at_line(rng: random.Random, function) -> bool:
    """Run a function, and raise in front of a random line of the engine that it reaches; whether that came."""
    countdown = rng.randint(1, 400)
    raised = False

    def trace(frame, event, _):
        nonlocal countdown, raised
        if not frame.f_code.co_filename.startswith(str(HERE)) or frame.f_code.co_name in ("step", "<genexpr>"):
            return None if event == "call" and "paged_jax" not in frame.f_code.co_filename else trace
        if event == "line":
            countdown -= 1
            if countdown == 0:
                raised = True
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except Interrupted:
        pass
    finally:
        sys.settrace(before)
    return raised


def run_faults(num_errors: int, seed: int, windows=(None, None), **options: Any) -> None:
    numbers = Numbers()
    engine = make_engine(windows, tokenizer=numbers, **options)
    traffic = Traffic(engine, seed, windows)
    runner: Any = engine._core.runner
    visit, count = runner.visit, 0

    def failing_visit(*arguments):
        """What XLA does out of memory: the state was donated, and is gone."""
        for leaf in (engine.tables.groups[0].refcounts, engine.tables.groups[0].pages):
            leaf.delete()
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    while count < num_errors or engine.has_work:
        if count < num_errors and traffic.rng.random() < 0.4:
            traffic.add()
        kind = traffic.rng.random() if count < num_errors else 1.0
        if kind < 0.25:
            count += raise_at_line(traffic.rng, traffic.step)
        elif kind < 0.28:
            runner.visit = failing_visit
            try:
                traffic.step()
            except RuntimeError:
                count += 1
            runner.visit = visit
        elif kind < 0.30:
            before = len(traffic.failed)
            numbers.fails = True
            traffic.step()
            numbers.fails = False
            count += len(traffic.failed) > before
        elif kind < 0.32 and traffic.prompts:
            traffic.abort()
        else:
            traffic.step()
    traffic.check()
    assert pool_is_empty(engine)
