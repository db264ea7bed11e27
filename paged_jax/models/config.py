"""What distinguishes the families of decoders, as fields of one config."""

from dataclasses import dataclass
from typing import Any

from paged_jax.models.rope import Rope


@dataclass(frozen=True)
class DecoderConfig:
    """The shape and the options of a decoder; hashable, so it can be a static argument.

    Args:
        vocab_size: number of token ids (V).
        hidden_size: width of the residual stream (D).
        intermediate_size: width of the gated MLP, or of one expert (F).
        num_layers: decoder layers (L).
        num_heads: query heads (N).
        num_kv_heads: key and value heads (K); divides `num_heads`.
        head_dim: width of one head (H).
        max_length: longest context in tokens that the weights were trained for.
        norm_eps: added to the mean square in every RMS norm.
        unit_offset_norm: the norms multiply by `1 + weight` instead of `weight` (Gemma).
        qk_norm: RMS norm over each query and key head before RoPE (Qwen 3, Gemma 3).
        qk_norm_of_all: there is one such norm over all query heads together, and one over all key heads (OLMo 2 and 3).
        pre_norms: a norm before attention and before the MLP (all but OLMo 2 and 3).
        post_norms: a norm after attention and after the MLP (Gemma 2 and 3, OLMo 2 and 3, GLM-4).
        activation: of the MLP's gate: "silu" or "gelu_tanh".
        rope: rotary embedding of every layer.
        local_rope: rotary embedding of the layers with a window, where it differs (Gemma 3, OLMo 3).
        unturned_layers: layers without a rotary embedding (SmolLM 3).
        windows: for each layer how many tokens a query sees, itself included, or None for all; empty: no layer has a
            window.
        attention_scale: factor on the scores; None: `head_dim ** -0.5`.
        attention_soft_cap: c in `c * tanh(score / c)`; None: no cap.
        logit_soft_cap: the same for the logits.
        logit_scale: factor on the logits (Granite).
        embedding_scale: factor on the token embeddings (Gemma, Granite).
        residual_scale: factor on what attention and MLP add to the residual stream (Granite).
        qkv_bias: bias of the query, key and value projections (Qwen 2, gpt-oss).
        output_bias: bias of the attention output projection (gpt-oss).
        mlp_bias: bias of the MLP projections.
        sinks: a learned logit for each query head, which takes part in the softmax and has no value (gpt-oss).
        num_experts: experts of each layer's MLP; 0: one plain gated MLP.
        experts_per_token: experts that each token is sent to.
        shares_of_all_experts: the chosen experts are weighted by a softmax over all experts, so that the weights sum to
            less than one (some of Qwen 3); otherwise over the chosen ones.
        expert_bias: bias of the router and of the experts (gpt-oss).
        clipped_gates: the experts' gates are those of gpt-oss instead of `activation`.
        tie_embeddings: the logits use the embedding matrix.

    Raises:
        ValueError: the KV heads do not divide the query heads, or there is not one window for each layer.

    Examples:
        >>> decoder = models.DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2,
        ...                                num_heads=4, num_kv_heads=2, head_dim=8)
        >>> decoder.cache_sizes
        {'num_layers': 2, 'num_kv_heads': 2, 'head_dim': 8, 'windows': ()}
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int = 2048
    norm_eps: float = 1e-6
    unit_offset_norm: bool = False
    qk_norm: bool = False
    qk_norm_of_all: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    activation: str = "silu"
    rope: Rope = Rope()
    local_rope: Rope | None = None
    unturned_layers: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    shares_of_all_experts: bool = False
    expert_bias: bool = False
    clipped_gates: bool = False
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: every KV head "
                "serves the same number of query heads. Change one of them."
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries for num_layers={self.num_layers}: give one for each layer "
                "(None for a layer without a window), or leave it empty."
            )

    @property
    def cache_sizes(self) -> dict[str, Any]:
        """The fields of a `CacheConfig` that follow from the decoder."""
        names = "num_layers", "num_kv_heads", "head_dim", "windows"
        return {name: getattr(self, name) for name in names}

    @property
    def period(self) -> int:
        """The number of layers after which they repeat: 1 if all are alike, L if nothing repeats."""
        kinds = [self.kind(layer) for layer in range(self.num_layers)]
        repeats = (n for n in range(1, self.num_layers) if kinds == (kinds[:n] * self.num_layers)[: self.num_layers])
        return next(repeats, self.num_layers)

    def kind(self, layer: int) -> tuple[int | None, Rope]:
        """What a layer has that others may not: its window and its rotary embedding."""
        return self.window(layer), self.layer_rope(layer)

    def window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None: all."""
        return self.windows[layer] if self.windows else None

    def layer_rope(self, layer: int) -> Rope:
        """The rotary embedding of this layer."""
        if layer in self.unturned_layers:
            return Rope(rotary_share=0.0)
        return self.rope if self.window(layer) is None or self.local_rope is None else self.local_rope
