"""What `transformers` computes for tiny random checkpoints of every family, to compare our decoder with.

    python tests/models/make_goldens.py [--seed 0] [--output tests/models/goldens]

Needs torch and transformers, and neither JAX nor this package, so it runs in an environment of its own. The weights are
not stored: `fill` makes them again from their names and shapes, bit for bit, anywhere.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

PROMPT_LENGTHS = (1, 2, 15, 16, 17, 45, 130, 300)
NEW_TOKENS = 64
SHORT = 128  # the first six prompts stay below it with their continuation, the others begin above it
VOCAB_SIZE = 256
COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MIXED = ["sliding_attention", "full_attention"]
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=128,
)
# name -> (transformers' model_type, what differs from COMMON)
CASES = {
    "llama2": ("llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "llama3": ("llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "mistral": ("mistral", dict(sliding_window=24)),
    "qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=40, max_window_layers=1)),
    "qwen2_yarn": ("qwen2", dict(rope_parameters=YARN_ROPE | dict(truncate=True))),
    "qwen3": ("qwen3", dict(head_dim=24)),
    "gemma2": (
        "gemma2",
        dict(
            sliding_window=24,
            layer_types=MIXED,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=1.0,
            query_pre_attn_scalar=24,
        ),
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            sliding_window=24,
            layer_types=MIXED,
            query_pre_attn_scalar=24,
            rope_parameters={
                "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
            },
        ),
    ),
    "phi3": (
        "phi3",
        dict(
            hidden_size=64,
            sliding_window=40,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
    ),
    "phi3_longrope": (
        "phi3",
        dict(
            hidden_size=64,
            original_max_position_embeddings=SHORT,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                short_factor=[1.0 + 0.05 * i for i in range(8)],
                long_factor=[1.0 + 0.5 * i for i in range(8)],
                original_max_position_embeddings=SHORT,
            ),
        ),
    ),
    "phi4_mini": (
        "phi3",
        dict(
            hidden_size=64,
            tie_word_embeddings=True,
            original_max_position_embeddings=SHORT,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.75,
                short_factor=[1.0] * 6,
                long_factor=[1.0 + 0.5 * i for i in range(6)],
            ),
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True),
    ),
    "qwen3_moe_unnormalised": (
        "qwen3_moe",
        dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=3, norm_topk_prob=False),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=24)),
    "olmo2": ("olmo2", dict()),
    "olmo3": (
        "olmo3",
        dict(
            num_hidden_layers=4,
            sliding_window=24,
            rope_parameters={
                "full_attention": YARN_ROPE | dict(truncate=True),  # transformers never sees another value here
                "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
            },
        ),
    ),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, tie_word_embeddings=True)),
    "granite": (
        "granite",
        dict(
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.5,
            logits_scaling=4.0,
            tie_word_embeddings=True,
        ),
    ),
    "glm4": ("glm4", dict()),
    "gemma3_with_images": (
        "gemma3",
        dict(
            text_config=COMMON | dict(sliding_window=24, layer_types=MIXED, query_pre_attn_scalar=24),
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ),
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            sliding_window=24,
            layer_types=MIXED,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=YARN_ROPE,
        ),
    ),
}


def hashed(seed: int, size: int) -> np.ndarray:
    """Uniform float32 in [-0.5, 0.5) from a counter (splitmix64), the same on every machine."""
    with np.errstate(over="ignore"):
        x = (np.arange(1, size + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)


def fill(seed: int, names_and_shapes: dict[str, list[int]], gemma: bool) -> dict[str, np.ndarray]:
    """The weights of a case: standard deviation 0.3, so that greedy text does not repeat one token; norms around 1.

    Gemma's norms are stored less 1, and its embeddings are scaled up after they were read, so they start smaller.
    """
    weights = {}
    for number, (name, shape) in enumerate(sorted(names_and_shapes.items())):
        values = hashed(seed * 1000 + number, int(np.prod(shape))).reshape(shape)
        if "norm" in name:
            weights[name] = values if gemma else values + np.float32(1)
        else:
            weights[name] = values * np.float32(0.125 if gemma and "embed" in name else 12**0.5 * 0.3)
    return weights


def prompts(seed: int, vocab_size: int) -> list[list[int]]:
    """One prompt of each length."""
    return [
        ((hashed(seed * 1000 + 900 + i, length) + 0.5) * vocab_size).astype(int).tolist()
        for i, length in enumerate(PROMPT_LENGTHS)
    ]


def write_model(case: str, seed: int, folder: str) -> tuple:
    """Writes a case's checkpoint to a folder: its config, the shapes of its tensors, and the model that was read."""
    import torch  # pyright: ignore[reportMissingImports]  own environment
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]  own environment

    model_type, changes = CASES[case]
    config = AutoConfig.for_model(model_type, **(changes if "text_config" in changes else COMMON | changes))
    # The names and shapes are those of a folder that transformers writes, and it reads the weights from there
    file = f"{folder}/model.safetensors"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    with safe_open(file, "np") as stored:
        shapes = {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}
    save_file(fill(seed, shapes, model_type.startswith("gemma")), file, metadata={"format": "pt"})
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return config, shapes, AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def compute(case: str, seed: int) -> dict[str, np.ndarray]:
    """Config, tensor shapes, logits at the last token of every prompt, and greedy continuations."""
    import torch  # pyright: ignore[reportMissingImports]  own environment

    with tempfile.TemporaryDirectory() as folder:
        config, shapes, model = write_model(case, seed, folder)
    all_logits, greedy = [], []
    with torch.no_grad():
        for prompt in prompts(seed, VOCAB_SIZE):
            tokens = torch.tensor([prompt])
            all_logits.append(model(tokens, use_cache=False).logits[0].numpy())
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            greedy.append(out[0, len(prompt) :].numpy().astype(np.int32))
    return {
        "config": np.array(config.to_json_string(use_diff=True)),
        "shapes": np.array(json.dumps(shapes)),
        "seed": np.array(seed),
        "last_logits": np.stack([logits[-1] for logits in all_logits]),
        "logits": all_logits[-1][::25],  # of the longest prompt
        "greedy": np.stack(greedy),
    }


