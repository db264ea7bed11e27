"""What a config.json means, in the words of transformers 4 and 5, and where it leaves something out."""

import json
from pathlib import Path

import make_goldens
import numpy as np
import pytest
from tiny import TINY

from paged_jax.models.checkpoint import decoder_config
from paged_jax.models.families import FAMILIES

CONFIG = TINY | dict(rms_norm_eps=1e-5, rope_theta=10000.0)
LONGROPE = dict(short_factor=[1.0] * 4, long_factor=[2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_old_files_of_phi_3_say_su_or_yarn_for_longrope(kind, name):
    config = CONFIG | dict(model_type="phi3", original_max_position_embeddings=1024, max_position_embeddings=4096)
    rope = decoder_config(config | dict(rope_scaling=LONGROPE | {name: kind})).rope
    assert (rope.kind, rope.lane_factors, rope.original_length) == ("longrope", (2.0, 3.0, 4.0, 5.0), 1024)


def test_sizes_may_be_written_as_floats():
    assert decoder_config(CONFIG | dict(hidden_size=16.0, rope_theta=10000)) == decoder_config(CONFIG)


def as_transformers_4(hf_config: dict) -> dict:
    """The same config in the words of transformers 4."""
    old = dict(hf_config)
    if "text_config" in old:
        return old | {"text_config": as_transformers_4(old["text_config"])}
    parameters = old.pop("rope_parameters")
    if "full_attention" in parameters:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    parameters = dict(parameters)
    old["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        old["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    kind = parameters.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    return old


@pytest.mark.parametrize("case", make_goldens.CASES)
def test_configs_of_transformers_4_and_5_mean_the_same(case):
    golden = np.load(Path(__file__).parent / "goldens" / f"{case}.npz")
    new = json.loads(str(golden["config"]))
    old = as_transformers_4(new)
    if case == "qwen2":
        del old["layer_types"]  # follows from max_window_layers
    assert "rope_parameters" in json.dumps(new) and "rope_parameters" not in json.dumps(old)
    assert decoder_config(old) == decoder_config(new)


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings", "num_local_experts", "num_experts_per_tok")
SIZES += ("moe_intermediate_size", "num_experts")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_that_a_config_leaves_out_mean_what_transformers_assumes(model_type):
    full = json.loads((Path(__file__).parent / "goldens" / "defaults.json").read_text())[model_type]
    sizes = full.get("text_config", full)
    bare = {name: sizes[name] for name in SIZES if name in sizes} | {"model_type": model_type}
    assert decoder_config(bare) == decoder_config(full)


def test_layers_alternate_where_the_config_does_not_say_how():
    gemma2 = decoder_config(CONFIG | dict(model_type="gemma2", sliding_window=8, num_hidden_layers=4))
    assert gemma2.windows == (8, None, 8, None)
    gemma3 = decoder_config(CONFIG | dict(model_type="gemma3_text", sliding_window=8, num_hidden_layers=7))
    assert gemma3.windows == (8, 8, 8, 8, 8, None, 8)
    assert decoder_config(CONFIG).windows == ()


def test_only_the_global_layers_of_olmo_3_are_lengthened():
    scaling = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)
    config = decoder_config(
        CONFIG | dict(model_type="olmo3", num_hidden_layers=4, sliding_window=8, rope_scaling=scaling)
    )
    assert config.windows == (8, 8, 8, None)
    assert [config.layer_rope(layer).kind for layer in range(4)] == ["default", "default", "default", "yarn"]
    assert {config.layer_rope(layer).theta for layer in range(4)} == {10000.0}


def test_layers_without_a_rotary_embedding_are_those_that_the_file_names():
    every_fourth = decoder_config(CONFIG | dict(model_type="smollm3", num_hidden_layers=5))
    assert [config_rope.rotary_share for config_rope in map(every_fourth.layer_rope, range(5))] == [1, 1, 1, 0, 1]
    named = decoder_config(CONFIG | dict(model_type="smollm3", no_rope_layers=[0, 1]))
    assert named.unturned_layers == (0,)
    with pytest.raises(
        ValueError, match=r"has no_rope_layers=\[0, 2\]: it must have a 0 \(no RoPE\) or a 1 for each of 2 l"
    ):
        decoder_config(CONFIG | dict(model_type="smollm3", no_rope_layers=[0, 2]))
