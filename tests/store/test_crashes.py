"""Processes that are killed while they write: the store opens, nothing wrong is read, and what was synced is there.

The long forms: 1,000 kills at random moments, and ten minutes of two processes.

    pytest -n 0 -m long tests/store/test_crashes.py -s
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler for what injects the faults")


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    """The library that injects faults."""
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, HERE / "faults.c", "-ldl"], check=True)
    return path


def drive(faults: Path, folder: Path, *kinds: str, count: int = 0) -> list[int]:
    """How many times a process was killed, by kind."""
    root = str(HERE.parent.parent)
    environment = os.environ | {"LD_PRELOAD": str(faults), "PYTHONPATH": f"{root}:{HERE}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", HERE / "crash_driver.py", folder, str(count), *kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


@compiler
def test_a_kill_at_any_call_that_changes_a_file(tmp_path, faults):
    writing, pruning, opening = drive(faults, tmp_path, "write", "prune", "open")
    print(f"kills: {writing} writing, {pruning} pruning, {opening} opening")
    assert writing >= 25 and pruning >= 25 and opening >= 30


@compiler
@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EACCES, marks=pytest.mark.long)])
def test_a_disk_that_fails_at_any_call(tmp_path, faults, number):
    (num_calls,) = drive(faults, tmp_path, "failing", count=number)
    assert num_calls >= 20


@compiler
@pytest.mark.parametrize(
    "count",
    [25, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],  # the number of the guarantee
)
def test_kills_at_random_moments(tmp_path, faults, count):
    assert drive(faults, tmp_path, "random", count=count) == [count]


@compiler
@pytest.mark.parametrize(
    "seconds",
    [1, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],  # the minutes of the guarantee
)
def test_processes_that_share_a_store_and_are_killed_now_and_then(tmp_path, faults, seconds):
    (num_kills,) = drive(faults, tmp_path, "together", count=seconds)
    print(f"{num_kills} kills in {seconds} seconds")
    assert num_kills > seconds
