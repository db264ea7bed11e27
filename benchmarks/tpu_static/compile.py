"""Child process: compiles one case for one chip; the environment says where libtpu dumps the program."""

from __future__ import annotations

import json
import os
import sys


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
    from benchmarks.tpu_static.simulate import CHIPS
    from benchmarks.tpu_static.target import compile_for

    case = (kernel_cases() | model_cases())[sys.argv[1]]
    compiled = compile_for(CHIPS[sys.argv[2]].topology, step, *arguments(case), case=case)
    memory = compiled.memory_analysis()
    print(json.dumps({"temp_bytes": memory.temp_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes}))


if __name__ == "__main__":
    main()
