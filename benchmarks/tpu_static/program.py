"""Reads a scheduled TPU program as libtpu dumps it, and turns its scalar half into Python functions.

The dump (`*-packed-bundles-post-ra.txt`) has one VLIW bundle a line, empty ones included, so lines are cycles.
Vector instructions are dropped: nothing they compute decides which bundle comes next or what is copied.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

WORD = 0xFFFFFFFF
POINTER_BITS = 26  # an operand starts at (index + 1) << 26 granules of 32 bytes; VMEM counts in 512 bytes
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:L[HBE]|P[BF]|CT)?\s*:[\s>]*\{", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_GENERAL_COPY = re.compile(r"dma\.general([^;{}]*?)/\* (\w+)-to-(\w+) \*/")  # strided: a comment says where to
_REMAINDER = re.compile(r"%(\d+) = sdivrem\.u32([^;{}]*?)/\* kRem \*/")  # a comment says which result is popped later
_POP = re.compile(r"spop\.drf %(\d+)")
_PREDICATE = re.compile(r"\((!?)%p\w*?_(p\d+)(?:,\s*(%\w+|-?\d+))?\)\s*,?")
_REGISTER = re.compile(r"^(!?)%[sp]\w*?_([sp]\d+)$")
_NOTE = re.compile(r"\[(?:thread|resolvable|dereferenceable):[^\]]*\]")


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text, re.S)
    if match is None:
        raise ValueError(f"no {pattern!r} in {text!r}: another libtpu may write its dumps differently")
    return match


def signed(x: int) -> int:
    x &= WORD
    return x - (1 << 32) if x >> 31 else x


EXPRESSIONS = {
    "smov": "{0}", "pmov": "{0}", "int_to_ptr": "{0}", "ptr_to_int": "{0}", "pneg": "not {0}",
    "sadd": "signed({0} + {1})", "ssub": "signed({0} - {1})", "smul": "signed({0} * {1})",
    "smulhi": "signed(({0} & WORD) * ({1} & WORD) >> 32)", "srem": "signed(({0} & WORD) % ({1} & WORD))",
    "sshll": "signed({0} << ({1} & 31))", "sshra": "{0} >> ({1} & 31)", "sshrl": "signed(({0} & WORD) >> ({1} & 31))",
    "sand": "{0} & {1}", "sor": "{0} | {1}", "sxor": "{0} ^ {1}", "smin": "min({0}, {1})", "smax": "max({0}, {1})",
    "scalar_select": "({1} if {0} else {2})", "pnand": "not ({0} and {1})", "pand": "{0} and {1}",
    "por": "{0} or {1}", "pxor": "bool({0}) != bool({1})", "sclz": "32 - ({0} & WORD).bit_length()",
}  # fmt: skip
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
IGNORED = ("sphi", "sfence", "shalt", "vsync", "spop", "strace", "sdelay")


@dataclasses.dataclass(frozen=True)
class Program:
    """Args:
    steps: one function a bundle, `(registers, memory, copies) -> target bundle or None`.
    is_empty: bundles without an instruction.
    unknown: scalar instructions that the simulation leaves out, and how many there are.
    """

    steps: list[Callable[[dict, dict, Any], int | None]]
    is_empty: list[bool]
    unknown: dict[str, int]


def parse(text: str) -> Program:
    """Args:
    text: a dump `*-packed-bundles-post-ra.txt`.
    """
    body = text.split("= control target key end", 1)[-1]
    body = _GENERAL_COPY.sub(r"dma.\2_to_\3\1", body)
    body = _POP.sub(r"smov %s_s9\1", _REMAINDER.sub(r"%s_s9\1 = srem\2", body))  # registers that no program has
    translator = _Translator()
    steps, is_empty = [], []
    for piece in _BUNDLE.split(body)[1:]:
        instructions = [x.strip() for x in _COMMENT.sub("", piece).rsplit("}", 1)[0].split(";;")]
        instructions = [x for x in instructions if x.startswith("%")]
        is_empty.append(not instructions)
        steps.append(translator.function(instructions))
    return Program(steps, is_empty, translator.unknown)


class _Translator:
    """Bundles to Python functions; allocations get distinct addresses in order of appearance."""

    def __init__(self) -> None:
        self.allocations: dict[str, int] = {}
        self.unknown: dict[str, int] = {}
        self.names = {"signed": signed, "WORD": WORD}
        self.empty = self._compile(["return None"])

    def _compile(self, lines: list[str]):
        source = "def step(r, memory, copies):\n    " + "\n    ".join(lines)
        scope: dict[str, Any] = {}
        exec(source, self.names, scope)
        return scope["step"]

    def function(self, instructions: list[str]):
        reads, writes = [], []  # a bundle reads all its registers before it writes any
        branch = "return None"
        for i, text in enumerate(instructions):
            target, operation, rest = _found(r"%(\S+)\s*=\s*(\S+)\s*(.*)", text).groups()
            if operation.startswith("v") and not operation.startswith("vsync"):
                continue
            name = operation.split(".")[0]
            if name.startswith(IGNORED):
                continue
            condition, otherwise = "True", None
            if match := _PREDICATE.search(rest):
                negated, register, other = match.groups()
                condition = f"{'not ' if negated else ''}r[{register!r}]"
                otherwise = other
                rest = rest[: match.start()] + " " + rest[match.end() :]
            if operation == "sbr.rel":
                goal = int(_found(r"bundleno = (\d+)", rest)[1])
                reads.append(f"c{i} = {condition}")
                branch = f"return {goal} if c{i} else None"
                continue
            if name == "inlined_call_operand":
                index = int(_found(r"index: (-?\d+)", rest)[1])  # -1: constants of XLA's own
                if operation.endswith(".<no"):  # of `<no memory space>`: it is one word, not an address
                    writes.append(f"r[{self._own(target)!r}] = copies.operands[{index}][0]")
                    continue
                unit = POINTER_BITS if operation.endswith("hbm") else POINTER_BITS - 4
                writes.append(f"r[{self._own(target)!r}] = {(index + 1) << unit}")
                continue
            arguments = self._arguments(rest, operation)
            if arguments is None:
                continue
            effect = self._effect(operation, name, target, arguments)
            if effect is None:
                self.unknown[operation] = self.unknown.get(operation, 0) + 1
                continue
            value, write = effect
            if not write:  # an alias of what this very bundle produces
                continue
            if otherwise is not None:
                value, condition = f"({value} if {condition} else {self._operand(otherwise)})", "True"
            if condition == "True":
                reads.append(f"t{i} = {value}")
                writes.append(write.format(f"t{i}"))
            else:
                reads.append(f"c{i} = {condition}\n    t{i} = {value} if c{i} else None")
                writes.append(f"if c{i}: {write.format(f't{i}')}")
        if not reads and not writes:
            return self.empty
        return self._compile(reads + writes + [branch])

    def _effect(self, operation: str, name: str, target: str, arguments: list[str]) -> tuple[str, str] | None:
        """What the instruction computes and the statement that stores it."""
        if name == "sld":
            return f"memory.get({arguments[0]}, 0)", f"r[{self._own(target)!r}] = {{}}"
        if name == "sst":
            return f"({arguments[0]}, {arguments[1]})", "memory[{0}[0]] = {0}[1]"
        if operation.startswith("dma.done.wait"):
            return f"({arguments[0]}, {arguments[1]})", "copies.wait(*{})"
        if name == "dma":
            kind = operation.split(".", 1)[1]
            return f"({', '.join(arguments[:4])})", f"copies.start({kind!r}, *{{}}, memory)"
        own = self._own(target)
        if own is None:
            return None
        store = f"r[{own!r}] = {{}}"
        if name in ("int_to_ptr", "ptr_to_int") and arguments[0] == f"r[{own!r}]":
            return "", ""
        if name == "scalar_lea":
            return " + ".join(arguments), store
        if name == "scmp":
            _, comparison, kind = operation.split(".")[:3]
            left, right = (f"({x} & WORD)" if kind.startswith("u") else x for x in arguments)
            return f"{left} {COMPARISONS[comparison]} {right}", store
        if name in ("smin", "smax") and operation.endswith("u32"):
            arguments = [f"({x} & WORD)" for x in arguments]
        if name not in EXPRESSIONS:
            return None
        return EXPRESSIONS[name].format(*arguments), store

    def _own(self, target: str) -> str | None:
        match = _REGISTER.match("%" + target)
        return match[2] if match else None

    def _arguments(self, rest: str, operation: str) -> list[str] | None:
        rest = _NOTE.sub("", rest)
        parts, depth, part = [], 0, ""
        for letter in rest + ",":
            depth += letter == "["
            depth -= letter == "]"
            if letter == "," and depth == 0:
                parts.append(part.strip())
                part = ""
            else:
                part += letter
        if operation == "sst":  # "[smem:[address]] value"
            address, _, value = rest.strip().rpartition("]")
            parts = [address + "]", value.strip(" ,")]
        try:
            return [self._operand(x) for x in parts if x]
        except ValueError:
            self.unknown[operation] = self.unknown.get(operation, 0) + 1
            return None

    def _operand(self, text: str) -> str:
        text = text.strip().removeprefix("$")
        if match := _REGISTER.match(text):
            return f"{'not ' if match[1] else ''}r[{match[2]!r}]"
        if re.fullmatch(r"-?\d+|0x[0-9a-f]+", text):
            return repr(signed(int(text, 0)))
        if match := re.fullmatch(r"\[smem:(.*)\]", text):
            return self._operand(match[1])
        if match := re.fullmatch(r"\[(.*)\]", text):
            return "(" + " + ".join(self._operand(x) for x in match[1].split("+")) + ")"
        if text.startswith("#"):
            return repr(self.allocations.setdefault(text, (len(self.allocations) + 1) << 32))
        if match := re.fullmatch(r"(.*?)\s*\[#[^\]]*\]", text):  # an operand and the allocation it points to
            return self._operand(match[1])
        raise ValueError(text)
