"""The requests of a rollout benchmark, and a model with random weights that serves them."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from paged_jax import models
from paged_jax.models import checkpoint

# Finer than what is usual: on a CPU a pass takes longer with every token, so that these draw 1.07 times as many tokens.
TOKEN_COUNTS = (8, 16, 24, 32, 48, 64, 256)
VOCAB = 4096
HF_CONFIG = dict(  # 30 million weights, 119 MB in float32
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=VOCAB, hidden_size=512, intermediate_size=1536,
    num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=4, head_dim=128, max_position_embeddings=4096,
    rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True, hidden_act="silu", attention_bias=False,
    bos_token_id=0, eos_token_id=None,
)  # fmt: skip

GEMMA_LIKE = HF_CONFIG | dict(  # of the same size, with a window in six of its seven layers
    model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], sliding_window=128, sliding_window_pattern=7,
    query_pre_attn_scalar=128, rope_local_base_freq=10000.0, hidden_activation="gelu_pytorch_tanh",
)  # fmt: skip


class Load(NamedTuple):
    """Q prompts with n samples each, and how many tokens a sample draws."""

    prompts: list[list[int]]
    limits: np.ndarray  # [Q]
    num_samples: int
    rows: int
    num_shared: int = 0  # tokens with which all prompts begin

    @property
    def num_drawn(self) -> int:
        return int(np.sum(self.limits)) * self.num_samples


def make_checkpoint(folder: pathlib.Path, hf_config: dict[str, Any] = HF_CONFIG) -> None:
    """Writes a model, with weights wide enough that greedy tokens differ from prompt to prompt."""
    config = checkpoint.decoder_config(hf_config)
    params = nnx.state(models.Decoder(config, rngs=nnx.Rngs(0)))
    widened = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    models.save(folder, hf_config, widened)


def _lengths(rng: np.random.Generator, mean_log: float, sigma: float, most: int, count: int) -> np.ndarray:
    return np.clip(rng.lognormal(mean_log, sigma, count).astype(int), 4, most)


def load_of(name: str, seed: int = 0) -> Load:
    """A load by name.

    sharegpt: 64 requests with log-normal lengths, prompts about 35 and answers about 90 tokens in the median.
    prefix: 64 requests that share their first 512 tokens. grpo: 16 prompts, 8 samples each, long-tailed answers.
    """
    rng = np.random.default_rng(seed)
    if name == "sharegpt":
        lengths, limits = _lengths(rng, 3.6, 1.0, 300, 64), _lengths(rng, 4.5, 0.7, 300, 64)
        return Load([rng.integers(0, VOCAB, n).tolist() for n in lengths], limits, 1, 64)
    if name == "prefix":
        common = rng.integers(0, VOCAB, 512).tolist()
        lengths, limits = _lengths(rng, 2.5, 0.6, 60, 64), _lengths(rng, 3.5, 0.5, 100, 64)
        return Load([common + rng.integers(0, VOCAB, n).tolist() for n in lengths], limits, 1, 64, len(common))
    if name == "grpo":
        lengths, limits = _lengths(rng, 4.5, 0.4, 200, 16), _lengths(rng, 4.3, 1.0, 400, 16)
        return Load([rng.integers(0, VOCAB, n).tolist() for n in lengths], limits, 8, 64)
    raise ValueError(f"there is no load {name!r}: use sharegpt, prefix or grpo")
