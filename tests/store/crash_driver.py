"""Stores whose processes are killed: run by test_crashes.py, in a process that forks and has faults.c before its libc.

    python crash_driver.py FOLDER COUNT KIND ...

Each kind ends with a line that says how many times a process was killed.
"""

import ctypes
import itertools
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from store_cases import LARGE, SMALL, bytes_on_disk, check, prefix

from paged_jax.store import Store

KILL, FAIL = 1, 2
CAP = 60_000  # bytes, six large pages
libc = ctypes.CDLL(None)


class NoWarnings(logging.Handler):
    """What was whole is found whole: nobody has reason to warn."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)
        os._exit(3)


def fork(function: Callable[[], None]) -> int:
    """Run a function in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(4)
    return child


def was_killed(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"a process failed with {status}"
    return os.WIFSIGNALED(status)


def assert_whole(folder: Path, kept: list, perhaps: list, cap: int | None) -> None:
    """After a kill: the store opens, what was synced is there, nothing wrong is read, no file is left over."""
    store = Store(folder, cap)
    assert store.is_open
    assert cap is not None or check(store, kept) == len(kept)
    check(store, perhaps)
    good, bad = store.verify()
    assert bad == 0 and good == store.contents().pages
    assert len(list((folder / "writing").iterdir())) == 1 and not list((folder / "writing").glob("*/*"))
    contents = store.contents()
    assert cap is None or contents.bytes <= cap
    assert bytes_on_disk(store) <= contents.bytes, "a file that no row names"
    store.write(perhaps)
    assert cap is not None or check(store, perhaps) == len(perhaps), "it can be written again"
    store.close()


def at_every_call(folder: Path, opens: bool, cap: int | None) -> int:
    """Kill a process that writes, or opens, at the first call that changes a file, the second, and so on."""
    kept, perhaps = [*prefix(1), *prefix(2, num_bytes=SMALL)], [*prefix(3), *prefix(4, num_bytes=SMALL)]
    if not opens:
        store = Store(folder / "base", cap)
        store.write(kept)
        store.close()
    for call in itertools.count(1):
        work = folder / str(call)
        if not opens:
            shutil.copytree(folder / "base", work)

        def write(work=work, call=call) -> None:
            if opens:
                libc.fault_arm(KILL, call, 0)
            store = Store(work, cap)
            libc.fault_arm(KILL, call, 0)
            store.write(perhaps)
            libc.fault_arm(0, 0, 0)

        if not was_killed(fork(write)):
            return call - 1
        assert_whole(work, [] if opens else kept, perhaps, cap)
        shutil.rmtree(work)
    raise AssertionError("never")


def failing(folder: Path, number: int) -> int:
    """From some call that changes a file on, all fail: nothing is raised, one warning of each kind, nothing is left."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("paged_jax.store")
    logger.handlers[:] = [handler]
    pages = [*prefix(3), *prefix(4, num_bytes=SMALL)]
    for call in itertools.count(1):
        store = Store(folder / str(call))
        store.write(prefix(1))
        libc.fault_arm(FAIL, call, number)
        for _ in range(3):
            store.write(pages)
        num_calls = libc.fault_calls()
        libc.fault_arm(0, 0, 0)
        if num_calls < call:
            assert not warnings
            return call - 1
        assert len(warnings) == 1 and "cannot be written" in warnings[0], warnings
        warnings.clear()
        assert check(store, prefix(1)) == 3
        store.write(pages)
        assert check(store, pages) == len(pages), "it is used again when it can be"
        store.close()
        assert_whole(folder / str(call), prefix(1), pages, None)
        assert not warnings
    raise AssertionError("never")


def at_random(folder: Path, count: int) -> int:
    """Kill a process that writes all the time; what it said it had written is there."""
    chosen = random.Random(0)
    for kill in range(count):
        reading, writing = os.pipe()

        def write(kill=kill, writing=writing) -> None:
            store = Store(folder)
            for number in itertools.count(100 * kill):
                store.write(small_or_large(number))
                os.write(writing, number.to_bytes(4, "big"))

        child = fork(write)
        os.close(writing)
        time.sleep(chosen.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert was_killed(child)
        with os.fdopen(reading, "rb") as acknowledged:
            said = acknowledged.read()
        numbers = [int.from_bytes(said[i : i + 4], "big") for i in range(0, len(said), 4)]
        store = Store(folder)
        for number in numbers:
            assert check(store, small_or_large(number)) == 3
        assert store.verify()[1] == 0
        store.prune(0)
        store.close()
    return count


def small_or_large(number: int) -> list:
    return prefix(number, num_bytes=SMALL if number % 2 else LARGE)


def together(folder: Path, seconds: int) -> int:
    """Two processes write, read and prune the same prefixes; now and then one is killed, and another begins."""
    chosen, end, kills = random.Random(0), time.monotonic() + seconds, 0

    def use(seed: int) -> None:
        mine, store = random.Random(seed), Store(folder, CAP)
        while time.monotonic() < end:
            pages = prefix(mine.randrange(6), salt=mine.choice(("", "other")))
            check(store, pages)
            store.write(pages)
            store.touch(pages)
        store.close()

    children = [fork(lambda seed=seed: use(seed)) for seed in range(2)]
    while time.monotonic() < end - 0.2:
        time.sleep(chosen.uniform(0.02, 0.2))
        which = chosen.randrange(2)
        os.kill(children[which], signal.SIGKILL)
        was_killed(children[which])
        kills += 1
        children[which] = fork(lambda seed=kills + 2: use(seed))
    assert not any(map(was_killed, children))
    store = Store(folder, CAP)
    assert store.verify()[1] == 0 and bytes_on_disk(store) <= CAP
    return kills


def main() -> None:
    parent, count = Path(sys.argv[1]), int(sys.argv[2])
    logging.getLogger("paged_jax.store").addHandler(NoWarnings())
    kinds: dict[str, Callable[[Path], int]] = {
        "write": lambda folder: at_every_call(folder, opens=False, cap=None),
        "prune": lambda folder: at_every_call(folder, opens=False, cap=CAP // 2),
        "open": lambda folder: at_every_call(folder, opens=True, cap=None),
        "failing": lambda folder: failing(folder, count),
        "random": lambda folder: at_random(folder, count),
        "together": lambda folder: together(folder, count),
    }
    for kind in sys.argv[3:]:
        print(kinds[kind](parent / kind))


if __name__ == "__main__":
    main()
