"""What the config.json of each decoder family means, as a `DecoderConfig`."""

from collections.abc import Callable
from dataclasses import replace

from paged_jax.models.config import DecoderConfig
from paged_jax.models.experts import GATE_LIMIT, GATE_SHARPNESS
from paged_jax.models.fields import Fields
from paged_jax.models.rope import Rope
from paged_jax.models.rope_fields import read_ropes

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
MAX_LAYERS = 10_000  # what says more is damaged


def read_windows(fields: Fields, is_local: Callable[[int], bool]) -> tuple[int | None, ...]:
    """One window a layer, from `layer_types` where the file has it."""
    num_layers, window = _num_layers(fields), fields.integer("sliding_window", None)
    if window is None:
        return ()
    kinds = fields.get("layer_types", None)
    if kinds is not None:
        known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
        if not known or len(kinds) != num_layers:
            fields.fail("layer_types", f"it must name full_attention or sliding_attention for {num_layers} layers.")
        local = [kind == "sliding_attention" for kind in kinds]
    else:
        local = [is_local(layer) for layer in range(num_layers)]
    return tuple(window if here else None for here in local) if any(local) else ()


def _num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", most=MAX_LAYERS)


def base_config(fields: Fields, **changes) -> DecoderConfig:
    """What every family's config.json says in the same words."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    rope, local_rope = read_ropes(fields)
    name = "hidden_act" if fields.get("hidden_activation", None) is None else "hidden_activation"
    activation = fields.text(name, "silu")
    if activation not in ACTIVATIONS:
        fields.fail(name, f"supported are {', '.join(ACTIVATIONS)}.")
    head_dim = fields.integer("head_dim", None)
    if head_dim is None and hidden < heads:
        fields.fail("hidden_size", f"it must be at least num_attention_heads={heads}.")
    head_dim, num_kv_heads = head_dim or hidden // heads, fields.integer("num_key_value_heads", heads)
    if heads % num_kv_heads:
        fields.fail("num_key_value_heads", f"it must divide num_attention_heads={heads}.")
    if any(int(head_dim * turning.rotary_share) % 2 for turning in (rope, local_rope) if turning):
        fields.fail("head_dim", f"an even number of the {head_dim} lanes of a head must turn.")
    common = dict(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=_num_layers(fields),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_length=fields.run_length or fields.integer("max_position_embeddings", 2048),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[activation],
        rope=rope,
        local_rope=local_rope,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
    )
    return DecoderConfig(**(common | changes))


def llama(fields: Fields) -> DecoderConfig:
    """Llama 2 and 3."""
    bias = fields.flag("attention_bias", False)
    return base_config(fields, qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def smollm3(fields: Fields) -> DecoderConfig:
    """SmolLM 3: every fourth layer turns nothing; with windows, these layers have them."""
    num_layers, bias = _num_layers(fields), fields.flag("attention_bias", False)
    interval = fields.integer("no_rope_layer_interval", 4)
    turned = fields.get("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(num_layers)])
    if not isinstance(turned, list) or len(turned) < num_layers or not all(flag in (0, 1) for flag in turned):
        fields.fail("no_rope_layers", f"it must have a 0 (no RoPE) or a 1 for each of {num_layers} layers.")
    return base_config(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        unturned_layers=tuple(layer for layer in range(num_layers) if not turned[layer]),
        windows=_optional_windows(fields, lambda layer: not turned[layer]),
    )


def granite(fields: Fields) -> DecoderConfig:
    """Granite 3: factors on the embeddings, the scores, what a layer adds, and the logits."""
    bias = fields.flag("attention_bias", False)
    return base_config(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0, positive=True),
    )


def olmo2(fields: Fields) -> DecoderConfig:
    """OLMo 2: norms only after attention and MLP, and one over all query heads, and all key heads."""
    bias = fields.flag("attention_bias", False)
    return base_config(
        fields, qkv_bias=bias, output_bias=bias, pre_norms=False, post_norms=True, qk_norm=True, qk_norm_of_all=True
    )


def olmo3(fields: Fields) -> DecoderConfig:
    """OLMo 3: three local layers to one global; only the global ones are lengthened."""
    config = replace(olmo2(fields), windows=read_windows(fields, lambda layer: (layer + 1) % 4 != 0))
    return config if config.local_rope else replace(config, local_rope=Rope(config.rope.theta))


def glm4(fields: Fields) -> DecoderConfig:
    """GLM-4: half of each head turns, neighbouring lanes against each other; norms after as well as before."""
    config = base_config(fields, qkv_bias=fields.flag("attention_bias", True), post_norms=True)
    return replace(config, rope=replace(config.rope, interleaved=True))


def mistral(fields: Fields) -> DecoderConfig:
    """Mistral: every layer has the window, where there is one."""
    return base_config(fields, windows=read_windows(fields, lambda layer: True))


def mixtral(fields: Fields) -> DecoderConfig:
    """Mixtral: Mistral with experts."""
    return replace(
        mistral(fields),
        num_experts=fields.integer("num_local_experts"),
        experts_per_token=_experts_per_token(fields, "num_local_experts"),
    )


def _experts_per_token(fields: Fields, total: str) -> int:
    chosen = fields.integer("num_experts_per_tok")
    if chosen > fields.integer(total):
        fields.fail("num_experts_per_tok", f"it must be at most {total}={fields.integer(total)}.")
    return chosen


def _optional_windows(fields: Fields, is_local: Callable[[int], bool]) -> tuple[int | None, ...]:
    return read_windows(fields, is_local) if fields.flag("use_sliding_window", False) else ()


def _upper_windows(fields: Fields) -> tuple[int | None, ...]:
    return _optional_windows(fields, lambda layer: layer >= fields.integer("max_window_layers", least=0))


def qwen2(fields: Fields) -> DecoderConfig:
    """Qwen 2 and 2.5: bias on the query, key and value projections."""
    return base_config(fields, qkv_bias=True, windows=_upper_windows(fields))


def qwen3(fields: Fields) -> DecoderConfig:
    """Qwen 3: RMS norm over each query and key head."""
    bias = fields.flag("attention_bias", False)
    return base_config(fields, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=_upper_windows(fields))


def qwen3_moe(fields: Fields) -> DecoderConfig:
    """Qwen 3 with experts in every layer."""
    if fields.get("mlp_only_layers", []) != []:
        fields.fail("mlp_only_layers", "only models with experts in every layer are supported.")
    if fields.integer("decoder_sparse_step", 1) != 1:
        fields.fail("decoder_sparse_step", "only models with experts in every layer are supported.")
    total = "num_experts" if "num_experts" in fields.values else "num_local_experts"  # before and after transformers 5
    bias = fields.flag("attention_bias", False)
    return base_config(
        fields,
        intermediate_size=fields.integer("moe_intermediate_size"),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        num_experts=fields.integer(total),
        experts_per_token=_experts_per_token(fields, total),
        shares_of_all_experts=not fields.flag("norm_topk_prob", False),
        windows=_optional_windows(fields, lambda layer: True),
    )


def _gemma(fields: Fields, is_local: Callable[[int], bool], **changes) -> DecoderConfig:
    if fields.flag("use_bidirectional_attention", False):
        fields.fail("use_bidirectional_attention", "only causal decoders are supported.")
    bias = fields.flag("attention_bias", False)
    return base_config(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        unit_offset_norm=True,
        post_norms=True,
        attention_scale=fields.number("query_pre_attn_scalar", positive=True) ** -0.5,
        attention_soft_cap=fields.number("attn_logit_softcapping", None, positive=True),
        logit_soft_cap=fields.number("final_logit_softcapping", None, positive=True),
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        windows=read_windows(fields, is_local),
        **changes,
    )


def gemma2(fields: Fields) -> DecoderConfig:
    """Gemma 2: every other layer is local, scores and logits are soft-capped."""
    return _gemma(fields, lambda layer: layer % 2 == 0)


def gemma3(fields: Fields) -> DecoderConfig:
    """Gemma 3 (text): five local layers to one global, QK norm, a rotary embedding for each kind."""
    pattern = fields.integer("sliding_window_pattern")
    return _gemma(fields, lambda layer: (layer + 1) % pattern != 0, qk_norm=True)


def phi3(fields: Fields) -> DecoderConfig:
    """Phi 3 and 4: fused projections in the checkpoint, otherwise Llama's layer."""
    name = "rope_parameters" if fields.get("rope_parameters", None) else "rope_scaling"
    if "yarn" in (fields.part(name).get("type", None), fields.part(name).get("rope_type", None)):
        # The first files of Phi 3 say yarn where they mean longrope
        renamed = fields.part(name).values | {"rope_type": "longrope"}
        fields = replace(fields, values=fields.values | {name: renamed})
    return base_config(fields, windows=read_windows(fields, lambda layer: True))


def gpt_oss(fields: Fields) -> DecoderConfig:
    """gpt-oss: experts, sinks, every other layer local."""
    for name, value in (("swiglu_alpha", GATE_SHARPNESS), ("swiglu_limit", GATE_LIMIT)):
        if fields.get(name, value) != value:
            fields.fail(name, f"only {value} is supported.")
    bias = fields.flag("attention_bias", True)
    return base_config(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        num_experts=fields.integer("num_local_experts"),
        experts_per_token=_experts_per_token(fields, "num_local_experts"),
        expert_bias=True,
        clipped_gates=True,
        windows=read_windows(fields, lambda layer: layer % 2 == 0),
    )
