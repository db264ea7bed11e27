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
    import jax

    from benchmarks.tpu_static.cases import all_cases, arguments, step
    from benchmarks.tpu_static.simulate import CHIPS
    from benchmarks.tpu_static.target import compile_for

    case = all_cases()[sys.argv[1]]
    jitted = jax.jit(step, donate_argnums=3, static_argnames="max_query_len")
    compiled = compile_for(CHIPS[sys.argv[2]].topology, jitted, *arguments(case), max_query_len=case.max_query_len)
    memory = compiled.memory_analysis()
    print(json.dumps({"temp_bytes": memory.temp_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes}))


if __name__ == "__main__":
    main()
