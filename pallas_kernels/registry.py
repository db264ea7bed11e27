"""Which implementation runs an op: one `Backend` in `BACKENDS` for each. README.md shows how to add one."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from pallas_kernels.platform import target_platform


class Backend(NamedTuple):
    """Where an implementation lives and which platforms try it unasked.

    The module defines those of `paged_attention`, `write_pages` and `copy_pages` that it implements, with
    the signatures of reference.py, and `refusal(op, **arguments) -> str | None`: one sentence on why it
    cannot run `op` (a name) on these arguments (those of the op, by name), or None if it can.
    """

    module: str
    platforms: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)  # only when used: a CPU need not import Pallas


# In order of preference: `choose` takes the first that lists the platform and does not refuse.
BACKENDS: dict[str, Backend] = {
    "pallas_gpu": Backend("pallas_kernels.gpu"),  # by name only until it has run on a GPU
    "pallas_tpu": Backend("pallas_kernels.tpu", ("tpu",)),
    "xla": Backend("pallas_kernels.xla", ("cpu", "tpu", "gpu")),
    "reference": Backend("pallas_kernels.reference"),
}


def choose(op: str, implementation: str | None, arguments: dict[str, Any]) -> Any:
    """The function that runs `op` on these arguments.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: the one asked for refuses the arguments.
    """
    if implementation is None:
        platform = target_platform()
        for backend in BACKENDS.values():
            if platform in backend.platforms and _refusal(backend.load(), op, arguments) is None:
                return getattr(backend.load(), op)
        raise NotImplementedError(f'no implementation of {op} on {platform}: pass implementation="xla"')
    if implementation not in BACKENDS:
        raise ValueError(f"implementation must be None or one of {', '.join(BACKENDS)}, got {implementation!r}")
    module = BACKENDS[implementation].load()
    if reason := _refusal(module, op, arguments):
        raise NotImplementedError(f"{implementation} {op}: {reason}")
    return getattr(module, op)


def _refusal(module: ModuleType, op: str, arguments: dict[str, Any]) -> str | None:
    if not hasattr(module, op):
        return "it does not have this op."
    return module.refusal(op, **arguments)
