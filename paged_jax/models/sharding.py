"""Which device gets which part of a decoder's weights."""

from collections.abc import Callable

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from paged_jax.cache.mesh import MODEL_AXIS, WHOLE, check_splits, model_mesh
from paged_jax.models.config import DecoderConfig
from paged_jax.models.stacks import layer_numbers

Placement = Callable[[str], Sharding]  # a weight's path, such as "layers.0.attn.q.weight" -> where it goes

# Of the weights in a layer, the axis that is split: whole heads, and the MLP's inner width. None: each device holds it.
SPLIT_AXES = {
    "attn_norm.weight": None,
    "attn_post_norm.weight": None,
    "mlp_norm.weight": None,
    "mlp_post_norm.weight": None,
    "attn.q.weight": 0,
    "attn.q.bias": 0,
    "attn.k.weight": 0,
    "attn.k.bias": 0,
    "attn.v.weight": 0,
    "attn.v.bias": 0,
    "attn.sinks": 0,
    "attn.q_norm.weight": None,
    "attn.k_norm.weight": None,
    "attn.out.weight": 1,
    "attn.out.bias": None,
    "mlp.gate.weight": 0,
    "mlp.gate.bias": 0,
    "mlp.up.weight": 0,
    "mlp.up.bias": 0,
    "mlp.down.weight": 1,
    "mlp.down.bias": None,
    # Experts: [E, D, 2F], [E, 2F], [E, F, D], where gate and linear part alternate in 2F
    "mlp.router.weight": None,
    "mlp.router.bias": None,
    "mlp.gate_up": 2,
    "mlp.gate_up_bias": 1,
    "mlp.down": 1,
    "mlp.down_bias": None,
}


def split_axes(config: DecoderConfig, num_devices: int, period: int | None = None) -> dict[str, int | None]:
    """The axis of each weight, by its path, that `tensor_parallel` splits; None: each device holds all of it."""
    axes: dict[str, int | None] = {"norm.weight": None}
    axes |= dict.fromkeys(("embed.weight", "head.weight"), None if config.vocab_size % num_devices else 0)
    for entry in range(len(layer_numbers(config.num_layers, period))):
        shift = 1 if period is not None and entry < period else 0
        axes |= {f"layers.{entry}.{name}": None if a is None else a + shift for name, a in SPLIT_AXES.items()}
    return axes


def tensor_parallel(config: DecoderConfig, mesh: Mesh, period: int | None = None) -> Placement:
    """Each layer split over the mesh axis "model", by heads and by the MLP's inner width, as in Megatron-LM
    (https://arxiv.org/abs/1909.08053); the embedding by vocabulary where that divides. Other mesh axes hold copies.

    Args:
        config: of the decoder.
        mesh: has an axis "model".
        period: of the decoder; its stacked weights are split along the same axes, which come after that of the layers.

    Returns:
        A function from a weight's path to its sharding.

    Raises:
        ValueError: there is no such axis, or the KV heads or the MLP do not divide by it; and the function, for a
            weight that it does not know.

    Examples:
        >>> decoder, _ = models.read_config(models.DEMO)
        >>> place = models.tensor_parallel(decoder, jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",)))
        >>> place("layers.0.attn.q.weight").spec, place("layers.0.attn.out.weight").spec, place("norm.weight").spec
        (P('model',), P(None, 'model'), P())
    """
    mesh = model_mesh(mesh)
    check_splits(mesh, num_kv_heads=config.num_kv_heads, intermediate_size=config.intermediate_size)
    axes = split_axes(config, mesh.shape[MODEL_AXIS], period)

    def place(path: str) -> Sharding:
        if path not in axes:
            raise ValueError(f"{path} is no weight of this decoder: say in SPLIT_AXES how its layers are split.")
        axis = axes[path]
        return NamedSharding(mesh, WHOLE if axis is None else PartitionSpec(*[None] * axis, MODEL_AXIS))

    return place
