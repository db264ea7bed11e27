"""Runs the scalar half of a scheduled program: which bundles issue, what is copied, and when it could arrive."""

from __future__ import annotations

import collections
import dataclasses

from benchmarks.tpu_static.program import POINTER_BITS, Program

GRANULE = 32  # bytes, the unit of a copy's size and address
LATENCY_NS = 700.0  # from a copy's start to its first byte
MAX_CYCLES = 30_000_000


@dataclasses.dataclass(frozen=True)
class Chip:
    """Args:
    topology: libtpu's name of a small slice.
    device_kind: JAX's name of the chip.
    clock_ghz, hbm_gbs: of one TensorCore.
    branch_delay: bundles issued behind a branch before it takes effect.
    """

    topology: str
    device_kind: str
    clock_ghz: float
    hbm_gbs: float
    branch_delay: int


CHIPS = {
    "v5e": Chip("v5e:2x2", "TPU v5 lite", 1.5, 819, 4),
    "v5p": Chip("v5p:2x2x1", "TPU v5", 1.75, 1383, 4),  # of half a chip's two cores
    "v6e": Chip("v6e:2x2", "TPU v6 lite", 1.75, 1640, 4),
    "v7x": Chip("tpu7x:2x2x1", "TPU7x", 2.2, 3690, 6),
}


class Copies:
    """The copy engine: bytes, descriptors, and a model of time (bandwidth and latency, in order)."""

    def __init__(self, chip: Chip, operands: dict[int, list[int]]):
        self.operands = operands
        self.bytes_per_cycle = chip.hbm_gbs / chip.clock_ghz
        self.latency = LATENCY_NS * chip.clock_ghz
        self.bytes: collections.Counter[str] = collections.Counter()
        self.started: collections.Counter[str] = collections.Counter()
        self.arrivals: dict[int, collections.deque] = collections.defaultdict(collections.deque)
        self.now = 0.0  # cycles, with the time spent waiting
        self.free = 0.0
        self.underflows = 0

    def start(self, kind: str, source: int, size: int, target: int, semaphore: int, memory: dict) -> None:
        self.bytes[kind] += size * GRANULE
        self.started[kind] += 1
        if kind.endswith("to_smem"):
            index, offset = divmod(source, 1 << POINTER_BITS)
            words = self.operands.get(index - 1, [])
            for i, word in enumerate(words[offset * 8 : (offset + size) * 8]):
                memory[target + i] = word
        if "hbm" in kind:
            self.free = max(self.now, self.free) + size * GRANULE / self.bytes_per_cycle
            arrival = self.free + self.latency
        else:
            arrival = self.now
        self.arrivals[semaphore].append([arrival, size])

    def wait(self, semaphore: int, size: int) -> None:
        queue = self.arrivals[semaphore]
        while size > 0 and queue:
            arrival, left = queue[0]
            self.now = max(self.now, arrival)
            taken = min(size, left)
            size -= taken
            queue[0][1] -= taken
            if queue[0][1] == 0:
                queue.popleft()
        self.underflows += size > 0


@dataclasses.dataclass(frozen=True)
class Result:
    cycles: int
    empty_cycles: int
    model_cycles: float
    read_bytes: int
    write_bytes: int
    descriptors: int
    underflows: int
    executions: list[int]  # of each bundle


def run(program: Program, chip: Chip, operands: dict[int, list[int]]) -> Result:
    """Args:
    operands: of the kernel, by index, the words that its scalar half reads: lengths, page tables.
    """
    copies = Copies(chip, operands)
    registers: dict = collections.defaultdict(int)
    memory: dict[int, int] = {}
    executions = [0] * len(program.steps)
    place, cycles, target, delay = 0, 0, None, 0
    steps, end = program.steps, len(program.steps)
    while place < end:
        executions[place] += 1
        cycles += 1
        copies.now += 1
        goal = steps[place](registers, memory, copies)
        place += 1
        if target is not None:
            delay -= 1
            if delay == 0:
                place, target = target, None
        if goal is not None:
            target, delay = goal, chip.branch_delay
        if cycles > MAX_CYCLES:
            raise RuntimeError(f"the program did not end within {MAX_CYCLES} cycles")
    return Result(
        cycles=cycles,
        empty_cycles=sum(n for n, empty in zip(executions, program.is_empty, strict=True) if empty),
        model_cycles=copies.now,
        read_bytes=sum(n for kind, n in copies.bytes.items() if kind.startswith("hbm_to")),
        write_bytes=sum(n for kind, n in copies.bytes.items() if kind.endswith("to_hbm")),
        descriptors=sum(copies.started.values()),
        underflows=copies.underflows,
        executions=executions,
    )
