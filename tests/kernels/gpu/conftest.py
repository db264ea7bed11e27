"""Runs the GPU kernels on a CPU, in Mosaic GPU's interpreter, with race detection."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest

from pallas_kernels.gpu import hardware


@pytest.fixture
def interpreter(monkeypatch):
    """The interpreter, and a GPU of two multiprocessors: it runs the blocks of a grid one after the other."""
    monkeypatch.setattr(hardware, "num_multiprocessors", lambda: 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
