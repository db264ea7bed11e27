"""Reads a scheduled HLO module as libtpu dumps it: what runs how often, and which lines of source it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?)\s([a-z][a-z-]*)\((.*)$")
_NOTES = re.compile(r", (?:metadata|backend_config|frontend_attributes|sharding)=.*")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}")
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
_TEXT = re.compile(r'^(\d+) "(.*)"$')
_NAME = re.compile(r"%([^\s,(){}]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Args:
    name: also that of its program in the dump, where it has one.
    operands: names.
    calls: the computations that it runs: branches in their order, or condition and body of a loop.
    op: the path of JAX's operations, such as "jit(step)/while/body/dot_general".
    source: "file:line function" of the calls that led to it, the innermost first.
    """

    name: str
    opcode: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    op: str
    source: tuple[str, ...]
    text: str
    content: str  # equal for instructions that do the same to operands of the same shapes and layouts


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, list[Instruction]]  # the last one of each is its root
    entry: str

    def executed(self, branch: Callable[[Instruction], int]) -> Iterator[tuple[Instruction, int]]:
        """What runs, in order, and how often.

        A loop that counts to a constant runs that often, any other once.

        Args:
            branch: which branch a conditional takes.
        """
        return self._executed(self.entry, 1, branch)

    def _executed(self, name: str, times: int, branch: Callable[[Instruction], int]):
        for instruction in self.computations[name]:
            if instruction.opcode == "while":
                condition, body = instruction.calls
                yield from self._executed(body, times * self._trips(condition), branch)
            elif instruction.opcode == "conditional":
                yield instruction, times
                yield from self._executed(instruction.calls[branch(instruction)], times, branch)
            else:
                yield instruction, times

    def _trips(self, condition: str) -> int:
        *_, root = instructions = self.computations[condition]
        constants = {x.name: x.text for x in instructions if x.opcode == "constant"}
        if root.opcode != "compare" or "direction=LT" not in root.text or root.operands[1] not in constants:
            return 1
        return int(constants[root.operands[1]].partition("constant(")[2].partition(")")[0])


def parse_module(text: str) -> Module:
    """Args:
    text: a dump `*-TLP-hlo.txt`.

    Raises:
        ValueError: it has no entry computation.
    """
    lines = text.splitlines()
    frames = _Frames(lines)
    computations: dict[str, list[Instruction]] = {}
    contents: dict[str, str] = {}
    entry, name, current = None, "", _Computation(frames, contents)
    for line in lines:
        if match := _COMPUTATION.match(line):
            current = _Computation(frames, contents)
            computations[match[2]] = current.instructions
            entry = match[2] if match[1] else entry
            name = match[2]
        elif match := _INSTRUCTION.match(line):
            current.add(*match.groups())
        elif line == "}":
            contents[name] = current.content
    if entry is None:
        raise ValueError("no ENTRY computation: another libtpu may write its dumps differently")
    return Module(computations, entry)


class _Computation:
    """The instructions of a computation, as they are read."""

    def __init__(self, frames: _Frames, contents: dict[str, str]):
        self.frames, self.contents = frames, contents
        self.instructions: list[Instruction] = []
        self.types: dict[str, str] = {}
        self.numbers: dict[str, str] = {}
        self.lines: list[str] = []

    def add(self, name: str, kind: str, opcode: str, rest: str) -> None:
        operands, _, attributes = rest.partition(")")
        calls: list[str] = []
        if opcode == "conditional":
            calls = re.findall(r"%([^\s,}]+)", attributes.partition("branch_computations={")[2].partition("}")[0])
        elif opcode == "while":
            calls = re.findall(r"(?:condition|body)=%([^\s,]+)", attributes)
        op = re.search(r'op_name="([^"]*)"', attributes)
        frame = re.search(r"stack_frame_id=(\d+)", attributes)
        text = f"{kind} {opcode}({_NOTES.sub('', rest)}"
        self.instructions.append(
            Instruction(
                name=name,
                opcode=opcode,
                operands=tuple(_NAME.findall(operands)),
                calls=tuple(calls),
                op=op[1] if op else "",
                source=self.frames.calls(int(frame[1])) if frame else (),
                text=text,
                content=_NAME.sub(lambda match: self.contents.get(match[1]) or self.types.get(match[1], ""), text),
            )
        )
        self.lines.append(_NAME.sub(lambda match: self.contents.get(match[1]) or self.numbers.get(match[1], ""), text))
        self.types[name], self.numbers[name] = kind, f"%{len(self.numbers)}"

    @property
    def content(self) -> str:
        """Equal for computations that are the same but for names; short."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


class _Frames:
    """The tables at the head of a module, from which each instruction refers to the calls that led to it."""

    def __init__(self, lines: list[str]):
        tables: dict[str, list[str]] = {}
        for line in lines:
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                tables[line] = table = []
            elif line.startswith(("%", "ENTRY")):
                break
            elif tables:
                table.append(line)

        def rows(name: str, pattern: re.Pattern[str]):
            found = (pattern.match(line) for line in tables.get(name, []))
            return {int(match[1]): match.groups()[1:] for match in found if match}

        files, functions = rows("FileNames", _TEXT), rows("FunctionNames", _TEXT)
        self.locations = {
            key: f"{files[int(file)][0]}:{line} {functions[int(function)][0]}"
            for key, (file, function, line) in rows("FileLocations", _LOCATION).items()
        }
        # A parent is written as its number plus one, and none as the first frame itself.
        self.frames = {
            key: (int(place), int(parent) - 1) for key, (place, parent) in rows("StackFrames", _FRAME).items()
        }

    def calls(self, frame: int) -> tuple[str, ...]:
        result = []
        while frame in self.frames:
            place, frame = self.frames[frame]
            result.append(self.locations[place])
        return tuple(result)
