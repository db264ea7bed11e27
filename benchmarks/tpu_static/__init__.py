"""The static cost of the TPU kernels: cycles and bytes of the compiled programs, on a machine without a TPU."""
