"""Scripts that need `transformers`, run in the interpreter that has it."""

import os
import subprocess
import sys

import pytest


def run_live(script: str, *arguments: str) -> str:
    """Runs a script with PARITY_PYTHON, or with this interpreter if it has torch and transformers; its output.

    Skips the test where neither is there. What PARITY_PYTHON names must have them.
    """
    python = os.environ.get("PARITY_PYTHON")
    if python is None:
        probe = subprocess.run([sys.executable, "-c", "import torch, transformers"], capture_output=True)
        if probe.returncode:
            pytest.skip("PARITY_PYTHON is not set, and there is no torch here (extra `parity`)")
    command = [python or sys.executable, script, *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # with more, tiny matrices cost three times the CPU time
    run = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert run.returncode == 0, run.stderr
    return run.stdout
