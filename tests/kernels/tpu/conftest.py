"""Runs the TPU kernels on a CPU, in the TPU interpreter: races, uninitialised memory and bad reads show."""

import contextlib
from typing import Literal

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import attention, write
from pallas_kernels.tpu.blocks import ALL_COUNTS
from pallas_kernels.tpu.tasks import PrefillSizes
from pallas_kernels.tpu.walk import DecodeSizes


def pytest_collection_modifyitems(config, items):
    if "long" not in config.option.markexpr:
        for item in items:
            if "kernels/tpu" in item.nodeid and item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long form: run with -m long"))


@contextlib.contextmanager
def interpreted(copies: Literal["eager", "on_wait"]):
    """Args:
    copies: "eager": a copy runs where it starts, on a thread of its own, and races with it are found; "on_wait":
        it runs where it is waited for, so that what is read too early is NaN.
    """
    params = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode=copies,
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    races = interpret_pallas_call.races
    assert races is None or not races.races_found


@pytest.fixture
def interpreter():
    with interpreted("eager"):
        yield


@pytest.fixture
def late_copies():
    with interpreted("on_wait"):
        yield


def pages_per_block(page_size: int) -> int:
    """The fewest pages that fill 128 lanes."""
    return next(n for n in (1, 2, 4, 8, 16) if n * page_size % 128 == 0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short sequences take many of them, and short rings: what compiles goes with their length."""

    def decode_sizes(pages, *_):
        return DecodeSizes(pages.page_size, pages_per_block(pages.page_size), items_per_group=1, items_in_ring=3)

    def prefill_kernels(pages, num_heads, *_):
        group = num_heads // pages.num_kv_heads
        heads_per_product = 2 if group % 2 == 0 else 1
        sizes = PrefillSizes(pages.page_size, pages_per_block(pages.page_size), 16, heads_per_product)
        return [(sizes, ALL_COUNTS)]

    monkeypatch.setattr(attention, "decode_sizes", decode_sizes)
    monkeypatch.setattr(attention, "prefill_kernels", prefill_kernels)
    monkeypatch.setattr(write, "RING_BYTES", 1 << 17)
