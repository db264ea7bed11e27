"""The platform that a trace is for."""

import jax


def target_platform() -> str:
    """The platform that the trace is for: "cpu", "tpu" or "gpu".

    That of the mesh in context, abstract or real (so compiling ahead of time for another platform is
    lowering under `jax.sharding.use_abstract_mesh`, which Pallas kernels need anyway), else that of the
    default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        platform = device.platform
    else:
        default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  defined at run time
        platform = getattr(default, "platform", default) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform
