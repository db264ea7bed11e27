"""The decoder families: what their config.json means, and what their checkpoints call each tensor."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

from paged_jax.models.config import DecoderConfig
from paged_jax.models.experts import GATE_LIMIT, GATE_SHARPNESS
from paged_jax.models.rope import KINDS, Rope

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
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
REQUIRED = object()


@dataclass(frozen=True)
class Fields:
    """A config.json, read with errors that name it.

    Args:
        values: what it holds.
        source: its path.
        run_length: the longest context in tokens that will be run; None: `max_position_embeddings`.
    """

    values: dict[str, Any]
    source: str = "config.json"
    run_length: int | None = None

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The field, or the default where it is missing or null."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(
                f"{self.source} has no {name!r}, which {self.values.get('model_type')!r} models need: add it, or "
                "download the checkpoint's config.json again."
            )
        return default

    def fail(self, name: str, rule: str) -> NoReturn:
        """Raises over the value of one field."""
        raise ValueError(f"{self.source} has {name}={self.values.get(name)!r}: {rule}")


def read_rope(fields: Fields, parameters: dict[str, Any], theta: float) -> Rope:
    """A rotary embedding from `rope_parameters` (or from `rope_scaling` and `rope_theta`)."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in KINDS:
        name = "rope_parameters" if "rope_parameters" in fields.values else "rope_scaling"
        fields.fail(name, f"its rope_type {kind!r} is not supported; {', '.join(KINDS)} are.")
    theta = float(parameters.get("rope_theta", theta))
    share = float(parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)))
    if kind == "default":
        return Rope(theta, rotary_share=share)
    length = fields.get("max_position_embeddings", 2048)
    original = int(
        parameters.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings", length)
    )
    factor = float(parameters.get("factor") or length / original)
    magnitude, lane_factors = 1.0, ()
    if kind == "yarn":
        magnitude = _yarn_magnitude(parameters, factor)
    if kind == "longrope":
        # All tokens of a context must turn alike, so the set is chosen once, by the longest context.
        name = "long_factor" if (fields.run_length or length) > original else "short_factor"
        lane_factors = tuple(map(float, parameters.get(name) or ()))
        head_dim = fields.get("head_dim", fields.get("hidden_size") // fields.get("num_attention_heads"))
        if len(lane_factors) != int(head_dim * share) // 2:
            where = "rope_parameters" if "rope_parameters" in fields.values else "rope_scaling"
            fields.fail(where, f"longrope needs {int(head_dim * share) // 2} numbers in {name}.")
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        magnitude = float(parameters.get("attention_factor") or magnitude)
    return Rope(
        theta,
        kind,
        factor=factor,
        original_length=original,
        low_frequency_factor=float(parameters.get("low_freq_factor") or 1.0),
        high_frequency_factor=float(parameters.get("high_freq_factor") or 4.0),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        lane_factors=lane_factors,
        magnitude=magnitude,
        rotary_share=share,
    )


def _yarn_magnitude(parameters: dict[str, Any], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")

    def magnitude(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    return magnitude(float(scale)) / magnitude(float(scale_all)) if scale and scale_all else magnitude(1.0)


def read_ropes(fields: Fields) -> tuple[Rope, Rope | None]:
    """The rotary embedding of all layers, and of the layers with a window where that differs.

    Transformers 5 writes `rope_parameters`, for Gemma 3 one for each kind of layer; older files have `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    theta = float(fields.get("rope_theta", 10000.0))
    parameters = fields.get("rope_parameters", None) or fields.get("rope_scaling", None) or {}
    if "full_attention" in parameters:
        ropes = [read_rope(fields, parameters[kind], theta) for kind in ("full_attention", "sliding_attention")]
        return ropes[0], ropes[1]
    local = fields.get("rope_local_base_freq", None)
    return read_rope(fields, parameters, theta), None if local is None else Rope(float(local))


def read_windows(fields: Fields, is_local: Callable[[int], bool]) -> tuple[int | None, ...]:
    """One window a layer, from `layer_types` where the file has it."""
    num_layers, window = fields.get("num_hidden_layers"), fields.get("sliding_window", None)
    if window is None:
        return ()
    kinds = fields.get("layer_types", None)
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != num_layers:
            fields.fail("layer_types", f"it must name full_attention or sliding_attention for {num_layers} layers.")
        local = [kind == "sliding_attention" for kind in kinds]
    else:
        local = [is_local(layer) for layer in range(num_layers)]
    return tuple(window if here else None for here in local) if any(local) else ()


def base_config(fields: Fields, **changes) -> DecoderConfig:
    """What every family's config.json says in the same words."""
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    rope, local_rope = read_ropes(fields)
    activation = fields.get("hidden_activation", None) or fields.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        name = "hidden_activation" if "hidden_activation" in fields.values else "hidden_act"
        fields.fail(name, f"supported are {', '.join(ACTIVATIONS)}.")
    common = dict(
        vocab_size=fields.get("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.get("intermediate_size"),
        num_layers=fields.get("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", heads),
        head_dim=fields.get("head_dim", hidden // heads),
        max_length=fields.run_length or fields.get("max_position_embeddings", 2048),
        norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATIONS[activation],
        rope=rope,
        local_rope=local_rope,
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )
    return DecoderConfig(**(common | changes))


def llama(fields: Fields) -> DecoderConfig:
    """Llama 2 and 3."""
    bias = bool(fields.get("attention_bias", False))
    return base_config(fields, qkv_bias=bias, output_bias=bias, mlp_bias=bool(fields.get("mlp_bias", False)))


def mistral(fields: Fields) -> DecoderConfig:
    """Mistral: every layer has the window, where there is one."""
    return base_config(fields, windows=read_windows(fields, lambda layer: True))


def _qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    if not fields.get("use_sliding_window", False):
        return ()
    first = fields.get("max_window_layers")
    return read_windows(fields, lambda layer: layer >= first)


def qwen2(fields: Fields) -> DecoderConfig:
    """Qwen 2 and 2.5: bias on the query, key and value projections."""
    return base_config(fields, qkv_bias=True, windows=_qwen_windows(fields))


def qwen3(fields: Fields) -> DecoderConfig:
    """Qwen 3: RMS norm over each query and key head."""
    bias = bool(fields.get("attention_bias", False))
    return base_config(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=_qwen_windows(fields),
    )


def _gemma(fields: Fields, is_local: Callable[[int], bool], **changes) -> DecoderConfig:
    if fields.get("use_bidirectional_attention", False):
        fields.fail("use_bidirectional_attention", "only causal decoders are supported.")
    bias = bool(fields.get("attention_bias", False))
    return base_config(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        unit_offset_norm=True,
        post_norms=True,
        attention_scale=float(fields.get("query_pre_attn_scalar")) ** -0.5,
        attention_soft_cap=fields.get("attn_logit_softcapping", None),
        logit_soft_cap=fields.get("final_logit_softcapping", None),
        embedding_scale=fields.get("hidden_size") ** 0.5,
        windows=read_windows(fields, is_local),
        **changes,
    )


def gemma2(fields: Fields) -> DecoderConfig:
    """Gemma 2: every other layer is local, scores and logits are soft-capped."""
    return _gemma(fields, lambda layer: layer % 2 == 0)


def gemma3(fields: Fields) -> DecoderConfig:
    """Gemma 3 (text): five local layers to one global, QK norm, a rotary embedding for each kind."""
    pattern = fields.get("sliding_window_pattern")
    return _gemma(fields, lambda layer: (layer + 1) % pattern != 0, qk_norm=True)


def phi3(fields: Fields) -> DecoderConfig:
    """Phi 3: fused projections in the checkpoint, otherwise Llama's layer."""
    return base_config(fields, windows=read_windows(fields, lambda layer: True))


def gpt_oss(fields: Fields) -> DecoderConfig:
    """gpt-oss: experts, sinks, every other layer local."""
    for name, value in (("swiglu_alpha", GATE_SHARPNESS), ("swiglu_limit", GATE_LIMIT)):
        if fields.get(name, value) != value:
            fields.fail(name, f"only {value} is supported.")
    return base_config(
        fields,
        qkv_bias=bool(fields.get("attention_bias")),
        output_bias=bool(fields.get("attention_bias")),
        sinks=True,
        num_experts=fields.get("num_local_experts"),
        experts_per_token=fields.get("num_experts_per_tok"),
        windows=read_windows(fields, lambda layer: layer % 2 == 0),
    )


class Place(NamedTuple):
    """Rows of one tensor of a checkpoint."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Args:
        config: reads config.json.
        defaults: what transformers assumes for keys that the file leaves out, where it differs from Llama.
        layer_names: our names of a layer's tensors -> the checkpoint's, where they differ from Llama's.
        fused: tensors of the checkpoint that hold several of ours, one below the other.
    """

    config: Callable[[Fields], DecoderConfig]
    defaults: dict[str, Any] = field(default_factory=dict)
    layer_names: dict[str, str] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, fields: Fields) -> DecoderConfig:
        """The decoder that a config.json describes."""
        return self.config(replace(fields, values=self.defaults | fields.values))

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
PHI3_FUSED = {
    "self_attn.qkv_proj.weight": ("attn.q.weight", "attn.k.weight", "attn.v.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate.weight", "mlp.up.weight"),
}
GPT_OSS_NAMES = {
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.bias",
    "mlp.gate_up": "mlp.experts.gate_up_proj",
    "mlp.gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.down": "mlp.experts.down_proj",
    "mlp.down_bias": "mlp.experts.down_proj_bias",
}
GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA2_DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3_DEFAULTS = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
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
FAMILIES = {
    "llama": Family(llama),
    "mistral": Family(mistral, {"sliding_window": 4096}),
    "qwen2": Family(qwen2, {"sliding_window": 4096, "max_window_layers": 28}),
    "qwen3": Family(qwen3, {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128}),
    "gemma2": Family(gemma2, GEMMA_DEFAULTS | GEMMA2_DEFAULTS, GEMMA_NAMES),
    "gemma3_text": Family(gemma3, GEMMA_DEFAULTS | GEMMA3_DEFAULTS, GEMMA_NAMES),
    "phi3": Family(phi3, {"rms_norm_eps": 1e-5}, fused=PHI3_FUSED),
    "gpt_oss": Family(gpt_oss, GPT_OSS_DEFAULTS, GPT_OSS_NAMES),
}


def find_family(fields: Fields) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: its `model_type` is unknown, or the weights are quantised.
    """
    model_type = fields.get("model_type", None)
    if model_type not in FAMILIES:
        fields.fail("model_type", f"supported are {', '.join(sorted(FAMILIES))}.")
    quantization = fields.get("quantization_config", None)
    if quantization and not (model_type == "gpt_oss" and quantization.get("quant_method") == "mxfp4"):
        fields.fail("quantization_config", "only gpt_oss in mxfp4 may be quantised; use unquantised weights.")
    return FAMILIES[model_type]
