"""Several devices, each of which holds the pages of its own KV heads and computes attention for their query heads.

They do not communicate for that. The mesh is named where pages are created; where they are used, it is read off the
arrays, which know it also inside jit.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

MODEL_AXIS = "model"  # of the mesh: the devices that share a layer
HEADS = PartitionSpec(None, MODEL_AXIS)  # how pages [P, K, ...], queries [T, N, H], keys and values [T, K, H] are split
WHOLE = PartitionSpec()  # what every device holds: page tables, lengths


def model_mesh(mesh: Mesh) -> Mesh:
    """The mesh, checked, with axes over which the compiler places whatever stands between the split arrays.

    Raises:
        ValueError: it has no axis "model".
    """
    if MODEL_AXIS not in mesh.shape:
        raise ValueError(
            f"the mesh has axes {', '.join(map(str, mesh.axis_names))}: name the one over which layers are split "
            f"{MODEL_AXIS!r}."
        )
    return Mesh(mesh.devices, mesh.axis_names)


def check_splits(mesh: Mesh | AbstractMesh, **sizes: int) -> None:
    """Raises ValueError unless the mesh axis "model" divides the sizes."""
    parts = mesh.shape[MODEL_AXIS]
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(
                f"{name}={size} does not split over the {parts} devices of the mesh axis {MODEL_AXIS!r}: use a number "
                "of devices that divides it."
            )


def find_mesh(tree: Any) -> Any:
    """The mesh of the first array on one with an axis "model", inside jit an abstract mesh; None: there is none."""
    for leaf in jax.tree.leaves(tree):
        sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        # Inside a `shard_map` over that axis, a device sees nothing but its own heads already.
        if mesh is not None and MODEL_AXIS in mesh.shape and MODEL_AXIS not in mesh.manual_axes:
            return mesh
    return None


def split_heads(
    function: Callable, mesh: Mesh | AbstractMesh | None, num_kv_heads: int, in_specs: Any, out_specs: Any
) -> Callable:
    """The function, run by each device of a mesh on the heads that it holds; without a mesh the function itself.

    The compiler cannot split a Pallas kernel, so no axis is left to it: over those other than "model", all devices do
    the same.

    Raises:
        ValueError: the KV heads do not divide by the mesh axis "model".
    """
    if mesh is None:
        return function
    check_splits(mesh, num_kv_heads=num_kv_heads)
    axes = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def everywhere(tree: Any, pages: Any) -> Any:
    """Arrays, whole on all devices of the mesh over which pages are split; as they are without a mesh."""
    mesh = find_mesh(pages)
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, WHOLE))
