"""Compiles one case for one chip in a child process, whose environment says where libtpu dumps the program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

DUMPS = "packed-bundles-post-ra|utilization"  # what is read; all passes would be 1 GB a case
WHOLE_STEP = "whole step"


def compile_in_child(case: str, chip: str, dump: Path, *options: str) -> dict:
    """Compile one case, and leave what libtpu dumps of it in a folder.

    Args:
        case: its name, or WHOLE_STEP.
        chip: a name in CHIPS.
        dump: an empty folder.
        options: the name of a peer, whose kernels are compiled; or layers and page size of WHOLE_STEP.

    Returns:
        Bytes of temporaries and of arguments that are updated in place; of a peer also what its kernels read; or an
        error.
    """
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*({DUMPS}).*"
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.tpu_static.compile", case, chip, *options],
        env=dict(os.environ, LIBTPU_INIT_ARGS=flags, JAX_TRACEBACK_FILTERING="off"),
        capture_output=True,
        text=True,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        raised = [line for line in lines if re.match(r"[\w.]+Error: ", line)]  # its text may have more lines
        return {"error": (raised or lines)[-1][:500]}
    return json.loads(child.stdout.splitlines()[-1])


def scheduled_programs(dump: Path, kernel: str = "") -> list[Path]:
    """The scheduled programs in a dump, those with this in their names."""
    return [path for path in dump.glob("*-packed-bundles-post-ra.txt") if kernel in path.name]


def main() -> None:
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        JAX_PLATFORMS="cpu",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    from benchmarks.tpu_static.cases import arguments, kernel_cases, step
    from benchmarks.tpu_static.models import model_cases
    from benchmarks.tpu_static.peers import PEERS
    from benchmarks.tpu_static.simulate import CHIPS
    from benchmarks.tpu_static.target import compile_for

    words = None
    name, chip, *options = sys.argv[1:]
    if name == WHOLE_STEP:
        from benchmarks.tpu_static.step import abstract_step

        jitted, operands = abstract_step(*map(int, options))
        compiled = compile_for(CHIPS[chip].topology, jitted, *operands)
    else:
        case = (kernel_cases() | model_cases())[name]
        if options:
            call = PEERS[options[0]](case, chip)
            compiled = compile_for(CHIPS[chip].topology, call.jitted, *call.arguments)
            words = call.words
        else:
            compiled = compile_for(CHIPS[chip].topology, step, *arguments(case), case=case)
    memory = compiled.memory_analysis()
    row = {"temp_bytes": memory.temp_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes, "words": words}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
