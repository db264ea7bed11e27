"""Weights in int8 and fp8 with scales: loaded as the plain checkpoint that they describe."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_decoder import make_decoder
from tiny import TINY

from paged_jax import models
from paged_jax.models.checkpoint import decoder_config
from paged_jax.models.safetensors_file import StoredTensor
from paged_jax.models.scaled import ScaledTensor

COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
LAYOUTS = {
    "int8, one scale a row": (np.int8, "weight_scale", "row", COMPRESSED | {"format": "int-quantized"}),
    "fp8, one scale a row": (ml_dtypes.float8_e4m3fn, "weight_scale", "row", COMPRESSED),
    "fp8, one scale a row, flat": (ml_dtypes.float8_e4m3fn, "weight_scale", "flat", {"quant_method": "fbgemm_fp8"}),
    "fp8, one scale a tensor": (ml_dtypes.float8_e4m3fn, "weight_scale", "tensor", COMPRESSED),
    "fp8, one scale a block": (
        ml_dtypes.float8_e4m3fn,
        "weight_scale_inv",
        "block",
        {"quant_method": "fp8", "weight_block_size": [6, 7]},  # neither divides the matrices
    ),
}
BLOCKS = {
    "row": lambda o, i: (1, i),
    "flat": lambda o, i: (1, i),
    "tensor": lambda o, i: (o, i),
    "block": lambda o, i: (6, 7),
}


def write(folder: Path, layout: str, **config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A checkpoint with narrow projections: its tensors, and those of the plain checkpoint that it describes."""
    dtype, suffix, blocks, settings = LAYOUTS[layout]
    hf_config = TINY | config
    params = nnx.state(make_decoder(decoder_config(hf_config)))
    models.save(folder, hf_config, params)
    plain = load_file(folder / "model.safetensors")
    narrow, rng = dict(plain), np.random.default_rng(0)
    for name, weight in plain.items():
        if "proj" not in name and "experts" not in name:
            continue
        num_out, num_in = weight.shape
        high, wide = BLOCKS[blocks](num_out, num_in)
        scales = rng.uniform(0.5, 2, (-(-num_out // high), -(-num_in // wide))).astype(np.float32)
        values = rng.integers(-7, 8, weight.shape).astype(dtype)
        narrow[name] = values
        narrow[name.removesuffix("weight") + suffix] = scales.ravel() if blocks == "flat" else scales
        narrow[name.removesuffix("weight") + "input_scale"] = np.ones(1, np.float32)
        factors = np.kron(scales, np.ones((high, wide), np.float32))[:num_out, :num_in]
        plain[name] = values.astype(np.float32) * factors
    save_file(narrow, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config | {"quantization_config": settings, "dtype": "float32"}))
    return narrow, plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow_weights_load_as_the_plain_ones_that_they_describe(tmp_path, layout, capsys):
    _, plain = write(tmp_path / "narrow", layout)
    narrow = models.load(tmp_path / "narrow")
    lines = capsys.readouterr().err.splitlines()
    kind = "int8" if "int8" in layout else "fp8"
    assert lines == [f"the {kind} weights in {tmp_path / 'narrow'} are widened while they are loaded"]
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(TINY))
    jax.tree.map(np.testing.assert_array_equal, narrow.params, models.load(tmp_path / "plain").params)


def test_experts_may_be_narrow_too(tmp_path):
    sizes = dict(model_type="qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    _, plain = write(tmp_path, "fp8, one scale a block", **sizes)
    gate_up = models.load(tmp_path).params["layers"][0]["mlp"]["gate_up"][...]
    for expert in range(3):
        names = [f"model.layers.0.mlp.experts.{expert}.{name}.weight" for name in ("gate_proj", "up_proj")]
        np.testing.assert_array_equal(gate_up[expert, :, 0::2], plain[names[0]].T)
        np.testing.assert_array_equal(gate_up[expert, :, 1::2], plain[names[1]].T)


def test_rows_of_a_narrow_tensor_are_those_of_the_whole(tmp_path):
    values = np.arange(-30, 30, dtype=np.int8).reshape(10, 6)
    scales = np.random.default_rng(0).uniform(1, 2, (4, 3)).astype(np.float32)
    path = tmp_path / "raw"
    path.write_bytes(values.tobytes() + scales.tobytes())
    weight = StoredTensor(path, "w", "I8", (10, 6), 0)
    tensor = ScaledTensor(weight, StoredTensor(path, "s", "F32", (4, 3), 60), (3, 2))
    np.testing.assert_array_equal(tensor.rows(2, 8), tensor.rows(0, 10)[2:8])
    np.testing.assert_array_equal(tensor.rows(0, 10), values * np.kron(scales, np.ones((3, 2), np.float32))[:10])


def rewrite(**changes):
    def damage(tensors, config):
        for name, change in changes.items():
            full = next(key for key in tensors if key.endswith(f"layers.0.self_attn.q_proj.{name}"))
            if change is None:
                del tensors[full]
            else:
                tensors[full] = change(tensors[full])

    return damage


def settings(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


def add_zero_point(tensors, config):
    tensors["model.layers.0.self_attn.q_proj.weight_zero_point"] = np.zeros((32, 1), np.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite(weight_scale=None), r"q_proj.weight of dtype F8_E4M3 but no .*q_proj.weight_scale: download it again"),
        (
            rewrite(weight_scale=lambda s: s[:5]),
            r"q_proj.weight of shape \[32, 16\] with scales of dtype F32 and shape \[5, 1\]",
        ),
        (
            rewrite(weight_scale=lambda s: s.astype(np.float16).view(np.int8)),
            r"with scales of dtype I8 and shape \[32, 2\]",
        ),
        (add_zero_point, r"q_proj.weight_zero_point: only symmetric weights, without zero points, are supported"),
        (
            settings(quant_method="gptq"),
            r"supported are mxfp4 in gpt_oss, compressed-tensors, fp8, fbgemm_fp8; use plain",
        ),
        (
            settings(format="pack-quantized"),
            r"has format='pack-quantized': supported are float-quantized, int-quantized",
        ),
        (settings(weight_block_size="x"), r"has weight_block_size='x': it must be two whole numbers"),
        (
            lambda tensors, config: config.pop("quantization_config"),
            r"not of F32, F16, BF16: .*q_proj.weight \(F8_E4M3\)",
        ),
    ],
)
def test_scales_that_do_not_belong_to_their_weights_are_refused(tmp_path, damage, message):
    tensors, _ = write(tmp_path, "fp8, one scale a row")
    config = json.loads((tmp_path / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def test_narrow_weights_load_into_bfloat16(tmp_path):
    write(tmp_path, "int8, one scale a row")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(models.load(tmp_path, "bfloat16").params)} == {"bfloat16"}
