"""Beam search in plain Python, one prompt at a time: the meaning that `beam_search` is held against."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Sequence(NamedTuple):
    """Drawn tokens, the sum of their log-probabilities, and what the sequence is worth once it has ended."""

    tokens: tuple[int, ...]
    total: float
    score: float = -np.inf


def search(
    logprobs_after: Callable[[tuple[int, ...]], np.ndarray],
    width: int,
    limit: int,
    *,
    penalty: float = 1.0,
    early: bool | str = False,
    stop: tuple[int, ...] = (),
    see: Callable[[list[Sequence]], object] = len,
) -> list[Sequence]:
    """The finished sequences, the best first.

    Args:
        logprobs_after: of all tokens after some drawn ones; -inf forbids one.
        width: beams.
        limit: the most tokens.
        penalty: the length penalty.
        early: the rule of stopping.
        stop: tokens that end a sequence.
        see: called with the running beams of every step.
    """
    running, finished = [Sequence((), 0.0)], []
    for length in range(1, limit + 1):
        see(running)
        found = []
        for beam in running:
            logprobs = logprobs_after(beam.tokens)
            found += [Sequence((*beam.tokens, t), beam.total + x) for t, x in enumerate(logprobs) if x > -np.inf]
        found = sorted(found, key=lambda s: -s.total)[: width * (1 + max(len(stop), 1))]
        ended = [s for s in found[:width] if s.tokens[-1] in stop or length == limit]
        finished += [s._replace(score=s.total / length**penalty) for s in ended]
        finished = sorted(finished, key=lambda s: -s.score)[:width]
        running = [s for s in found if s.tokens[-1] not in stop][:width]
        if not running or (early is True and len(finished) == width):
            break
        hoped = limit if early == "never" and penalty > 0 else length
        if len(finished) == width and running[0].total / hoped**penalty <= finished[-1].score:
            break
    return finished
