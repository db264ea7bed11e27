"""Compiles for a TPU on a machine without one."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh


def compile_for(topology: str, jitted: Any, *arguments: Any, **static: Any):
    """Args:
    topology: libtpu's name of a slice, such as "v6e:2x2".
    arguments: pytrees of shapes.
    """
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=getattr(device, "num_cores", 1), platform="tpu")
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=abstract)):
        return jitted.lower(*placed, **static).compile()


def hbm_temporaries(compiled: Any) -> int:
    """Bytes of HBM that a program holds beside its arguments and results.

    `temp_size_in_bytes` may also count what lies in the chip's VMEM; the total of all allocations does not.
    """
    memory = compiled.memory_analysis()
    return memory.total_allocation_bytes - memory.indefinite_allocations
