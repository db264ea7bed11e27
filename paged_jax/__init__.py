"""A paged KV cache for any JAX decoder: pages on the device, their table inside jit, prefixes shared."""
