"""Safetensors files, read one tensor at a time through the page cache, so that nothing is held twice."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in a file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the tensor as a memory map, which goes away with the array; its dtype is one of DTYPES."""
        dtype = DTYPES[self.dtype]
        if stop == start or 0 in self.shape:  # nothing cannot be mapped
            return np.empty((stop - start, *self.shape[1:]), dtype)
        offset = self.offset + start * math.prod(self.shape[1:]) * dtype.itemsize
        return np.memmap(self.path, dtype=dtype, mode="r", offset=offset, shape=(stop - start, *self.shape[1:]))


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        ValueError: the file is cut short, contradicts itself or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise ValueError(
                f"{path} is cut short or is no safetensors file: it has {size} bytes and says that its header "
                f"has {header_size}. Download it again."
            )
        header_bytes = file.read(header_size)
    begin = 8 + header_size
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        tensors, spans = {}, {}
        for name, entry in header.items():
            start, stop = _whole_numbers(entry["data_offsets"])
            tensors[name] = StoredTensor(path, name, str(entry["dtype"]), _whole_numbers(entry["shape"]), begin + start)
            spans[name] = (start, stop)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no safetensors file: its header is not readable ({error}). Download it again."
        ) from error
    end = begin + max((stop for _, stop in spans.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is cut short: its header tells of {end} bytes, but it has {size}. Download it again.")
    _check_spans(path, tensors, spans, size - begin)
    return tensors


def _whole_numbers(value) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
        raise ValueError(f"{str(value)[:80]} are no sizes")
    return tuple(value)


def _check_spans(path: Path, tensors: dict[str, StoredTensor], spans: dict[str, tuple[int, int]], size: int) -> None:
    """The tensors must fill the file one after the other, each with as many bytes as its shape needs."""
    place = 0
    for name in sorted(spans, key=spans.__getitem__):
        tensor, (start, stop) = tensors[name], spans[name]
        needed = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else stop - start
        if start != place or stop - start != needed:
            raise ValueError(
                f"{path} contradicts itself: {name} is {tensor.dtype} {list(tensor.shape)} in the bytes {start} to "
                f"{stop}, and should begin at {place}. Download it again."
            )
        place = stop
    if place != size:
        raise ValueError(f"{path} has {size - place} bytes that its header does not tell of. Download it again.")


def list_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint: model.safetensors, or the files in model.safetensors.index.json.

    Raises:
        ValueError: there are no such files, or one is broken.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return list_tensors(single)
    if not index.exists():
        raise ValueError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json: give the folder of a "
            "Hugging Face checkpoint with safetensors weights."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no 'weight_map' from tensors to files. Download it again.")
    tensors: dict[str, StoredTensor] = {}
    files = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(set(weight_map.values())):
        if name not in files:
            raise ValueError(f"{index} names {name[:200]!r}, which is not in {folder}: download that file.")
        tensors |= list_tensors(folder / name)
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: the file is missing or is no JSON object.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a Hugging Face checkpoint.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__} instead of a JSON object. Download it again.")
    return value


def describe(names: Iterable[str], most: int = 12) -> str:
    """Names in a line, the first of many."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
