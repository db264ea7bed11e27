"""Reads what the compiler says of kernels for an H200."""

import pathlib
import re
from typing import NamedTuple

SHARED_MEMORY, RESERVED, REGISTERS = 233472, 1024, 65536  # of a multiprocessor; reserved: by every block
LOAD = r"cp\.async\.bulk\.tensor\.\dd\.shared"  # of the copy engine


class KernelReport(NamedTuple):
    """What was compiled of one kernel.

    Args:
        registers: of a thread.
        spilled_bytes: stores and loads of registers that did not fit, and the stack frame.
        threads: of a block.
        shared_memory: of a block, in bytes.
        log: of the assembler.
        ptx: lines of the program.
    """

    registers: int
    spilled_bytes: int
    threads: int
    shared_memory: int
    log: str
    ptx: list[str]

    @property
    def blocks_per_multiprocessor(self) -> int:
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(REGISTERS // registers, SHARED_MEMORY // (self.shared_memory + RESERVED))

    def products(self) -> list[tuple[int, bool]]:
        """Of every run of tensor core instructions that is committed as one: how many, whether from registers."""
        runs, instructions, num_waited = [], [], 0
        for line in self.ptx:
            if "wgmma.mma_async" in line:
                instructions.append(bool(re.search(r"\}, *\{", line)))
            elif "wgmma.commit_group" in line:
                (from_registers,) = set(instructions)
                runs.append((len(instructions), from_registers))
                instructions = []
            elif "wgmma.wait_group" in line:
                assert not instructions and line.endswith(" 0;")
                num_waited = len(runs)
        assert num_waited == len(runs)
        return runs

    def jumps(self) -> list[list[int]]:
        """For every line of the program, those that may come next."""
        labels = {line[:-1]: i for i, line in enumerate(self.ptx) if re.fullmatch(r"[$\w]+:", line)}

        def targets(line: str) -> list[int]:
            if table := re.match(r"brx\.idx .*, (\w+);", line):
                entries = "".join(self.ptx[labels[table[1]] + 2 :]).partition(";")[0]
                return [labels[x] for x in entries.split(",")]
            return [labels[x] for x in re.findall(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)]

        ends = r"bra(\.uni)?\s+\$L|brx\.idx|ret;|exit;"
        return [
            targets(line) + ([] if re.match(ends, line) or i + 1 == len(self.ptx) else [i + 1])
            for i, line in enumerate(self.ptx)
        ]

    def copy_loops(self) -> list[list[str]]:
        """The lines of the loops that load with the copy engine, but for those around others of them."""
        jumps = self.jumps()
        origins: list[list[int]] = [[] for _ in jumps]
        for i, targets in enumerate(jumps):
            for target in targets:
                origins[target].append(i)
        loops = []
        for start in (i for i, before in enumerate(origins) if len(before) > 1):
            outside = reachable(jumps, 0, start)
            if ends := [i for i in origins[start] if i not in outside]:
                loops.append(set().union(*(reachable(origins, end, start) for end in ends)))
        copying = [loop for loop in loops if count(self.lines(loop), LOAD)]
        return [self.lines(loop) for loop in copying if not any(other < loop for other in copying)]

    def lines(self, numbers: set[int]) -> list[str]:
        return [self.ptx[i] for i in sorted(numbers)]


def reachable(jumps: list[list[int]], start: int, end: int) -> set[int]:
    """The lines to which jumps lead from one, that one and the end included, but not by way of the end."""
    found, left = {end}, [start]
    while left:
        i = left.pop()
        if i not in found:
            found.add(i)
            left += jumps[i]
    return found


def count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def read_reports(folder: pathlib.Path) -> dict[str, KernelReport]:
    """The report of each kernel dumped into a folder, by the kernel's name."""
    reports = {}
    for log_file in sorted(folder.glob("*.ptxas")):
        stem = log_file.name.removesuffix(".ptxas")
        log = log_file.read_text()
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        registers = re.search(r"Used (\d+) registers", log)
        name = re.sub(r"_\d+$", "", stem)
        assert name not in reports, f"two kernels of one name: {name}"
        (program_file,) = folder.glob(f"{name}_[0-9]*.before_layout_inference.txt")  # numbered otherwise
        program = program_file.read_text()
        launch = re.search(r"threads\(.*?\) in \(%\w+ = %c(\d+).*dynamic_shared_memory_size %c(\d+)", program)
        assert spills and registers and launch, f"{log_file} reads otherwise than expected:\n{log}"
        reports[name] = KernelReport(
            registers=int(registers[1]),
            spilled_bytes=sum(map(int, spills.groups())),
            threads=int(launch[1]),
            shared_memory=int(launch[2]),
            log=log,
            ptx=[line.strip() for line in (folder / f"{stem}.ptx").read_text().splitlines()],
        )
    return reports
