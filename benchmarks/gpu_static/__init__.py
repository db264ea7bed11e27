"""The static cost of the GPU kernels: cycles from their machine code, on a machine without a GPU."""
