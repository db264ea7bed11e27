"""Weights in 8 bits with scales, widened while loading: the layouts `compressed-tensors`, `fp8` and `fbgemm_fp8`."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paged_jax.models.fields import Fields
from paged_jax.models.safetensors_file import StoredTensor

NARROW = ("I8", "F8_E4M3", "F8_E5M2")
SCALES = ("_scale", "_scale_inv")  # after the weight's name; both are factors
SCALE_DTYPES = ("F32", "F16", "BF16")
# Of activations and of pages, which stay as wide as they are
UNUSED = (".input_scale", ".output_scale", ".k_scale", ".v_scale")
METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8")
FORMATS = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class ScaledTensor:
    """A weight [O, I] whose blocks of rows and columns have a factor each.

    Args:
        weight: int8 or fp8 [O, I].
        scale: [ceil(O / rows of a block), ceil(I / columns of a block)], or any shape of that size.
        block: rows and columns of a block.
    """

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]

    @property
    def dtype(self) -> str:
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows in float32."""
        num_out, num_in = self.shape
        high, wide = self.block
        scale = self.scale.rows(0, self.scale.shape[0]) if self.scale.shape else self.scale.rows(0, 1)
        factors = np.asarray(scale, np.float32).reshape(-(-num_out // high), -(-num_in // wide))
        factors = factors[np.arange(start, stop) // high]
        out = self.weight.rows(start, stop).astype(np.float32)
        for column in range(factors.shape[1]):
            out[:, column * wide : (column + 1) * wide] *= factors[:, column, None]
        return out


def find_scaled(
    stored: dict[str, StoredTensor], fields: Fields, folder: Path
) -> dict[str, StoredTensor | ScaledTensor]:
    """The tensors of a checkpoint, with each narrow weight and its scale as one.

    Args:
        stored: the tensors by name.
        fields: the config.json, whose `quantization_config` names the layout.
        folder: the checkpoint folder, for errors.

    Raises:
        ValueError: the layout is not known, or a scale is missing or of another shape.
    """
    settings = fields.part("quantization_config")
    method = settings.text("quant_method", None)
    if not settings.values or method == "mxfp4":
        return dict(stored)
    if method not in METHODS:
        fields.fail("quantization_config", f"supported are mxfp4 in gpt_oss, {', '.join(METHODS)}; use plain weights.")
    if method == "compressed-tensors" and settings.text("format", "float-quantized") not in FORMATS:
        settings.fail("format", f"supported are {', '.join(FORMATS)}; use plain weights.")
    block = settings.get("weight_block_size", None)
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) for n in block)
    ):
        settings.fail("weight_block_size", "it must be two whole numbers.")
    found: dict[str, StoredTensor | ScaledTensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype in NARROW and name.endswith(".weight"):
            found[name] = _scaled(name, tensor, stored, block, folder)
        elif name.endswith(".weight_zero_point"):
            raise ValueError(f"{folder} has {name}: only symmetric weights, without zero points, are supported.")
        elif not name.endswith((*UNUSED, *(f".weight{end}" for end in SCALES))):
            found[name] = tensor
    return found


def _scaled(name: str, weight: StoredTensor, stored: dict[str, StoredTensor], block, folder: Path) -> ScaledTensor:
    scale = next((stored[name + end] for end in SCALES if name + end in stored), None)
    if scale is None:
        raise ValueError(f"{folder} has {name} of dtype {weight.dtype} but no {name}_scale: download it again.")
    found = _block(weight.shape, scale.shape, block)
    if found is None or scale.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{folder} has {name} of shape {list(weight.shape)} with scales of dtype {scale.dtype} and shape "
            f"{list(scale.shape)}: supported are matrices with one for all, one a row, or one for each block of "
            "weight_block_size. Use plain weights."
        )
    return ScaledTensor(weight, scale, found)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], named: list[int] | None) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None where the scales do not fit."""
    if len(shape) != 2 or 0 in shape:
        return None
    num_out, num_in = shape
    if math.prod(scales) == 1:
        return num_out, num_in
    if scales in ((num_out,), (num_out, 1)):
        return 1, num_in
    if named and min(named) > 0 and scales == (-(-num_out // named[0]), -(-num_in // named[1])):
        return named[0], named[1]
    return None
