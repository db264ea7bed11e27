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


def drive(faults: Path, kind: str, folder: Path, count: int = 0) -> int:
    """How many times a process was killed."""
    root = str(HERE.parent.parent)
    environment = os.environ | {"LD_PRELOAD": str(faults), "PYTHONPATH": f"{root}:{HERE}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", HERE / "crash_driver.py", kind, folder, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@compiler
@pytest.mark.parametrize("kind, at_least", [("write", 25), ("prune", 25), ("open", 30)])
def test_a_kill_at_any_call_that_changes_a_file(tmp_path, faults, kind, at_least):
    num_kills = drive(faults, kind, tmp_path)
    print(f"{kind}: {num_kills} kills")
    assert num_kills >= at_least


@compiler
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_call(tmp_path, faults, number):
    assert drive(faults, "failing", tmp_path, number) >= 20


@compiler
@pytest.mark.parametrize(
    "count",
    [25, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],  # the number of the guarantee
)
def test_kills_at_random_moments(tmp_path, faults, count):
    assert drive(faults, "random", tmp_path, count) == count


@compiler
@pytest.mark.parametrize(
    "seconds",
    [2, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(1800)])],  # the minutes of the guarantee
)
def test_processes_that_share_a_store_and_are_killed_now_and_then(tmp_path, faults, seconds):
    num_kills = drive(faults, "together", tmp_path, seconds)
    print(f"{num_kills} kills in {seconds} seconds")
    assert num_kills > seconds
