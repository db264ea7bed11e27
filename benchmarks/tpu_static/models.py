"""The shapes of models that people run: their attention, and the cells of the table for each."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.tpu_static.cases import DTYPES, StaticCase
from paged_jax.models.families import find_family
from paged_jax.models.fields import Fields

# Fields that families require and attention ignores.
COMMON = {"vocab_size": 1, "intermediate_size": 1, "num_hidden_layers": 12}


class Attention(NamedTuple):
    """The attention of a kind of layers, on one device."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: bool = False

    def __str__(self) -> str:
        options = (f" window {self.window}" if self.window else "") + (" sinks" if self.sinks else "")
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_dim}{options}"


def published(model_type: str, num_heads: int, num_kv_heads: int, devices: int = 1, **config: Any) -> list[Attention]:
    """The kinds of layers of a model, as its family reads the fields of its config.json."""
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    fields = Fields(COMMON | {"model_type": model_type} | heads | config)
    decoder = find_family(fields).read(fields)
    sizes = decoder.num_heads // devices, decoder.num_kv_heads // devices, decoder.head_dim
    return [Attention(*sizes, window, decoder.sinks) for window in dict.fromkeys(decoder.windows or (None,))]


MODELS = {
    "Qwen2.5 0.5B": published("qwen2", 14, 2, hidden_size=896),
    "Qwen2.5 7B": published("qwen2", 28, 4, hidden_size=3584),
    "Qwen2.5 14B": published("qwen2", 40, 8, hidden_size=5120),
    "Qwen3 0.6B": published("qwen3", 16, 8, hidden_size=1024),
    "Qwen3 32B": published("qwen3", 64, 8, hidden_size=5120),
    "Llama 2 7B": published("llama", 32, 32, hidden_size=4096),
    "Llama 3 8B": published("llama", 32, 8, hidden_size=4096),
    "Llama 3 70B on 8 devices": published("llama", 64, 8, hidden_size=8192, devices=8),
    "Mistral 7B": published("mistral", 32, 8, hidden_size=4096, sliding_window=None),
    "Phi-3-mini": published("phi3", 32, 32, hidden_size=3072),
    "Gemma 7B": [Attention(16, 16, 256)],  # of a family that is not among ours
    "Gemma 3 1B": published("gemma3_text", 4, 1, hidden_size=1152, head_dim=256, sliding_window=512),
    "Gemma 3 27B": published("gemma3_text", 32, 16, hidden_size=5376, head_dim=128, sliding_window=1024),
    "gpt-oss": published("gpt_oss", 64, 8, hidden_size=2880, num_local_experts=32, num_experts_per_tok=4),
    "GLM-4": published("glm4", 32, 2, hidden_size=4096),
    "Falcon 7B": [Attention(71, 1, 64)],  # nor is Falcon's
}

# Lengths of a step, and how many of each row's tokens are new.
STEPS = {
    f"decode {batch} on {context}": ((context,) * batch, (1,) * batch)
    for batch in (32, 4)
    for context in (300, 2000, 16000)
} | {
    "prefill 512 on 4096": ((4096,), (512,)),
    "prefill 200 on 900": ((900,), (200,)),
    "prefill 16 prompts of 32": ((32,) * 16, (32,) * 16),
}


def model_cases(text: str = "") -> dict[str, StaticCase]:
    """The cells of the models that have the text in their names; models of equal attention share theirs."""
    kinds = dict.fromkeys(kind for model, kinds in MODELS.items() if text.lower() in model.lower() for kind in kinds)
    cases = [
        StaticCase(
            f"{step}, {kind}, {dtype}, page {page_size}", lengths, new_tokens, kind[:2], kind.head_dim, page_size,
            DTYPES[dtype], window=kind.window, sinks=kind.sinks, prefill_tokens=512 if max(new_tokens) > 1 else None,
        )
        for kind in kinds
        for dtype in DTYPES
        for page_size in (16, 64)
        for step, (lengths, new_tokens) in STEPS.items()
    ]  # fmt: skip
    return {case.name: case for case in cases}
