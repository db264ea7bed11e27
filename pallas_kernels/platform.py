"""The platform that a trace is for, and the kind of device."""

import jax


def target_platform() -> str:
    """The platform that the trace is for: "cpu", "tpu" or "gpu".

    That of the mesh in context, abstract or real (so compiling ahead of time for another platform is
    lowering under `jax.sharding.use_abstract_mesh`, which Pallas kernels need anyway), else that of the
    default device.
    """
    device = _abstract_device()
    if device is not None:
        platform = device.platform
    else:
        default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  defined at run time
        platform = getattr(default, "platform", default) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def target_device_kind() -> str:
    """The kind of device that the trace is for, in JAX's words, such as "TPU v6 lite" or "TPU7x"."""
    return (_abstract_device() or jax.devices()[0]).device_kind


def _abstract_device():
    return jax.sharding.get_abstract_mesh().abstract_device
