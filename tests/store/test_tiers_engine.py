"""An engine whose pages go to host memory and to a store, and come back: always the tokens of a cold one.

The long forms: more requests, and more errors.

    pytest -n 0 -m long tests/store/test_tiers_engine.py -s
"""

import errno
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hash_decoder as decoder
from engine_cases import pool_is_empty
from paged_jax.engine import Completion
from paged_jax.engine.transfers import is_on_host, stage
from paged_jax.sampling import SamplingParams
from paged_jax.store import Store
from pallas_kernels import PageContents
from traffic_cases import HYBRID, make_engine, run_faults, run_traffic

GREEDY = SamplingParams(max_new_tokens=6)
HOST_BYTES = 40 * 4096  # about twice the pool, so that it overflows, too
WINDOWS = pytest.mark.parametrize("windows", [(None, None), HYBRID], ids=["plain", "hybrid"])


def make(windows=(None, None), learns=False, **options):
    """An engine; unless it learns what it costs to compute a token, it loads whatever it finds."""
    engine = make_engine(windows, tokenizer=None, **options)
    if engine.tiers is not None and not learns:
        engine.tiers.prefill.measured = lambda amount, seconds: None
    return engine


def tiers_of(engine) -> Any:
    return engine.tiers


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, decoder.VOCAB, length).tolist()


def run(engine, prompts, windows=(None, None), params=GREEDY):
    tokens = [[list(s.tokens) for s in samples] for samples in engine.generate(prompts, params)]
    assert tokens == [[decoder.dense_greedy(p, 6, windows)] for p in prompts]
    return engine.stats()


def test_what_the_pool_gives_up_comes_back_from_host_memory():
    engine = make(host_cache_bytes=1 << 20)
    prompts = [text(seed, 33) for seed in range(4)]
    for prompt in prompts:
        run(engine, [prompt])
    before = engine.stats()
    assert before.evicted_pages > 0 and before.tier_pages["host"] > 0
    for prompt in prompts:
        run(engine, [prompt])
    after = engine.stats()
    assert after.computed_tokens - before.computed_tokens <= 4 * (6 + 4)
    assert after.loaded_tokens["host"] > 0
    assert pool_is_empty(engine)


@pytest.mark.parametrize(
    "windows",
    [(None, None), pytest.param(HYBRID, marks=pytest.mark.long)],  # another program; random traffic has one, too
    ids=["plain", "hybrid"],
)
def test_a_conversation_goes_on_after_a_restart(tmp_path, windows):
    prompts = [text(seed, 33) for seed in range(4)]
    first = make(windows, store=Store(tmp_path))
    cold = run(first, prompts, windows)
    first.flush()
    answers = [decoder.dense_greedy(prompt, 6, windows) for prompt in prompts]
    turns = [prompt + answer + text(9, 5) for prompt, answer in zip(prompts, answers, strict=True)]
    second = make(windows, store=Store(tmp_path))
    warm = run(second, turns, windows)
    assert cold.computed_tokens == 4 * (33 + 5) and cold.loaded_tokens == {}
    assert warm.loaded_tokens == {"store": 4 * 38}, "to the last token, which is in the middle of a page"
    assert warm.computed_tokens == 4 * (1 + 5 + 5)
    assert pool_is_empty(second)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_pages_leave_through_pinned_memory(num_devices):
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("model",))
    split = NamedSharding(mesh, PartitionSpec(None, "model"))
    contents = PageContents(*jax.device_put([np.arange(8.0).reshape(2, 4)] * 2, split))
    assert is_on_host(contents)
    staged = stage(contents)
    assert all(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(staged))
    assert staged.keys.sharding == split.with_memory_kind("pinned_host")
    assert np.array_equal(staged.values, contents.values)


def test_all_that_leaves_an_engine_is_staged_before_the_next_step(tmp_path, monkeypatch):
    engine, kinds = make(store=Store(tmp_path), host_cache_bytes=1 << 20), []
    note = engine._core.runner.note

    def watch(key, arrays):
        if isinstance(arrays, PageContents):
            kinds.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(arrays)})
        note(key, arrays)

    monkeypatch.setattr(engine._core.runner, "note", watch)
    monkeypatch.setattr("paged_jax.engine.transfers.is_on_host", lambda contents: False)  # as on a TPU or a GPU
    for seed in range(3):
        run(engine, [text(seed, 33)])
    assert len(kinds) > 3 and all(kind == {"pinned_host"} for kind in kinds)


def fill(folder, prompt, **options):
    """A store in which a prompt was computed."""
    engine = make(store=Store(folder))
    run(engine, [prompt])
    engine.flush()
    assert engine.stats().saved_pages == {"store": 10}


def test_the_same_prompt_computes_nothing_but_its_last_token(tmp_path):
    prompt = text(0, 35)  # its last page holds drawn tokens, too
    first = make(store=Store(tmp_path))
    run(first, [prompt])
    first.flush()
    for host_bytes in (0, HOST_BYTES):
        engine = make(store=Store(tmp_path), host_cache_bytes=host_bytes)
        assert run(engine, [prompt]).computed_tokens == 1 + 5
        run(engine, [text(seed, 33) for seed in range(1, 4)])  # which it makes room for
        before = engine.stats().computed_tokens
        assert run(engine, [prompt]).computed_tokens - before == 1 + 5
    assert engine.stats().loaded_tokens == {"store": 34 + 3 * 32, "host": 34}


# ---- the end of an engine ----------------------------------------------------------------------------------------


def threads() -> set[threading.Thread]:
    """Of all engines and stores."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("paged_jax")}


def test_an_engine_that_is_closed_leaves_no_thread_and_everything_in_the_store(tmp_path):
    before = threads()
    with make(store=tmp_path) as engine:
        run(engine, [text(0, 33)])
        assert len(threads() - before) >= 1
        engine.add_request(text(1, 33), GREEDY)
        engine.step()
    assert threads() <= before
    assert not engine.has_work
    with Store(tmp_path) as store:
        assert store.contents().pages >= 10
    with pytest.raises(ValueError, match="this engine is closed: make another one"):
        engine.generate([text(0, 33)])
    engine.flush()
    engine.close()


def test_an_engine_that_nobody_refers_to_leaves_no_thread(tmp_path):
    before = threads()
    engine = make(store=Store(tmp_path))
    run(engine, [text(0, 33)])
    del engine
    gc.collect()
    for thread in threads() - before:
        thread.join(10)
    assert threads() <= before
    assert Store(tmp_path).contents().pages == 10


# ---- a miss, never a wrong token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["salt", "adapter"])
def test_what_was_computed_under_another_key_is_a_miss(tmp_path, warnings, other):
    prompt = text(0, 33)
    fill(tmp_path, prompt)
    engine = make(store=Store(tmp_path))
    options: Any = {other: "x"}
    engine.generate([prompt], GREEDY, **options)
    assert engine.stats().loaded_tokens == {} and engine.stats().computed_tokens == 38 and warnings() == []


def test_new_weights_are_a_miss_and_the_old_ones_are_found_again(tmp_path):
    prompt = text(0, 33)
    fill(tmp_path, prompt)
    engine = make(store=Store(tmp_path))
    for params, loaded in ((1, 0), (0, 32)):
        engine.update_params(np.int32(params))
        engine.generate([prompt], GREEDY)
        assert engine.stats().loaded_tokens.get("store", 0) == loaded
    run(engine, [prompt])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped"])
def test_damaged_pages_are_computed_again(tmp_path, warnings, monkeypatch, damage):
    monkeypatch.setattr("paged_jax.store.folder.INLINE_BYTES", 0)
    prompt = text(0, 33)
    fill(tmp_path, prompt)
    files = sorted((tmp_path / "pages").iterdir())
    contents = [path.read_bytes() for path in files]
    for path, data, next_data in zip(files, contents, contents[1:] + contents[:1], strict=True):
        flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        path.write_bytes({"flipped": flipped, "truncated": data[:-1], "swapped": next_data}[damage])
    engine = make(store=Store(tmp_path))
    stats = run(engine, [prompt])
    assert stats.loaded_tokens == {} and len(warnings()) == 1
    engine.flush()
    stats = run(make(store=Store(tmp_path)), [prompt])
    assert stats.loaded_tokens == {"store": 32} and len(warnings()) == 1, "they were set aside, and stored again"


def test_what_was_pruned_is_stored_again(tmp_path):
    store, prompt = Store(tmp_path), text(0, 33)
    engine = make(store=store)
    for _ in range(2):
        run(engine, [prompt])
        engine.flush()
        assert store.prune(0) == 10
        for seed in (1, 2, 3):  # until the pool has given it up
            run(engine, [text(seed, 33)])
        engine.flush()
        store.prune(0)


# ---- disks that fail ---------------------------------------------------------------------------------------------


def failing(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number, name", [(errno.ENOSPC, "ENOSPC"), (errno.EIO, "EIO")])
def test_serving_goes_on_when_nothing_can_be_written(tmp_path, monkeypatch, warnings, number, name):
    monkeypatch.setattr("paged_jax.store.folder.INLINE_BYTES", 0)
    engine = make(store=Store(tmp_path))
    monkeypatch.setattr(os, "fsync", failing(number))
    for seed in range(3):
        run(engine, [text(seed, 33)])
    engine.flush()
    assert len(warnings()) == 1 and f"cannot be written ({name}" in warnings()[0]
    assert not list((tmp_path / "pages").iterdir()) and not list((tmp_path / "writing").glob("*/*"))
    monkeypatch.undo()
    assert engine.stats().saved_pages == {"store": 0}
    run(engine, [text(3, 33)])
    run(engine, [text(4, 33)])
    run(engine, [text(0, 33)])  # which the pool has given up
    engine.flush()
    assert engine.stats().saved_pages == {"store": 30}, "it is used again once there is room"


@pytest.mark.parametrize("number, name", [(errno.EROFS, "EROFS"), (errno.EACCES, "EACCES")])
def test_serving_goes_on_without_a_folder(tmp_path, monkeypatch, warnings, number, name):
    monkeypatch.setattr(Path, "mkdir", failing(number))
    engine = make(store=Store(tmp_path / "store"))
    monkeypatch.undo()
    for _ in range(2):
        run(engine, [text(0, 33)])
    engine.flush()
    assert len(warnings()) == 1 and f"cannot be opened ({name}" in warnings()[0]
    assert engine.stats().cached_tokens == 32


def test_a_slow_disk_delays_nobody_for_long(tmp_path, monkeypatch):
    prompts = [text(seed, 33) for seed in range(3)]
    fill(tmp_path, prompts[0])
    engine = make(store=Store(tmp_path))
    run(engine, [text(9, 33)])
    calls = []

    def find(pages):
        calls.append(pages)
        time.sleep(1.5)
        return set()

    monkeypatch.setattr("paged_jax.engine.tiered.PATIENCE", 0.1)
    monkeypatch.setattr(tiers_of(engine).store, "find", find)
    for prompt in prompts:
        stats = run(engine, [prompt])
    assert stats.loaded_tokens == {} and stats.computed_tokens == 4 * 38
    assert len(calls) == 1, "only the first prompt waited"


# ---- load or recompute -------------------------------------------------------------------------------------------


def test_what_is_cheaper_to_compute_is_computed(tmp_path):
    prompt = text(0, 33)
    fill(tmp_path, prompt)
    engine = make(learns=True, store=Store(tmp_path))
    tiers = tiers_of(engine)
    tiers.prefill.measured(10**9, 1.0)
    tiers.rates["store"].measured(1, 1.0)
    stats = run(engine, [prompt])
    assert stats.loaded_tokens == {} and stats.declined_tokens == {"store": 32}
    assert stats.computed_tokens == 38
    other = make(learns=True, store=Store(tmp_path))
    tiers_of(other).prefill.measured(1, 1.0)
    stats = run(other, [prompt])
    assert stats.loaded_tokens == {"store": 32} and stats.declined_tokens == {}


def test_rates_are_learnt_while_running(tmp_path):
    fill(tmp_path, text(0, 33))
    engine = make(learns=True, store=Store(tmp_path), host_cache_bytes=1 << 20)
    for seed in (0, 1, 2, 3, 0, 1):
        run(engine, [text(seed, 33)])
    tiers = tiers_of(engine)
    assert all(rate.per_second > 0 for rate in (tiers.prefill, tiers.rates["store"], tiers.rates["host"]))


def test_events_and_statistics_name_the_tier(tmp_path):
    engine = make(store=Store(tmp_path), host_cache_bytes=1 << 20)
    for seed in (0, 1, 2, 0):
        run(engine, [text(seed, 33)])
    kinds = {(event.kind, event.note) for event in engine.events}
    assert ("offloaded", "host") in kinds and ("loaded", "host") in kinds
    stats = engine.stats()
    assert stats.tier_bytes["host"] == 2 * 4 * 64 * 4 * 2 * stats.tier_pages["host"]
    assert sum(event.count for event in engine.events if event.kind == "loaded") == stats.loaded_tokens["host"]


def test_an_engine_closes_between_the_steps_of_other_threads(tmp_path):
    fill(tmp_path, text(0, 33))
    engine = make(store=Store(tmp_path))
    core = engine._core
    late = engine._make(text(0, 33), GREEDY)  # which another thread is about to queue
    closing = threading.Thread(target=engine.close)
    with core._stepping:  # another thread is in the middle of a step
        closing.start()
        closing.join(0.1)
        tiers_of(engine).save([], list)
    closing.join()
    assert list(Completion.join(core.queue(late, is_claimed=True)).tokens) == decoder.dense_greedy(text(0, 33), 6)
    assert engine.stats().loaded_tokens == {}


def test_what_is_looked_for_when_an_engine_closes_is_given_up(tmp_path, monkeypatch):
    engine, reads = make(store=Store(tmp_path)), threading.Event()
    monkeypatch.setattr(tiers_of(engine).store, "find", lambda pages: (reads.wait(), set())[1])
    for seed in (0, 1):
        engine.add_request(text(seed, 33), GREEDY)
    prefixes: Any = engine._core._prefixes
    while len(prefixes._loads) < 2:
        engine.step()
    threading.Timer(0.3, reads.set).start()
    engine.close()
    assert not engine.step() and pool_is_empty(engine)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"host_cache_bytes": -1}, "host_cache_bytes=-1.*give a number of bytes, or 0 for none"),
        ({"host_cache_bytes": "a lot"}, "host_cache_bytes='a lot': 'a lot' is no size"),
        ({"store": 3}, "store=3: give a folder, a URL, or a Store or ObjectStore of paged_jax.store"),
        ({"host_cache_bytes": 9, "prefix_cache": False}, "leave prefix_cache on, or both of them out"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# ---- traffic -----------------------------------------------------------------------------------------------------


COPIES = 2 * 2 * 2  # of pages in and out, of two widths and two groups: each is compiled when it is first needed


def tiers(folder: Path) -> dict[str, Any]:
    return {"host_cache_bytes": HOST_BYTES, "store": Store(folder, max_bytes=1 << 20)}


@pytest.mark.parametrize(
    "windows",
    [pytest.param((None, None), marks=pytest.mark.long), HYBRID],  # a hybrid has layers without a window, too
    ids=["plain", "hybrid"],
)
def test_random_traffic(tmp_path, windows):
    for seed in (0, 1):  # the second finds what the first has stored
        engine = run_traffic(14, seed, windows, COPIES, **tiers(tmp_path))
        engine.flush()
    statistics = engine.stats()
    found = statistics.loaded_tokens.get("store", 0) + statistics.declined_tokens.get("store", 0)
    assert found > 0, statistics


@pytest.mark.long  # the short form of this with many requests, and with beams
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("max_beams", [0, 2])
@WINDOWS
def test_long_random_traffic(tmp_path, windows, max_beams):
    for seed in range(4):
        engine = run_traffic(300, seed, windows, COPIES, max_beams=max_beams, **tiers(tmp_path))
        print(engine.stats())
        found = [*engine.stats().loaded_tokens.values(), *engine.stats().declined_tokens.values()]
        assert sum(found) > 100


def test_errors_at_any_moment_lose_nothing(tmp_path):
    run_faults(12, 0, HYBRID, **tiers(tmp_path))


@pytest.mark.long  # the short form of this with many errors
@pytest.mark.timeout(3600)
@WINDOWS
def test_300_errors_at_any_moment_lose_nothing(tmp_path, windows):
    run_faults(300, 1, windows, **tiers(tmp_path))
