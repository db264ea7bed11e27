"""Random traffic and errors at any moment: every request gets the tokens that it gets alone, and no page is lost.

The long forms: 2,000 requests, and 500 errors.

    pytest -n 0 -m long tests/engine/test_traffic.py -s
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from benchmarks.soak import Soak
from paged_jax import DraftModel, KVCache
from traffic_cases import CONFIG, HYBRID, make_engine, run_faults, run_traffic


def test_random_traffic():
    statistics = run_traffic(60, seed=0).stats()
    assert statistics.preemptions > 10 and statistics.cached_tokens > 100 and statistics.evicted_pages > 10, statistics


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("windows", "preemptions"), [((None, None), 300), (HYBRID, 50)], ids=["plain", "hybrid"])
def test_long_random_traffic(windows, preemptions):
    statistics = run_traffic(2000, seed=1, windows=windows).stats()
    print(statistics)
    assert statistics.preemptions > preemptions


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("windows", [(None, None), HYBRID], ids=["plain", "hybrid"])
def test_long_random_traffic_with_beams(windows):
    for max_beams in (2, 4):
        statistics = run_traffic(500, seed=4, windows=windows, max_beams=max_beams).stats()
        assert statistics.preemptions > 5, statistics
    run_faults(100, seed=5, windows=windows, max_beams=2)


def drafts() -> dict[str, Any]:
    """A decoder that drafts, with a shorter window: some of its drafts are right."""
    drafter = DraftModel(decoder.forward_with((None, 5)), num_tokens=16)
    config = decoder.config(1 + 40, windows=(None, 5))
    state = drafter.create(jnp.int32(0), KVCache.create(config), CONFIG.max_length + 1)
    return {"drafter": drafter, "drafter_state": state}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("windows", "preemptions"), [((None, None), 20), (HYBRID, 0)], ids=["plain", "hybrid"])
def test_long_random_traffic_with_drafts(windows, preemptions):
    """What is rejected leaves no trace in the pool, in the prefix cache or after an error."""
    engine = run_traffic(500, seed=2, windows=windows, **drafts())
    counters = engine._core.runner.state.counters
    assert counters.accepted_tokens > 50 and counters.drafted_tokens - counters.accepted_tokens > 100
    assert engine.stats().preemptions > preemptions and engine.stats().cached_tokens > 100
    run_faults(100, seed=3, windows=windows, **drafts())


def test_a_soak_finds_a_page_that_is_lost(monkeypatch):
    monkeypatch.setattr("benchmarks.soak.BURST", 30)
    soak = Soak(make_engine(), [np.int32(0), np.int32(5)], decoder.VOCAB)
    soak.burst()
    assert soak.counts["requests"] == 30 and soak.counts["looks"] == 1
    assert soak.counts["aborts"] > 0 and soak.counts["forks"] > 0 and soak.counts["events"] > 400
    runner: Any = soak.engine._core.runner
    monkeypatch.setattr(runner, "drop", lambda pages: monkeypatch.undo())  # the first time, it forgets to
    with pytest.raises(AssertionError, match="references to pages are wrong after 60 requests"):
        soak.burst()


# ---- errors --------------------------------------------------------------------------------------------------


def test_errors_at_any_moment_lose_nothing():
    run_faults(30, seed=0)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("windows", [(None, None), HYBRID], ids=["plain", "hybrid"])
def test_500_errors_at_any_moment_lose_nothing(windows):
    run_faults(500, seed=1, windows=windows)
