"""The rotary embeddings that a config.json describes, in the words of transformers 5 and of older files."""

import math

from paged_jax.models.fields import Fields
from paged_jax.models.rope import KINDS, Rope

SPELLINGS = {"su": "longrope"}  # as the first files of Phi 3 have it


def read_ropes(fields: Fields) -> tuple[Rope, Rope | None]:
    """The rotary embedding of all layers, and of the layers with a window where that differs.

    Transformers 5 writes `rope_parameters`, for Gemma 3 and OLMo 3 one for each kind of layer; older files have
    `rope_theta`, `rope_scaling` and `rope_local_base_freq`.
    """
    name = "rope_parameters" if fields.get("rope_parameters", None) else "rope_scaling"
    parameters = fields.part(name)
    if "full_attention" in parameters.values:
        return read_rope(fields, parameters.part("full_attention")), read_rope(
            fields, parameters.part("sliding_attention")
        )
    local = fields.number("rope_local_base_freq", None, positive=True)
    return read_rope(fields, parameters), None if local is None else Rope(local)


def read_rope(fields: Fields, parameters: Fields) -> Rope:
    """One rotary embedding.

    Args:
        fields: the config.json.
        parameters: the object in it that describes the embedding; empty: a plain one.
    """
    name = "rope_type" if "rope_type" in parameters.values else "type"
    kind = parameters.text(name, "default")
    kind = SPELLINGS.get(kind, kind)
    if kind not in KINDS:
        parameters.fail(name, f"this rope_type is not supported; {', '.join(KINDS)} are.")
    theta = parameters.number("rope_theta", None, positive=True) or fields.number("rope_theta", 10000.0, positive=True)
    share = parameters.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0), positive=True)
    if share > 1:
        fields.fail("partial_rotary_factor", "it must be at most 1.")
    if kind == "default":
        return Rope(theta, rotary_share=share)
    length = fields.integer("max_position_embeddings", 2048)
    name = "original_max_position_embeddings"
    original = fields.integer(name, None) or parameters.integer(name, length)
    factor = parameters.number("factor", None, positive=True) or length / original
    magnitude, lane_factors = 1.0, ()
    if kind == "yarn":
        magnitude = _yarn_magnitude(parameters, factor)
    if kind == "longrope":
        # All tokens of a context must turn alike, so the set is chosen once, by the longest context.
        is_long = (fields.run_length or length) > original
        lane_factors = _lane_factors(fields, parameters, "long_factor" if is_long else "short_factor", share)
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        magnitude = parameters.number("attention_factor", magnitude)
    return Rope(
        theta,
        kind,
        factor=factor,
        original_length=original,
        low_frequency_factor=parameters.number("low_freq_factor", 1.0, positive=True),
        high_frequency_factor=parameters.number("high_freq_factor", 4.0, positive=True),
        beta_fast=parameters.number("beta_fast", 32.0, positive=True),
        beta_slow=parameters.number("beta_slow", 1.0, positive=True),
        truncate=parameters.flag("truncate", True),
        lane_factors=lane_factors,
        magnitude=magnitude,
        rotary_share=share,
    )


def _lane_factors(fields: Fields, parameters: Fields, name: str, share: float) -> tuple[float, ...]:
    head_dim = fields.integer("head_dim", None)
    head_dim = head_dim or fields.integer("hidden_size") // fields.integer("num_attention_heads")
    return parameters.numbers(name, int(head_dim * share) // 2)


def _yarn_magnitude(parameters: Fields, factor: float) -> float:
    given = parameters.number("attention_factor", None)
    if given is not None:
        return given
    scale, scale_all = parameters.number("mscale", None), parameters.number("mscale_all_dim", None)

    def magnitude(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
