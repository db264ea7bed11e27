"""Every weight that a checkpoint folder holds, under the usual names, however it is packed."""

import re
from pathlib import Path
from typing import Any

from rich.console import Console

from paged_jax.models.expert_files import StackedTensor, find_stacked
from paged_jax.models.families import Family
from paged_jax.models.fields import Fields
from paged_jax.models.mxfp4 import PackedTensor, find_packed
from paged_jax.models.safetensors_file import StoredTensor, list_checkpoint
from paged_jax.models.scaled import ScaledTensor, find_scaled

Stored = StoredTensor | PackedTensor | ScaledTensor | StackedTensor
LAYER = re.compile(r"model\.layers\.(\d+)\.")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def find_tensors(folder: Path, fields: Fields, family: Family) -> dict[str, Stored]:
    """The weights of a checkpoint by name.

    Args:
        folder: the checkpoint folder.
        fields: its config.json.
        family: of the model.

    Raises:
        ValueError: a file is missing or broken, or the layout of the weights is not known.
    """
    stored = usual_names(list_checkpoint(folder), family.other_parts)
    _check_layers(stored, fields)
    wide = find_scaled(stored, fields, folder)
    narrow = {tensor.dtype for tensor in wide.values() if isinstance(tensor, ScaledTensor)}
    if narrow:
        kinds = " and ".join("int8" if dtype == "I8" else "fp8" for dtype in sorted(narrow))
        Console(stderr=True).print(f"the {kinds} weights in {folder} are widened while they are loaded", soft_wrap=True)
    return find_stacked(find_packed(wide, folder), folder)


def _check_layers(stored: dict[str, Any], fields: Fields) -> None:
    """Refuses a number of layers that the files do not have, before any is built."""
    num_layers = len({match[1] for name in stored if (match := LAYER.match(name))})
    if num_layers < fields.integer("num_hidden_layers"):
        fields.fail(
            "num_hidden_layers", f"the files beside it have the weights of {num_layers} layers. Download it again."
        )


def usual_names(stored: dict[str, Any], other_parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tensors with names that begin with `model.`, whatever they begin with in the file.

    A base model that was saved by itself has names without it; files of several models have longer ones.

    Args:
        stored: the tensors by name.
        other_parts: beginnings of the names of tensors that belong to other models of the file; they are left out.
    """
    prefixes = {name.removesuffix(EMBEDDING) for name in stored if name.endswith(EMBEDDING)}
    if len(prefixes) != 1:
        return stored
    prefix = prefixes.pop()
    found = {}
    for name, tensor in stored.items():
        if name.removeprefix("model.").startswith(other_parts):
            continue
        if name.endswith(HEAD):
            found[HEAD] = tensor
        else:
            found["model." + name.removeprefix(prefix) if name.startswith(prefix) else name] = tensor
    return found
