"""gpt-oss as it is published: 4-bit weights, unpacked while loading."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_decoder import make_decoder
from tiny import EXPERTS, TINY

from paged_jax import models
from paged_jax.models.checkpoint import decoder_config
from paged_jax.models.mxfp4 import unpack

CONFIG = TINY | EXPERTS | dict(hidden_size=64, intermediate_size=32, num_hidden_layers=1)
LAYER = "model.layers.0.mlp.experts"


def write_packed(folder: Path) -> dict[str, np.ndarray]:
    """A checkpoint with packed experts; the tensors of the same checkpoint unpacked."""
    params = nnx.state(make_decoder(decoder_config(CONFIG)))
    models.save(folder, CONFIG, params, dtype=jnp.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    packed, rng = dict(tensors), np.random.default_rng(0)
    for name in ("gate_up_proj", "down_proj"):
        experts, num_in, num_out = packed.pop(f"{LAYER}.{name}").shape
        blocks = rng.integers(0, 256, (experts, num_out, num_in // 32, 16), np.uint8)
        scales = rng.integers(119, 124, blocks.shape[:3], np.uint8)
        packed |= {f"{LAYER}.{name}_blocks": blocks, f"{LAYER}.{name}_scales": scales}
        weights = np.ascontiguousarray([unpack(b, s).T for b, s in zip(blocks, scales, strict=True)])
        tensors[f"{LAYER}.{name}"] = weights.astype(tensors[f"{LAYER}.{name}"].dtype)
    save_file(packed, folder / "model.safetensors")
    quantized = CONFIG | {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(quantized))
    return tensors


def test_values_are_those_of_transformers():
    golden = np.load(Path(__file__).parent / "goldens" / "mxfp4.npz")
    for blocks, scales, weights in zip(golden["blocks"], golden["scales"], golden["weights"], strict=True):
        np.testing.assert_array_equal(unpack(blocks, scales).T, weights)


def test_a_packed_checkpoint_loads_as_the_unpacked_one(tmp_path):
    tensors = write_packed(tmp_path)
    packed = models.load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    unpacked = models.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, packed.params, unpacked.params)


def test_packed_tensors_that_do_not_belong_together_are_refused(tmp_path):
    write_packed(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = tensors.pop(f"{LAYER}.down_proj_scales")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has .*down_proj_blocks but no .*down_proj_scales: download"):
        models.load(tmp_path)
    wide = {f"{LAYER}.down_proj_scales": scales.astype(np.float32)}
    save_file(tensors | wide, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"_blocks of dtype U8 and .*_scales of dtype F32, but MXFP4 is U8. Download"):
        models.load(tmp_path)
    save_file(tensors | {f"{LAYER}.down_proj_scales": scales[:, :3]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"of shape \[2, 64, 1, 16\] and .* of shape \[2, 3, 1\]: the scales must"):
        models.load(tmp_path)
