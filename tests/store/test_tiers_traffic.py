"""Random traffic and errors at any moment, with pages that go to host memory and to a store and come back.

pytest -n 0 -m long tests/store/test_tiers_traffic.py -s
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "engine"))
from test_traffic import HYBRID, run_faults, run_traffic

from paged_jax.store import Store

HOST_BYTES = 40 * 4096  # about twice the pool, so that it overflows, too
WINDOWS = pytest.mark.parametrize("windows", [(None, None), HYBRID], ids=["plain", "hybrid"])


def tiers(folder: Path) -> dict:
    return {"host_cache_bytes": HOST_BYTES, "store": Store(folder, max_bytes=1 << 20)}


@WINDOWS
def test_random_traffic(tmp_path, windows):
    for seed in (0, 1):  # the second finds what the first has stored
        engine = run_traffic(30, seed, windows, **tiers(tmp_path))
        engine.flush()
    statistics = engine.stats()
    assert statistics.loaded_tokens.get("store", 0) > 0, statistics


@pytest.mark.long  # the short form of this with many requests
@pytest.mark.timeout(3600)
@WINDOWS
def test_long_random_traffic(tmp_path, windows):
    for seed in range(4):
        engine = run_traffic(300, seed, windows, **tiers(tmp_path))
        print(engine.stats())
        assert sum(engine.stats().loaded_tokens.values()) > 100


def test_errors_at_any_moment_lose_nothing(tmp_path):
    run_faults(15, 0, HYBRID, **tiers(tmp_path))


@pytest.mark.long  # the short form of this with many errors
@pytest.mark.timeout(3600)
@WINDOWS
def test_300_errors_at_any_moment_lose_nothing(tmp_path, windows):
    run_faults(300, 1, windows, **tiers(tmp_path))
