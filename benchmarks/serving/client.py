"""The users of a server: they send their requests when it is time, and note when each of their tokens comes.

Only the standard library is imported, so that a peer's interpreter runs the same loop.
"""

import collections
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple


class Arrival(NamedTuple):
    """A request, and when it comes.

    Args:
        prompt: token ids.
        limit: tokens that are drawn.
        seconds: when it comes, after the start.
        after: it does not come before this many tokens were handed out to all requests together.
    """

    prompt: list[int]
    limit: int
    seconds: float = 0.0
    after: int = 0


class Trace(NamedTuple):
    """What the users saw. All times are wall-clock seconds after the start.

    Args:
        due: when each request came; the server may have been too busy to take it at once.
        pieces: for each request, when tokens came, and which.
        wall: seconds until the last token.
        cpu: seconds of all threads of the process until then.
    """

    due: list[float]
    pieces: list[list[tuple[float, list[int]]]]
    wall: float
    cpu: float

    @property
    def outputs(self) -> list[list[int]]:
        """The tokens of each request."""
        return [[token for _, tokens in pieces for token in tokens] for pieces in self.pieces]

    @property
    def first_token_seconds(self) -> list[float]:
        """How long each request waited for its first token."""
        return [pieces[0][0] - due for due, pieces in zip(self.due, self.pieces, strict=True)]

    def longest_gap(self, num_requests: int | None = None) -> float:
        """The longest time between two tokens of a request, among the first `num_requests` or all."""
        pairs = (pair for pieces in self.pieces[:num_requests] for pair in itertools.pairwise(pieces))
        return max((second[0] - first[0] for first, second in pairs), default=0.0)


def serve(
    arrivals: list[Arrival],
    add: Callable[[int, list[int], int], object],
    step: Callable[[], list[tuple[int, list[int]]]],
) -> Trace:
    """Sends requests in their order, and steps the server until each has all of its tokens.

    Args:
        arrivals: the requests, in the order in which they come.
        add: takes a request's place in `arrivals`, its prompt and its limit.
        step: makes one step; returns the places of requests, and their new tokens.
    """
    coming = collections.deque(enumerate(arrivals))
    due, pieces = [0.0] * len(arrivals), [[] for _ in arrivals]
    lacking: dict[int, int] = {}  # tokens that requests on the server still wait for
    num_given = 0
    start, cpu = time.perf_counter(), time.process_time()
    now = 0.0
    while coming or lacking:
        while coming:
            place, (prompt, limit, seconds, after) = coming[0]
            if seconds > now or (num_given < after and lacking):
                break
            coming.popleft()
            due[place], lacking[place] = now if after else seconds, limit
            add(place, prompt, limit)
        if lacking:
            new = step()
        else:
            time.sleep(coming[0][1].seconds - now)
            new = []
        now = time.perf_counter() - start
        for place, tokens in new:
            if tokens:
                pieces[place].append((now, tokens))
                num_given += len(tokens)
                lacking[place] -= len(tokens)
                if lacking[place] == 0:
                    del lacking[place]
    return Trace(due, pieces, now, time.process_time() - cpu)
