"""Ctrl-C wherever CPython hears it: after each call of a C function, at each function's beginning and each loop's end.

pytest -n 0 -m long tests/engine/test_interrupts.py -s
"""

import collections
import dis
import inspect
import random
import sys
import types
from typing import Any

import pytest

import hash_decoder as decoder
from engine_cases import Numbers, pool_is_empty
from paged_jax.engine import Completion, Engine
from paged_jax.engine.core import Core
from paged_jax.sampling import SamplingParams
from traffic_cases import HERE, HYBRID, make_engine

HEARING = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD")}
CODES: dict[Any, bytes] = {}


class Interrupter:
    """Raises KeyboardInterrupt at one place of the engine, the n-th time that it is reached; counts all places.

    A place is an instruction after one of `HEARING`, unless that was a call of a Python function, whose return is not
    interrupted.
    """

    def __init__(self, place: tuple[Any, int] | None = None, time: int = 1):
        self.place, self.times_left = place, time
        self.counts: collections.Counter[tuple[Any, int]] = collections.Counter()
        self._heard: dict[Any, int | None] = {}  # the last instruction of each frame

    def __call__(self, frame, event, _):
        if frame.f_back in self._heard:
            self._heard[frame.f_back] = None
        if not frame.f_code.co_filename.startswith(str(HERE)):
            return None
        frame.f_trace_opcodes = True
        self._heard[frame] = None
        return self._inside

    def _inside(self, frame, event, _):
        if event == "opcode":
            code = frame.f_code
            if self._heard.get(frame) in HEARING:
                place = code, frame.f_lasti
                self.counts[place] += 1
                self.times_left -= place == self.place
                if place == self.place and self.times_left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            instructions = CODES.setdefault(code, code.co_code)
            self._heard[frame] = instructions[frame.f_lasti]
        elif event == "return":
            self._heard.pop(frame, None)
        return self._inside


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1], [8, 2, 8, 1, 8], [1, 4, 1]]
PARAMS = [SamplingParams(max_new_tokens=n, num_samples=1 + (n == 6)) for n in (9, 6, 12, 7, 5)]


def interrupted(engine: Engine, interrupter: Interrupter, salt: str, windows) -> bool:
    """Serve some requests, two of them by streams of their own, one of which is aborted; whether it was interrupted."""
    numbers = [engine.add_request(p, q, salt=salt) for p, q in zip(PROMPTS, PARAMS, strict=True)]
    best = engine.add_request(PROMPTS[2], SamplingParams(max_new_tokens=6), best_of=2, salt=salt)
    pieces, is_aborted, was_interrupted = collections.defaultdict(list), False, False
    own = engine.stream(numbers[0])

    def serve():
        nonlocal is_aborted
        while engine.has_work:
            for piece in engine.step():
                pieces[piece.request, piece.sample].append(piece)
            if len(pieces[numbers[2], 0]) > 1 and not is_aborted:
                engine.abort(numbers[2])
                is_aborted = True
            for piece in own:
                pieces[piece.request, piece.sample].append(piece)
                break

    sys.settrace(interrupter)
    try:
        serve()
    except KeyboardInterrupt:
        was_interrupted = True
    finally:
        sys.settrace(None)
    serve()
    for number, prompt, params in zip([*numbers, best], [*PROMPTS, PROMPTS[2]], [*PARAMS, PARAMS[1]], strict=True):
        for sample in range(1 if number == best else params.num_samples):
            completion = Completion.join(pieces[number, sample])
            expected = decoder.dense_greedy(prompt, params.max_new_tokens, windows)
            if number == numbers[2]:
                expected = expected[: len(completion.tokens)]
            assert list(completion.tokens) == expected, f"request {number}"
            assert completion.text == Numbers().decode(completion.tokens)
    assert pool_is_empty(engine)
    return was_interrupted


@pytest.mark.long  # some hundred runs
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("windows", [(None, None), HYBRID], ids=["plain", "hybrid"])
def test_an_interrupt_at_each_place_of_the_engine_loses_nothing(windows):
    engine, rng = make_engine(windows), random.Random(0)
    for salt in ("compile", "count"):  # what is compiled is not counted
        interrupted(engine, counted := Interrupter(), salt, windows)
    failures, num_interrupts = [], 0
    for number, (place, count) in enumerate(counted.counts.items()):
        code, at = place
        line = next(p[0] for i, p in enumerate(code.co_positions()) if 2 * i == at)
        for time in {1, rng.randint(1, count)}:
            try:
                num_interrupts += interrupted(engine, Interrupter(place, time), f"{number} {time}", windows)
            except AssertionError as error:
                failures.append(f"{code.co_qualname}, line {line}, instruction {at}, time {time}: {error}")
                engine = make_engine(windows)
    print(f"{num_interrupts} interrupts at {len(counted.counts)} places")
    assert not failures, "\n".join(failures)
    assert num_interrupts > 300


@pytest.mark.parametrize("is_claimed", [False, True], ids=["stream of all", "stream of its own"])
def test_an_interrupt_while_the_last_piece_is_handed_out_ends_no_stream(is_claimed):
    """At each place of `Core._apply`: whoever goes on with the same stream gets the piece, or with `step` if there is
    work."""
    engine = make_engine((None, None))
    apply = inspect.unwrap(Core._apply).__code__  # without the checks of types around it

    def serve(interrupter: Interrupter, salt: str) -> bool:
        number = engine.add_request(PROMPTS[0], SamplingParams(max_new_tokens=7), salt=salt)
        stream, pieces, was_interrupted = engine.stream(number) if is_claimed else engine.stream(), [], False
        sys.settrace(interrupter)
        try:
            pieces.extend(stream)
        except KeyboardInterrupt:
            was_interrupted = True
            assert engine.has_work or is_claimed
        finally:
            sys.settrace(None)
        pieces.extend(stream)
        assert list(Completion.join(pieces).tokens) == decoder.dense_greedy(PROMPTS[0], 7)
        assert not engine.has_work and pool_is_empty(engine)
        return was_interrupted

    for salt in ("compile", "count"):
        serve(counted := Interrupter(), salt)
    places = {place: count for place, count in counted.counts.items() if place[0] is apply}
    assert len(places) > 3
    for number, (place, count) in enumerate(places.items()):
        assert serve(Interrupter(place, count), str(number))  # the last time that it comes there


def test_pieces_that_are_not_handed_out_stay():
    """Whatever line of `Core.take` an error comes in front of, also again in its loops."""
    take = inspect.unwrap(Core.take)  # without the checks of types around it
    for countdown in range(1, 20):
        core = types.SimpleNamespace(pieces=collections.deque((1, 2, 3)), _is_void=lambda piece: piece == 2)
        events = iter(range(countdown, 0, -1))

        def raise_at(frame, event, _, events=events):
            if frame.f_code is not take.__code__:
                return None
            if event == "line" and next(events) == 1:
                raise KeyboardInterrupt
            return raise_at

        before = sys.gettrace()
        sys.settrace(raise_at)
        try:
            taken = take(core)
        except KeyboardInterrupt:
            assert list(core.pieces) == [1, 2, 3]
            continue
        finally:
            sys.settrace(before)
        assert taken == [1, 3] and not core.pieces
        return
    raise AssertionError("every attempt was interrupted")
