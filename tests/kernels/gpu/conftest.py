"""Runs the GPU kernels on a CPU, in Mosaic GPU's interpreter, with race detection."""

import pytest

from pallas_kernels.gpu import hardware


@pytest.fixture
def interpreter():
    with hardware.interpreter():
        yield
