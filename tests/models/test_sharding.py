"""Weights on four devices: each holds its part from the start, and the tokens stay the same."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from paged_run import PagedRun
from test_decoder import make_decoder
from tiny import EXPERTS, TINY

from paged_jax import models
from paged_jax.models.checkpoint import decoder_config

FOUR_KV_HEADS = dict(num_attention_heads=8, num_key_value_heads=4)


def make(folder, model_type: str = "llama", num_shards: int = 1, **changes) -> None:
    """A checkpoint with weights large enough that greedy tokens differ."""
    hf_config = TINY | EXPERTS | FOUR_KV_HEADS | {"model_type": model_type} | changes
    models.save(folder, hf_config, nnx.state(make_decoder(decoder_config(hf_config))), num_shards=num_shards)


def leaves(model: models.Model) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(model.params)}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((4,), ("model",))


@pytest.mark.parametrize("model_type, num_shards", [("llama", 1), ("phi3", 3), ("gpt_oss", 2)])
def test_each_device_gets_its_part_of_a_checkpoint(tmp_path, mesh, model_type, num_shards):
    make(tmp_path, model_type, num_shards)
    whole, split = leaves(models.load(tmp_path)), leaves(models.load(tmp_path, sharding=mesh))
    assert whole.keys() == split.keys()
    for path, leaf in split.items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)
        parts = {shard.data.shape for shard in leaf.addressable_shards}
        is_small = "norm" in path or "router" in path or path.endswith(("out.bias", "down_bias"))
        assert parts == {leaf.sharding.shard_shape(leaf.shape)}
        assert math.prod(parts.pop()) == leaf.size // (1 if is_small else 4), path
    assert len(list(tmp_path.glob("*.safetensors"))) == num_shards


def test_a_device_holds_whole_heads(tmp_path, mesh):
    make(tmp_path)
    k = leaves(models.load(tmp_path, sharding=mesh))["layers.1.attn.k.weight"]
    assert [shard.index[0] for shard in k.addressable_shards] == [slice(8 * i, 8 * i + 8) for i in range(4)]


def test_a_vocabulary_that_does_not_divide_is_on_every_device(tmp_path, mesh):
    make(tmp_path, vocab_size=33)
    assert leaves(models.load(tmp_path, sharding=mesh))["embed.weight"].sharding.is_fully_replicated


def test_a_function_may_place_every_weight(tmp_path):
    make(tmp_path)
    mesh, seen = jax.make_mesh((2, 2), ("x", "y")), []

    def place(path: str) -> NamedSharding:
        seen.append(path)
        return NamedSharding(mesh, PartitionSpec("y", "x") if path == "layers.0.mlp.up.weight" else PartitionSpec())

    split = leaves(models.load(tmp_path, "bfloat16", sharding=place))
    assert set(seen) == set(split)
    assert split["layers.0.mlp.up.weight"].addressable_shards[0].data.shape == (12, 8)
    for path, leaf in leaves(models.load(tmp_path, "bfloat16")).items():
        np.testing.assert_array_equal(split[path], leaf, err_msg=path)


def test_split_weights_draw_the_same_tokens(tmp_path, mesh):
    """Prefill and decode steps over pages of each device's own heads; nothing compiles twice."""
    make(tmp_path, num_hidden_layers=1)
    prompts = [[3, 4, 5, 6, 7], [5, 6], [3, 4, 5, 6, 9], [3, 4, 5, 6, 7]]
    run = PagedRun(models.load(tmp_path, sharding=mesh), 4, max_length=32, step_tokens=16)
    tokens = run.greedy(run.prefill(prompts, chunk=4), 20)
    assert run.num_traces == 2, "a step was compiled again"
    assert len(set(tokens.ravel().tolist())) > 5
    whole = models.load(tmp_path)
    texts = [[*prompt, *drawn] for prompt, drawn in zip(prompts, tokens.tolist(), strict=True)]
    padded = np.array([text + [0] * (25 - len(text)) for text in texts])
    logits = np.asarray(jax.jit(whole.dense_forward)(whole.params, padded))
    for prompt, drawn, row in zip(prompts, tokens, logits, strict=True):
        np.testing.assert_array_equal(row[len(prompt) - 1 :][:20].argmax(-1), drawn)
    for pages in run.pool.arrays:
        assert [shard.data.shape for shard in pages.data.addressable_shards] == [(9, 1, 16, 16)] * 4


@pytest.mark.parametrize(
    ("changes", "axis", "message"),
    [
        ({}, "x", r"the mesh has axes x: name the one over which layers are split 'model'\."),
        ({"num_key_value_heads": 2}, "model", r"num_kv_heads=2 does not split over the 4 devices of the mesh axis 'mo"),
        ({"intermediate_size": 18}, "model", r"intermediate_size=18 does not split over the 4 devices .* divides it"),
    ],
)
def test_what_does_not_split_is_refused(tmp_path, changes, axis, message):
    make(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path, sharding=jax.make_mesh((4,), (axis,)))