def mxfp4(seed: int) -> dict[str, np.ndarray]:
    """Packed weights of two experts, 64 inputs and 6 outputs, and what transformers unpacks them to."""
    import torch  # pyright: ignore[reportMissingImports]  own environment
    from transformers.integrations.mxfp4 import (  # pyright: ignore[reportMissingImports]  own environment
        convert_moe_packed_tensors,
    )

    blocks = ((hashed(seed * 1000 + 990, 2 * 6 * 2 * 16) + 0.5) * 256).astype(np.uint8).reshape(2, 6, 2, 16)
    scales = (118 + (hashed(seed * 1000 + 991, 2 * 6 * 2) + 0.5) * 12).astype(np.uint8).reshape(2, 6, 2)
    weights = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16)
    return {"blocks": blocks, "scales": scales, "weights": weights.float().numpy()}


def default_configs() -> dict[str, dict]:
    """Every model_type's config as transformers fills it where a file says nothing."""
    from transformers import AutoConfig  # pyright: ignore[reportMissingImports]  own environment

    types = sorted({model_type for model_type, _ in CASES.values()})
    return {name: json.loads(AutoConfig.for_model(name).to_json_string(use_diff=True)) for name in types}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "goldens")
    parser.add_argument("cases", nargs="*", default=list(CASES))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "defaults.json").write_text(json.dumps(default_configs(), indent=1) + "\n")
    np.savez_compressed(options.output / "mxfp4.npz", allow_pickle=False, **mxfp4(options.seed))
    for case in options.cases:
        golden = compute(case, options.seed)
        np.savez_compressed(options.output / f"{case}.npz", allow_pickle=False, **golden)
        print(case, "logits", golden["last_logits"].min(), "to", golden["last_logits"].max())
        print("   ", golden["greedy"][0, :24].tolist())


if __name__ == "__main__":
    main()
