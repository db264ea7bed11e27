"""The GPU kernels: right, and how fast beside others: `python -m benchmarks.gpu`."""
