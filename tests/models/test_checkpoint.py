"""Checkpoint folders: what is read, what is refused and with which words, and how much memory it takes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_decoder import make_decoder
from tiny import TINY

from paged_jax import models
from paged_jax.models.checkpoint import decoder_config
from paged_jax.models.safetensors_file import list_checkpoint

CONFIG = TINY | dict(rms_norm_eps=1e-5, rope_theta=10000.0, eos_token_id=[3, 7])


def make(folder: Path, dtype=None, num_shards: int = 1, **changes):
    """Writes a tiny random checkpoint and returns its weights by path."""
    hf_config = CONFIG | changes
    params = nnx.state(make_decoder(decoder_config(hf_config)))
    models.save(folder, hf_config, params, dtype=dtype, num_shards=num_shards)
    return weights(params)


def weights(params) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(params)
    return {".".join(map(str, path)): np.asarray(leaf[...], np.float32) for path, leaf in flat}


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(tie_word_embeddings=True),
        dict(model_type="phi3"),
        dict(model_type="mixtral", num_local_experts=3, num_experts_per_tok=2),
        dict(model_type="qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8),
    ],
    ids=["plain", "tied", "fused", "experts", "other experts"],
)
def test_what_was_saved_is_loaded(tmp_path, changes, num_shards):
    saved = make(tmp_path, num_shards=num_shards, **changes)
    model = models.load(tmp_path)
    loaded = weights(model.params)
    assert loaded.keys() == saved.keys()
    for path in saved:
        np.testing.assert_array_equal(loaded[path], saved[path], err_msg=path)
    assert ("head.weight" in loaded) == (not changes.get("tie_word_embeddings", False))
    assert len(list(tmp_path.glob("*.safetensors"))) == num_shards
    assert model.stop_tokens == (3, 7)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_every_stored_dtype_loads_into_every_dtype(tmp_path, stored, wanted):
    saved = make(tmp_path, dtype=jnp.dtype(stored))
    model = models.load(tmp_path, dtype=wanted)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {wanted}
    bits = min({"float32": 23, "bfloat16": 7, "float16": 10}[name] for name in (stored, wanted))
    for path, value in weights(model.params).items():
        # float16 is subnormal below 6e-5: there its steps are 2**-24
        np.testing.assert_allclose(value, saved[path], rtol=2.0**-bits, atol=2.0**-24, err_msg=path)


def test_the_dtype_is_what_config_json_says(tmp_path):
    make(tmp_path, dtype=jnp.bfloat16)
    assert jax.tree.leaves(models.load(tmp_path).params)[0].dtype == jnp.bfloat16
    config = json.loads((tmp_path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as transformers 4 wrote it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert jax.tree.leaves(models.load(tmp_path).params)[0].dtype == jnp.bfloat16


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    make(tmp_path)
    model = models.load(tmp_path)
    before = weights(model.params)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\0" * (size - size // 2))
    for path, value in weights(model.params).items():
        np.testing.assert_array_equal(value, before[path])


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 15), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path)
    assert str(caught.value) == (
        f"the tensors in {tmp_path} are not those of its config.json. "
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "not expected: model.layers.2.mlp.up_proj.weight; "
        "of another shape: model.layers.0.self_attn.q_proj.weight is [32, 15] instead of [32, 16]. "
        "Correct config.json, convert the weights, or download the checkpoint again."
    )


def test_tensors_that_follow_from_others_are_ignored(tmp_path):
    make(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    models.load(tmp_path)


def cut(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def cut_header(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def garble_header(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype"', b'"dtipe"', 1))


def in_header(**changes):
    """Says something else of every tensor, and leaves the data as it is."""

    def edit(folder: Path):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        text = json.dumps({name: entry | changes for name, entry in header.items() if name != "__metadata__"}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return edit


def drop_shard(folder: Path):
    make(folder, num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_shard(folder: Path):
    make(folder, num_shards=3)
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


BROKEN = [
    (cut, r"model.safetensors is cut short: its header tells of \d+ bytes, but it has \d+\. Download it again"),
    (cut_header, r"is cut short or is no safetensors file: it has 100 bytes and says that its header has \d+"),
    (garble_header, r"model.safetensors is no safetensors file: its header is not readable .*Download it again"),
    (in_header(dtype="F64"), r"json\. not of F32, F16, BF16: lm_head.weight \(F64\), .*and \d+ more\. .*conv"),
    (
        in_header(dtype="U8", shape=[8]),
        r"model.safetensors contradicts itself: \S+ is U8 \[8\] in the bytes \d+ to \d+, .*Do",
    ),
    (cut_shard, r"model-00003-of-00003.safetensors is cut short: its header tells of \d+ bytes, but it has \d+\. Down"),
    (drop_shard, r"index.json names 'model-00002-of-00003.safetensors', which is not in .*: download that file"),
    (lambda f: (f / "model.safetensors").unlink(), r"has neither model.safetensors nor model.safetensors.index"),
    (lambda f: (f / "config.json").unlink(), r"config.json does not exist: give the folder of a Hugging Face"),
    (lambda f: (f / "config.json").write_text("{"), r"config.json is not readable as JSON .*Download it again"),
    (lambda f: (f / "config.json").write_text("[]"), r"config.json holds list instead of a JSON object"),
    (config(model_type="mamba"), r"config.json has model_type='mamba': supported are gemma2, .*qwen3"),
    (config(hidden_size=None), r"config.json has no 'hidden_size', which 'llama' models need: add it"),
    (config(dtype="int4"), r"has dtype='int4': pass load\(folder, dtype=\.\.\.\) with one of float32, bfloat16"),
    (config(hidden_act="relu"), r"config.json has hidden_act='relu': supported are silu"),
    (config(num_key_value_heads=3), r"config.json has num_key_value_heads=3: it must divide num_attention_heads=4"),
    (
        config(quantization_config={"bits": 4}),
        r"has quantization_config=.*: supported are mxfp4 in gpt_oss, compressed-tensors, fp8",
    ),
    (
        config(rope_scaling={"type": "dynamic"}),
        r"in 'rope_scaling', has type='dynamic': this rope_type is not supported; default, linear",
    ),
    (
        config(rope_scaling={"type": "longrope", "short_factor": [1.0] * 3, "factor": 1.0}),
        r"in 'rope_scaling', has short_factor=.*: it must be a list of 4 positive numbers",
    ),
    (config(model_type="gpt_oss", swiglu_limit=5.0), r"config.json has swiglu_limit=5.0: only 7.0 is supported"),
    (
        config(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=5, moe_intermediate_size=8),
        r"_per_tok=5: it must",
    ),
    (
        config(model_type="qwen3_moe", mlp_only_layers=[1]),
        r"mlp_only_layers=\[1\]: only models with experts in every lay",
    ),
    (
        config(num_hidden_layers=3),
        r"config.json has num_hidden_layers=3: the files beside it have the weights of 2 layers",
    ),
    (
        config(num_hidden_layers=2**31),
        r"config.json has num_hidden_layers=2147483648: it must be a whole number from 1 to",
    ),
    (config(hidden_size="16"), r"config.json has hidden_size='16': it must be a whole number from 1 to"),
    (config(rope_theta="1e4"), r"config.json has rope_theta='1e4': it must be a positive number"),
    (config(eos_token_id=[2.5]), r"config.json has eos_token_id=\[2.5\]: it must be a token id or a list of them"),
    (config(head_dim=7, num_attention_heads=4), r"has head_dim=7: an even number of the 7 lanes of a head must turn"),
    (config(tie_word_embeddings="no"), r"config.json has tie_word_embeddings='no': it must be true or false"),
    (config(rope_scaling=[1]), r"config.json has rope_scaling=\[1\]: it must be an object"),
    (
        config(model_type="gemma2", sliding_window=8, layer_types=["linear_attention"] * 2),
        r"has layer_types=.*: it must name full_attention or sliding_attention for 2 layers",
    ),
    (
        config(model_type="gemma3_text", use_bidirectional_attention=True),
        r"has use_bidirectional_attention=True: only causal decoders are supported",
    ),
]


@pytest.mark.parametrize("breakage, message", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_folder_is_refused_with_file_value_and_fix(tmp_path, breakage, message):
    make(tmp_path)
    breakage(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def test_an_unknown_dtype_is_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="dtype='float64' is not supported: use one of float32, bfloat16"):
        models.load(tmp_path, dtype="float64")


def test_a_missing_or_broken_tokenizer_is_refused_when_it_is_needed(tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json does not exist: text needs a tokenizer. Copy"):
        _ = models.load(tmp_path).tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a readable tokenizer \(.*Download it again"):
        _ = models.load(tmp_path).tokenizer


def test_generation_config_decides_what_ends_a_text(tmp_path):
    make(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert models.load(tmp_path).stop_tokens == (5,)


@pytest.mark.parametrize("prefix", ["", "transformer.", "language_model.model.", "_orig_mod.model."])
def test_weights_whose_names_differ_in_the_prefix_are_loaded(tmp_path, prefix):
    """A base model that was saved by itself has names without `model.`."""
    saved = make(tmp_path, num_shards=2)
    for path in tmp_path.glob("*.safetensors"):
        tensors = {name.replace("model.", prefix): value for name, value in load_file(path).items()}
        save_file(tensors, path)
    loaded = weights(models.load(tmp_path).params)
    assert loaded.keys() == saved.keys()
    for path in saved:
        np.testing.assert_array_equal(loaded[path], saved[path], err_msg=path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.1.w3.weight"),
            r"experts without the w3 of some expert",
        ),
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            r"experts whose w1, w3 and w2 do not fit",
        ),
        (
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.1.w2.weight": np.zeros((3, 4), np.float32)}),
            r"experts whose w2 should be matrices of one shape and dtype, not .*\[3, 4\]",
        ),
    ],
)
def test_experts_that_do_not_fit_together_are_refused(tmp_path, damage, message):
    make(tmp_path, model_type="mixtral", num_local_experts=3, num_experts_per_tok=2)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path)


def test_a_base_model_without_its_head_is_refused_by_its_name(tmp_path):
    make(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: lm_head.weight\."):
        models.load(tmp_path)


# getrusage's ru_maxrss begins with the parent's memory, VmHWM with the process's own.
MEASURE = """
import re, sys
from pathlib import Path
import jax
from paged_jax import models
stacked = "stacked" in sys.argv[2]
models.load(models.DEMO, stacked=stacked)  # what loading itself needs of code and caches is not the checkpoint's
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
mesh = jax.make_mesh((4,), ("model",)) if "split" in sys.argv[2] else None
before = peak()
models.load(sys.argv[1], sharding=mesh, stacked=stacked)
print(peak() - before)
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def peak_of_loading(folder: Path, where: str, hidden_size: int, num_layers: int, num_shards: int) -> tuple[int, int]:
    """Peak host memory that loading adds, and the checkpoint's size; both in bytes."""
    shape = dict(hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=num_layers)
    hf_config = CONFIG | shape | dict(vocab_size=16 * hidden_size, num_key_value_heads=4)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: models.Decoder(decoder_config(hf_config), rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), abstract)
    models.save(folder, hf_config, params, num_shards=num_shards)
    del params
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(folder), where]
    child = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    shutil.rmtree(folder)
    peak = int(child.stdout)
    print(f"{size / 1e6:.0f} MB in {num_shards} file(s), {where}: peak {peak / size:.3f} of it")
    assert peak > 0.9 * size  # the weights themselves
    return peak, size


