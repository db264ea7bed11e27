"""Experts that stand in a checkpoint one by one, read and written as the stacks that the decoder has."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

# Gate, linear part and down projection of one expert; Mixtral has names of its own.
NAMES = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
ONE = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(NAMES + MIXTRAL)})\.weight")
STACK = re.compile(r"(.*\.experts)\.(gate_up|down)")


class Tensor(Protocol):
    """What a checkpoint holds of one weight."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def rows(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class StackedTensor:
    """One weight [O, I] of each of E experts as [E, I, O]; of two weights, O alternates between them: [E, I, 2 O].

    Args:
        parts: the weights, each a tuple of E tensors of one shape and dtype.
    """

    parts: tuple[tuple[Tensor, ...], ...]

    @property
    def dtype(self) -> str:
        return self.parts[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        num_out, num_in = self.parts[0][0].shape
        return len(self.parts[0]), num_in, num_out * len(self.parts)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some experts' weights."""
        dtype = self.parts[0][0].rows(0, 1).dtype
        out = np.empty((stop - start, *self.shape[1:]), dtype)
        for i in range(start, stop):
            for offset, tensors in enumerate(self.parts):
                out[i - start, :, offset :: len(self.parts)] = tensors[i].rows(0, tensors[i].shape[0]).T
        return out


def find_stacked(stored: dict, folder: Path) -> dict:
    """The tensors of a checkpoint, with the experts of each layer as two stacks.

    Args:
        stored: the tensors by name.
        folder: the checkpoint folder, for errors.

    Raises:
        ValueError: an expert is missing, or has another shape or dtype than its neighbours.
    """
    found, groups = dict(stored), {}
    for name in stored:
        if match := ONE.fullmatch(name):
            groups.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = found.pop(name)
    for base, roles in groups.items():
        gate, up, down = MIXTRAL if set(MIXTRAL) & set(roles) else NAMES
        stacks = {role: _stack(f"{folder} has {base}", role, roles.get(role, {})) for role in (gate, up, down)}
        if {(len(stack), stack[0].shape, stack[0].dtype) for stack in (stacks[gate], stacks[up])} != {
            (len(stacks[down]), stacks[down][0].shape[::-1], stacks[down][0].dtype)
        }:
            raise ValueError(
                f"{folder} has {base} whose {gate}, {up} and {down} do not fit together: download it again."
            )
        found[f"{base}.gate_up"] = StackedTensor((stacks[gate], stacks[up]))
        found[f"{base}.down"] = StackedTensor((stacks[down],))
    return found


def _stack(where: str, role: str, by_number: dict) -> tuple:
    tensors = tuple(by_number[number] for number in sorted(by_number))
    if not tensors or sorted(by_number) != list(range(len(tensors))):
        raise ValueError(f"{where} without the {role} of some expert: download the checkpoint again.")
    kinds = {(tensor.shape, tensor.dtype) for tensor in tensors}
    if len(kinds) > 1 or len(tensors[0].shape) != 2:
        shapes = sorted({(str(list(tensor.shape)), tensor.dtype) for tensor in tensors})
        raise ValueError(
            f"{where} whose {role} should be matrices of one shape and dtype, not {shapes}: download it again."
        )
    return tensors


def split_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `find_stacked`, to write a checkpoint: each expert's weights under a name of its own.

    Args:
        tensors: the tensors by name; those of stacks as the decoder has them.
    """
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        match = STACK.fullmatch(name)
        if not match:
            found[name] = value
            continue
        gate, up, down = MIXTRAL if "block_sparse_moe" in name else NAMES
        roles = (gate, up) if match[2] == "gate_up" else (down,)
        for number, expert in enumerate(value):
            for offset, role in enumerate(roles):
                part = np.ascontiguousarray(expert[:, offset :: len(roles)].T)
                found[f"{match[1]}.{number}.{role}.weight"] = part
    return found
