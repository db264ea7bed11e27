"""Pieces in the order in which they come, for loops and for asyncio."""

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Iterator

from paged_jax.engine.request import Piece


class Stream(Iterator[Piece], AsyncIterator[Piece]):
    """An iterator for `for` and for `async for`; it runs the engine whenever it has nothing to give.

    Leaving a stream ends nothing: what was not taken comes from the next stream. Any number of streams may run at the
    same time, in threads and in coroutines: whoever has nothing to give makes the next step for all.

    Args:
        pieces: that nobody took yet.
        is_done: no more will come.
        is_void: a piece is not wanted any more.
        advance: makes a step; called in a thread by coroutines.
    """

    def __init__(
        self,
        pieces: collections.deque[Piece],
        is_done: Callable[[], bool],
        is_void: Callable[[Piece], bool],
        advance: Callable[[], None],
    ):
        self._pieces, self._is_done, self._is_void, self._advance = pieces, is_done, is_void, advance

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        while True:
            is_done = self._is_done()  # asked first: what comes after the answer is taken in this round or the next
            try:
                return self._take()
            except IndexError:
                if is_done:
                    raise StopIteration from None
            self._advance()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Piece:
        while True:
            is_done = self._is_done()
            try:
                return self._take()
            except IndexError:
                if is_done:
                    raise StopAsyncIteration from None
            await _step_in_a_thread(self._advance)

    def _take(self) -> Piece:
        """The first piece that is wanted, which stays if anything is raised; IndexError: there is none."""
        taken: list[Piece] = []
        try:
            while self._is_void(self._pieces[0]):
                self._pieces.popleft()
            taken.extend(map(collections.deque.popleft, (self._pieces,)))  # one call: see `Core.take`
            return taken[0]
        except BaseException:
            self._pieces.extendleft(taken)
            raise


_steps: dict[tuple[Callable[[], None], asyncio.AbstractEventLoop], asyncio.Future[None]] = {}


async def _step_in_a_thread(advance: Callable[[], None]) -> None:
    """One step at a time for all coroutines of a loop: they wait for the same one."""
    key = advance, asyncio.get_running_loop()
    step = _steps.get(key)
    if step is None:
        step = _steps[key] = asyncio.ensure_future(asyncio.to_thread(advance))
        step.add_done_callback(lambda _: _steps.pop(key))
    await asyncio.shield(step)  # a coroutine that is cancelled cancels nobody else's step
