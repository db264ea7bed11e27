"""Which device gets which part of a decoder's weights."""

from collections.abc import Callable

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from paged_jax.cache.mesh import MODEL_AXIS, check_splits, model_mesh
from paged_jax.models.config import DecoderConfig

Placement = Callable[[str], Sharding]  # a weight's path, such as "layers.0.attn.q.weight" -> where it goes

# Of the weights in a layer, the axis that is split: whole heads, and the MLP's inner width. The rest is small.
SPLIT_AXES = {
    "attn.q.weight": 0,
    "attn.q.bias": 0,
    "attn.k.weight": 0,
    "attn.k.bias": 0,
    "attn.v.weight": 0,
    "attn.v.bias": 0,
    "attn.sinks": 0,
    "attn.out.weight": 1,
    "mlp.gate.weight": 0,
    "mlp.gate.bias": 0,
    "mlp.up.weight": 0,
    "mlp.up.bias": 0,
    "mlp.down.weight": 1,
    # Experts: [E, D, 2F], [E, 2F], [E, F, D], where gate and linear part alternate in 2F
    "mlp.gate_up": 2,
    "mlp.gate_up_bias": 1,
    "mlp.down": 1,
}


def tensor_parallel(config: DecoderConfig, mesh: Mesh) -> Placement:
    """Each layer split over the mesh axis "model", by heads and by the MLP's inner width, as in Megatron-LM
    (https://arxiv.org/abs/1909.08053); the embedding by vocabulary where that divides. Other mesh axes hold copies.

    Args:
        config: of the decoder.
        mesh: has an axis "model".

    Returns:
        A function from a weight's path to its sharding.

    Raises:
        ValueError: there is no such axis, or the KV heads or the MLP do not divide by it.
    """
    mesh = model_mesh(mesh)
    check_splits(mesh, num_kv_heads=config.num_kv_heads, intermediate_size=config.intermediate_size)
    parts = mesh.shape[MODEL_AXIS]

    def place(path: str) -> Sharding:
        if path in ("embed.weight", "head.weight"):
            axis = None if config.vocab_size % parts else 0
        else:
            axis = SPLIT_AXES.get(path.split(".", 2)[-1])
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, MODEL_AXIS))

    return place