@needs_proc
@pytest.mark.parametrize("where, num_shards", [("whole", 1), ("split", 3)])
def test_loading_holds_little_more_than_the_weights(tmp_path, where, num_shards):
    peak, size = peak_of_loading(tmp_path, where, hidden_size=512, num_layers=12, num_shards=num_shards)
    assert peak <= 1.1 * size + 64e6  # 40 to 60 MB are needed whatever is loaded


@needs_proc
@pytest.mark.long
@pytest.mark.parametrize("where", ["whole", "split", "whole, stacked", "split, stacked"])
def test_loading_a_gigabyte_holds_little_more_than_the_weights(tmp_path, where):
    peak, size = peak_of_loading(tmp_path, where, hidden_size=2048, num_layers=8, num_shards=1)
    assert peak <= 1.3 * size


def test_loading_shows_its_progress(tmp_path, capsys, monkeypatch):
    make(tmp_path)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    models.load(tmp_path)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("paged_jax.models.checkpoint.PROGRESS_BYTES", 1)
    models.load(tmp_path)
    out, err = capsys.readouterr()
    assert "loading weights" in err and "100%" in err and out == ""


def test_a_sharded_checkpoint_lists_the_tensors_of_all_files(tmp_path):
    make(tmp_path / "one")
    make(tmp_path / "three", num_shards=3)
    one, three = list_checkpoint(tmp_path / "one"), list_checkpoint(tmp_path / "three")
    assert one.keys() == three.keys()
    assert len({tensor.path for tensor in three.values()}) == 3
