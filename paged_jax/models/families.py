"""The decoder families: what their config.json means, and what their checkpoints call each tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from paged_jax.models import family_configs as configs
from paged_jax.models.config import DecoderConfig
from paged_jax.models.fields import Fields

# Our name of a tensor (within its layer) -> the name in Llama checkpoints (within model.layers.N).
LLAMA_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "attn.sinks": "self_attn.sinks",
} | {
    f"{ours}.{leaf}": f"{theirs}.{leaf}"
    for leaf in ("weight", "bias")
    for ours, theirs in {
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.out": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }.items()
}
TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


class Place(NamedTuple):
    """Rows of one tensor of a checkpoint."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Args:
        title: what people call it.
        config: reads config.json.
        defaults: what transformers assumes for keys that the file leaves out, where it differs from Llama.
        layer_names: our names of a layer's tensors -> the checkpoint's, where they differ from Llama's.
        fused: tensors of the checkpoint that hold several of ours, one below the other.
        text_part: config.json describes several models, and the text model under `text_config`.
        other_parts: beginnings of the names of tensors that belong to the other models.
    """

    title: str
    config: Callable[[Fields], DecoderConfig]
    defaults: dict[str, Any] = field(default_factory=dict)
    layer_names: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    text_part: bool = False
    other_parts: tuple[str, ...] = ()

    def read(self, fields: Fields) -> DecoderConfig:
        """The decoder that a config.json describes."""
        fields = self.text_fields(fields)
        return self.config(replace(fields, values=self.defaults | fields.values))

    def text_fields(self, fields: Fields) -> Fields:
        """What a config.json says of the text model, where it describes several."""
        if not self.text_part or "text_config" not in fields.values:
            return fields
        shared = {name: value for name, value in fields.values.items() if not name.endswith("_config")}
        return replace(fields, values=shared | fields.part("text_config").values)

    def place(self, paths_and_rows: dict[str, int]) -> dict[str, Place]:
        """Where a checkpoint keeps each of our tensors.

        Args:
            paths_and_rows: our tensors, such as `layers.0.attn.q.weight`, and the size of their first axis.
        """
        places: dict[str, Place] = {}
        rows: dict[str, int] = {}
        for path in sorted(paths_and_rows, key=self._part):
            name = self._file_name(path)
            start = rows.get(name, 0)
            rows[name] = start + paths_and_rows[path]
            places[path] = Place(name, start, rows[name])
        return places

    def _file_name(self, path: str) -> str:
        if not path.startswith("layers."):
            return TOP[path]
        _, layer, name = path.split(".", 2)
        for file_name, names in self.fused.items():
            if name in names:
                return f"model.layers.{layer}.{file_name}"
        return f"model.layers.{layer}.{(LLAMA_LAYER | self.layer_names)[name]}"

    def _part(self, path: str) -> int:
        """Where a tensor stands within the fused one that holds it."""
        name = path.split(".", 2)[-1]
        return next((names.index(name) for names in self.fused.values() if name in names), 0)


GEMMA_NAMES = {
    "attn_post_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "pre_feedforward_layernorm.weight",
    "mlp_post_norm.weight": "post_feedforward_layernorm.weight",
}
OLMO_NAMES = {
    "attn_post_norm.weight": "post_attention_layernorm.weight",
    "mlp_post_norm.weight": "post_feedforward_layernorm.weight",
}
GLM4_NAMES = {
    "attn_post_norm.weight": "post_self_attn_layernorm.weight",
    "mlp_post_norm.weight": "post_mlp_layernorm.weight",
}
GATE_UP_FUSED = {"mlp.gate_up_proj.weight": ("mlp.gate.weight", "mlp.up.weight")}
PHI3_FUSED = {"self_attn.qkv_proj.weight": ("attn.q.weight", "attn.k.weight", "attn.v.weight")} | GATE_UP_FUSED
GPT_OSS_NAMES = {
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
    "mlp.gate_up": "mlp.experts.gate_up_proj",
    "mlp.gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.down": "mlp.experts.down_proj",
    "mlp.down_bias": "mlp.experts.down_proj_bias",
}
MIXTRAL_NAMES = {
    "mlp.router.weight": "block_sparse_moe.gate.weight",
    "mlp.gate_up": "block_sparse_moe.experts.gate_up",
    "mlp.down": "block_sparse_moe.experts.down",
}
QWEN3_MOE_NAMES = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.gate_up": "mlp.experts.gate_up",
    "mlp.down": "mlp.experts.down",
}
GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3_DEFAULTS = GEMMA_DEFAULTS | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}
GPT_OSS_DEFAULTS = {
    "head_dim": 64,
    "attention_bias": True,
    "sliding_window": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
GLM4_DEFAULTS = {"head_dim": 128, "rms_norm_eps": 1.5625e-07, "partial_rotary_factor": 0.5}
OLMO3_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "sliding_window": 4096}
FAMILIES = {
    "llama": Family("Llama 2, 3 and 3.2 (text)", configs.llama),
    "mistral": Family("Mistral", configs.mistral, {"sliding_window": 4096}),
    "mixtral": Family("Mixtral", configs.mixtral, {"rms_norm_eps": 1e-5, "rope_theta": 1e6}, MIXTRAL_NAMES),
    "qwen2": Family("Qwen 2 and 2.5", configs.qwen2, QWEN_DEFAULTS),
    "qwen3": Family("Qwen 3", configs.qwen3, QWEN_DEFAULTS | {"head_dim": 128}),
    "qwen3_moe": Family("Qwen 3 with experts", configs.qwen3_moe, {"sliding_window": 4096}, QWEN3_MOE_NAMES),
    "gemma2": Family("Gemma 2", configs.gemma2, GEMMA2_DEFAULTS, GEMMA_NAMES),
    "gemma3_text": Family("Gemma 3, text", configs.gemma3, GEMMA3_DEFAULTS, GEMMA_NAMES),
    "gemma3": Family(
        "Gemma 3, the text part of files that see images",
        configs.gemma3,
        GEMMA3_DEFAULTS,
        GEMMA_NAMES,
        text_part=True,
        other_parts=("vision_tower.", "multi_modal_projector."),
    ),
    "olmo2": Family("OLMo 2", configs.olmo2, {"rms_norm_eps": 1e-5}, OLMO_NAMES),
    "olmo3": Family("OLMo 3", configs.olmo3, OLMO3_DEFAULTS, OLMO_NAMES),
    "smollm3": Family("SmolLM 3", configs.smollm3, {"rope_theta": 2e6, "tie_word_embeddings": True}),
    "granite": Family("Granite 3", configs.granite),
    "glm4": Family("GLM-4", configs.glm4, GLM4_DEFAULTS, GLM4_NAMES, GATE_UP_FUSED),
    "phi3": Family("Phi 3, 3.5 and 4", configs.phi3, {"rms_norm_eps": 1e-5}, fused=PHI3_FUSED),
    "gpt_oss": Family("gpt-oss", configs.gpt_oss, GPT_OSS_DEFAULTS, GPT_OSS_NAMES),
}


def find_family(fields: Fields) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: its `model_type` is unknown.
    """
    model_type = fields.text("model_type", None)
    if model_type not in FAMILIES:
        fields.fail("model_type", f"supported are {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]
