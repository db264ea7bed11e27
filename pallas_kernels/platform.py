"""The platform that a trace is for, and the kind of device."""

import jax


def target_platform() -> str:
    """The platform that the trace is for: "cpu", "tpu" or "gpu".

    That of the mesh in context, abstract or real (so compiling ahead of time for another platform is
    lowering under `jax.sharding.use_abstract_mesh`, which Pallas kernels need anyway), else that of the
    default device.
    """
    device = _abstract_device() or _default_device()
    platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def target_device_kind() -> str:
    """The kind of device that the trace is for, in JAX's words, such as "TPU v6 lite" or "TPU7x"."""
    device = _abstract_device() or _default_device()
    return (jax.devices(device)[0] if isinstance(device, str) else device).device_kind


def _default_device():
    """A device, or the name of a platform."""
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  defined at run time
    return default or jax.devices()[0]


def _abstract_device():
    return jax.sharding.get_abstract_mesh().abstract_device
