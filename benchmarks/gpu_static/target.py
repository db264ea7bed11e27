"""Compiles for an H200 on a machine without a GPU."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

TARGET = pathlib.Path(__file__).parent / "h200.txtpb"


def compile_for_h200(function: Any, *arguments: Any):
    """Compiles a jitted function for shapes and dtypes like those of `arguments` (pytrees)."""
    import jax_plugins.xla_cuda13  # noqa: F401  registers the compiler; no driver needed

    jax.devices()
    topology = topologies.get_topology_desc("", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with use_abstract_mesh(mesh.abstract_mesh):
        return function.lower(*arguments).compile()
