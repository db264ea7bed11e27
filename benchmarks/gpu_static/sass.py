"""Reads a compiled kernel's machine code and follows one warp through its loops.

The assembler writes its schedule into every instruction: how many cycles to wait before the next one, and which of six
counters to wait for or to raise. What the program does not say, how long the memory, the special functions and the
tensor cores take, stands in `LATENCY`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Cycles until a result is there, for instructions that raise a counter: those of shared memory as measured by Luo et
# al. 2024 (arXiv 2402.13499), the others guessed from it. Of a barrier: until all four warps have come.
LATENCY = {
    "LDS": 30, "LDSM": 33, "STS": 20, "STSM": 25, "SHFL": 25, "MUFU": 24, "I2F": 24, "S2R": 25, "S2UR": 25,
    "R2UR": 12, "LDC": 30, "BAR": 28, "SYNCS": 22, "MEMBAR": 22, "FENCE": 15,
}  # fmt: skip
TENSOR_LATENCY = 40  # from the last product until its sums are there
TENSOR_ROWS_CYCLES = 16  # of a product, at least: 64 rows of 32 bytes at 128 bytes a cycle
HALF_RATE = {
    "SEL", "FSEL", "LOP3", "PRMT", "FMNMX", "ISETP", "FSETP", "IADD3", "VIADD", "SHF", "LEA", "PLOP3", "F2FP", "MOV",
    "I2F",
}  # fmt: skip
WORK = re.compile(r"GMMA|UTMALDG\.[45]D|STS\.128")  # products, copies of pages, widened numbers: what a tile is about
CARE = "LDSM"  # loads a tile back: only where tokens at its end are missing and have to be cleared
ROUNDS = 4  # of a loop, until it repeats itself


class Instruction(NamedTuple):
    """One instruction.

    Args:
        text: of it, with its operands.
        name: of its kind.
        waits: for these counters.
        raises: these counters.
        stall: cycles until the next may issue.
    """

    text: str
    name: str
    waits: tuple[int, ...]
    raises: tuple[int, ...]
    stall: int

    @property
    def product(self) -> int | None:
        """The columns of a tensor core product."""
        match = re.search(r"GMMA\.64x(\d+)x", self.text)
        return int(match[1]) if match else None


class Loop(NamedTuple):
    """What one warp does in a round of a loop.

    Args:
        instructions: of its shortest way through a round that does all of its `WORK`.
    """

    instructions: list[Instruction]

    @property
    def products(self) -> int:
        """Cycles of the tensor cores."""
        return sum(product_cycles(x.product) for x in self.instructions if x.product)

    @property
    def cycles(self) -> int:
        """Of a round, for a warp that shares its multiprocessor with nobody and never waits for a copy."""
        time, tensor_free = 0, 0
        ready, ends = [0] * 6, [0]
        for _ in range(ROUNDS):
            for x in self.instructions:
                time = max([time, *(ready[counter] for counter in x.waits)])
                if x.product:
                    tensor_free = max(time, tensor_free) + product_cycles(x.product)
                elif x.text.startswith("WARPGROUP.DEPBAR"):
                    time = max(time, tensor_free + TENSOR_LATENCY)
                for counter in x.raises:
                    ready[counter] = max(ready[counter], time + LATENCY.get(x.name, 0))
                time += max(x.stall, LATENCY["BAR"] if x.name == "BAR" else 1)
            ends.append(time)
        return ends[-1] - ends[-2]


def scheduler_cycles(loops: list[Loop]) -> int:
    """Of a scheduler that runs a warp of each: an instruction a cycle, one of half a warp's width every second."""
    instructions = [x for loop in loops for x in loop.instructions]
    return max(len(instructions), 2 * sum(x.name in HALF_RATE for x in instructions))


def product_cycles(columns: int) -> int:
    """Of 64 rows of 32 bytes times so many columns; Hopper multiplies 2048 pairs of bfloat16 a cycle."""
    return max(columns // 2, TENSOR_ROWS_CYCLES)


def parse(dump: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a kernel, and where its labels stand."""
    code, labels = [], {}
    for line in dump.splitlines():
        if label := re.match(r"\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif match := re.match(r"\s*(\S+):(\S):(\S):\S:(\d\d)\s+/\*[0-9a-f]+\*/\s+(.*\S)", line):
            waits, *raises, stall, text = match.groups()
            name = re.sub(r"^@!?U?P\w+\s+(U?P\d, )?", "", text).split()[0].split(".")[0]
            counters = tuple(int(x) for x in raises if x != "-")
            code.append(Instruction(text, name, read_mask(waits), counters, int(stall)))
    return code, labels


def read_mask(text: str) -> tuple[int, ...]:
    if text == "-":
        return ()
    if text.startswith("0x"):
        return tuple(i for i in range(6) if int(text, 16) >> i & 1)
    return tuple(int(x) for x in text.split("&"))


def find_loop(dump: str, work: str) -> Loop:
    """The innermost loop with instructions of a kind (a regular expression), such as the loop over tiles."""
    code, labels = parse(dump)
    targets = {
        i: labels[match[1]] for i, x in enumerate(code) if (match := re.search(r"BRA.*`\(\.(L_x_\d+)\)", x.text))
    }

    def amount(start: int, end: int) -> int:
        return sum(bool(re.search(work, x.text)) for x in code[start : end + 1])

    # A jump back without a condition returns from a wait that was moved out of the way.
    loops = [(start, i) for i, start in targets.items() if start <= i and code[i].text.startswith("@")]
    loops = [(start, end) for start, end in loops if amount(start, end)]
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(innermost, key=lambda loop: amount(*loop))
    return Loop(shortest_way(code, targets, start, end))


def shortest_way(code: list[Instruction], targets: dict[int, int], start: int, end: int) -> list[Instruction]:
    """Through a loop's body, by all of its work and no special care: what a whole tile costs.

    Where warps part by a jump table, each to its share of the copies, the way is that of the arm behind it.
    """
    best: dict[int, tuple[tuple[int, int, int], int | None]] = {end: ((0, 0, 0), None)}  # how good; the next one
    for i in range(end - 1, start - 1, -1):
        target = targets.get(i)
        nexts = [i + 1] if target is None or code[i].text.startswith("@") else []
        if target is not None and i < target <= end:
            nexts.append(target)
        ways = [(best[n][0], n) for n in nexts if n in best]
        if ways:
            (care, work, length), follower = max(ways)
            worth = care - (code[i].name == CARE), work + bool(WORK.search(code[i].text)), length - 1
            best[i] = worth, follower
    way, i = [], start
    while i is not None:
        way.append(code[i])
        i = best[i][1]
    return way
