"""Object stores, on a server of this machine that speaks S3 and checks signatures, and in a folder."""

import dataclasses
import os
import socket
import sys
import threading
from typing import Any

import numpy as np
import obstore
import pytest
from object_server import Server, serving
from obstore.store import from_url
from store_cases import check, prefix

import hash_decoder as decoder
from paged_jax.cli import main
from paged_jax.sampling import SamplingParams
from paged_jax.store import ObjectStore
from paged_jax.store.page_file import pack
from traffic_cases import HYBRID, make_engine

GREEDY = SamplingParams(max_new_tokens=6)
SIZE = len(pack(prefix(0)[0]))


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def url(server: Server, request) -> str:
    """Of a place of its own for each test."""
    return f"s3://bucket/{request.node.name}"


def in_environment(monkeypatch, server: Server) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


def names(store: ObjectStore, beginning: str = "pages") -> list[str]:
    return sorted(meta["path"] for batch in obstore.list(store._objects, beginning) for meta in batch)


def data_of(store: ObjectStore, name: str) -> bytes:
    return bytes(obstore.get(store._objects, name).bytes())


# ---- pages -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "folder"])
def open_store(request, server: Server, tmp_path):
    """Opens the same store again and again."""
    where, options = (f"file://{tmp_path}/made", {}) if request.param == "folder" else (None, server.options)
    return lambda **more: ObjectStore(where or f"s3://bucket/{request.node.name}", **options, **more)


def test_what_is_written_is_found_by_every_process(open_store, warnings):
    first, other, pages = open_store(), open_store(), [*prefix(1, num_pages=20), *prefix(2)]
    assert check(first, pages) == 0
    assert first.write(pages) == 23 and first.write(pages) == 0
    assert check(first, pages) == check(other, pages) == 23
    assert other.find([*pages, *prefix(3)]) == {page.key for page in pages}
    assert other.read([pages[5], prefix(3)[0], pages[6]])[1] is None
    contents = other.contents()
    assert contents.pages == 23 and contents.bytes == 23 * SIZE and contents.fingerprints == {"66" * 8: 23}
    assert other.verify() == (23, 0) and contents.aside == 0
    first.close()
    assert check(first, pages) == 0 and first.write(pages) is None and warnings() == []


def test_of_a_long_prompt_only_the_beginning_is_looked_for_when_none_of_it_is_there(tmp_path, monkeypatch):
    store, asked = ObjectStore(f"file://{tmp_path}"), []
    has = store._has
    monkeypatch.setattr(store, "_has", lambda page: asked.append(page) or has(page))
    assert store.find(prefix(1, num_pages=1000)) == set() and len(asked) == 16
    store.write(prefix(1, num_pages=17))
    asked.clear()
    assert len(store.find(prefix(1, num_pages=1000))) == 17 and len(asked) == 16 + 64 + 256


# ---- damage ------------------------------------------------------------------------------------------------------


def flip(data: bytes, place: int) -> bytes:
    damaged = bytearray(data)
    damaged[place] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, other: flip(data, 3),
        lambda data, other: flip(data, 20),
        lambda data, other: flip(data, 250),
        lambda data, other: flip(data, -9),
        lambda data, other: data[:-1],
        lambda data, other: data[:100],
        lambda data, other: b"",
        lambda data, other: other,
    ],
    ids=["magic", "header", "tokens", "payload", "cut", "stub", "empty", "another"],
)
def test_damage_is_a_miss_and_set_aside(open_store, warnings, damage):
    store, pages = open_store(), prefix(1)
    store.write(pages)
    one, other, _ = names(store)
    obstore.put(store._objects, one, damage(data_of(store, one), data_of(store, other)))
    assert check(store, pages) == check(store, pages) == 2
    assert len(warnings()) == 1 and "is damaged" in warnings()[0]
    assert names(store, "aside") == [f"aside/{one.rpartition('/')[2]}"] and store.contents().aside == 1
    assert store.write(pages) == 1 and check(store, pages) == 3, "it can be written again"


def test_pages_of_other_weights_under_the_same_name_are_misses(open_store, warnings):
    store, (page, *_) = open_store(), prefix(1)
    other = dataclasses.replace(page, fingerprint=page.fingerprint[:8] + b"x" * 24)  # the name has only 8 bytes of it
    store.write([other])
    assert store.find([page]) == {page.key} and store.read([page]) == [None]
    assert len(warnings()) == 1 and "of another model" in warnings()[0]


def test_verify_finds_what_is_damaged(open_store, warnings):
    store = open_store()
    store.write([*prefix(1), *prefix(2)])
    one, two, *_ = names(store)
    obstore.put(store._objects, one, data_of(store, two))
    obstore.put(store._objects, "pages/what/else/lies-here", b"x")
    assert store.verify() == (5, 1) and store.verify() == (5, 0) and len(warnings()) == 1
    assert store.prune(0) == 5 and store.contents().aside == 0
    assert names(store) == ["pages/what/else/lies-here"], "what is not ours stays"


# ---- the byte cap ------------------------------------------------------------------------------------------------


def test_the_byte_cap_holds_across_restarts_and_leaves_go_first(tmp_path):
    url = f"file://{tmp_path}"
    for number in range(5):
        store = ObjectStore(url, max_bytes=8 * SIZE)
        store.write(prefix(number))
        assert store.contents().bytes <= 8 * SIZE
        for path in (tmp_path / "pages").glob("*/*/*"):  # a second later
            os.utime(path, (0, path.stat().st_mtime - 1))
    assert [check(store, prefix(number)) for number in range(5)] == [0, 0, 1, 3, 3]
    assert store.read(prefix(2))[0] is not None, "what it continues stays longest"


def test_what_something_new_continues_stays(tmp_path):
    store, longer = ObjectStore(f"file://{tmp_path}"), prefix(0, num_pages=6)
    for age, pages in enumerate((longer[3:], prefix(1), longer[:3])):  # the longer, the older are the pages
        store.write(pages)
        for page in pages:
            (path,) = tmp_path.glob(f"pages/*/*/{page.digest.hex()}-0")
            os.utime(path, (0, 1e9 - age))
    assert store.prune(6 * SIZE) == 3
    assert check(store, longer) == 6 and check(store, prefix(1)) == 0


# ---- an engine ---------------------------------------------------------------------------------------------------


def make(windows=(None, None), **options) -> Any:
    """An engine that loads whatever it finds."""
    engine: Any = make_engine(windows, tokenizer=None, **options)
    engine.tiers.prefill.measured = lambda amount, seconds: None
    return engine


def text(seed: int, length: int = 33) -> list[int]:
    return np.random.default_rng(seed).integers(0, decoder.VOCAB, length).tolist()


def run(engine, prompts, windows=(None, None)):
    tokens = [[list(s.tokens) for s in samples] for samples in engine.generate(prompts, GREEDY)]
    assert tokens == [[decoder.dense_greedy(prompt, 6, windows)] for prompt in prompts], "tokens of a cold engine"
    return engine.stats()


@pytest.mark.parametrize(
    "windows",
    [(None, None), pytest.param(HYBRID, marks=pytest.mark.long)],  # which compiles for eight seconds
    ids=["plain", "hybrid"],
)
def test_a_conversation_goes_on_in_another_engine(server, url, monkeypatch, warnings, windows):
    in_environment(monkeypatch, server)
    prompts = [text(seed) for seed in range(3)]
    with make(windows, store=url) as first:
        run(first, prompts, windows)
    turns = [prompt + decoder.dense_greedy(prompt, 6, windows) + text(9, 5) for prompt in prompts]
    with make(windows, store=url) as second:
        stats = run(second, turns, windows)
    assert stats.loaded_tokens == {"store": 3 * 38}, "to the last token, which is in the middle of a page"
    assert stats.computed_tokens == 3 * (1 + 5 + 5) and warnings() == []
    with pytest.raises(ValueError, match="this engine is closed: make another one"):
        second.add_request(prompts[0])


def test_damaged_objects_are_computed_again(server, url, warnings):
    with ObjectStore(url, **server.options) as store:
        with make(store=store) as engine:
            run(engine, [text(0)])
        for name in names(store):
            obstore.put(store._objects, name, data_of(store, name)[:-1])
        for loaded in ({}, {"store": 32}):
            with make(store=store) as engine:
                assert run(engine, [text(0)]).loaded_tokens == loaded
    assert len(warnings()) == 1


def test_two_engines_at_once_share_a_store(server, url, warnings):
    prompts, errors, loaded = [text(seed % 4) for seed in range(8)], [], []

    def serve(shift: int) -> None:
        try:
            with make(store=ObjectStore(url, **server.options)) as engine:
                for prompt in prompts[shift:] + prompts[:shift]:
                    run(engine, [prompt])
                loaded.append(engine.stats().loaded_tokens.get("store", 0))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(shift,)) for shift in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and sum(loaded) > 0 and warnings() == []


# ---- networks that fail ------------------------------------------------------------------------------------------


def test_a_server_that_goes_away_in_the_middle(warnings, monkeypatch):
    monkeypatch.setattr("paged_jax.store.objects.REST", 0.2)
    with serving() as server, make(store=ObjectStore("s3://bucket/a", **server.options)) as engine:
        for seed in range(3):
            run(engine, [text(seed)])
        engine.flush()
        store, read = engine.tiers.store, engine.tiers.store.read

        def kill_and_read(pages):
            server.process.kill()
            server.process.wait()
            return read(pages)

        monkeypatch.setattr(store, "read", kill_and_read)
        for seed in range(3):  # the first is found, and then cannot be read
            assert run(engine, [text(seed)]).loaded_tokens == {}
        engine.flush()
        assert len(warnings()) == 2 and "cannot be read" in warnings()[0] and "cannot be written" in warnings()[1]
        monkeypatch.setattr(store, "read", read)
        with serving(server.port) as again:
            store._objects = from_url("s3://bucket/a", client_options={"allow_http": True}, **again.options)
            saved = engine.stats().saved_pages["store"]
            for seed in range(3, 60):  # it rests between two attempts
                run(engine, [text(seed)])
                engine.flush()
                if engine.stats().saved_pages["store"] > saved:
                    break
            assert engine.stats().saved_pages["store"] > saved
        assert len(warnings()) == 2


@pytest.mark.parametrize(
    "wrong", [{"secret_access_key": "wrong"}, {"access_key_id": "nobody"}], ids=lambda x: next(iter(x))
)
def test_wrong_credentials(server, url, warnings, wrong):
    with make(store=ObjectStore(url, **server.options | wrong)) as engine:
        for _ in range(2):
            run(engine, [text(0)])
        stats = engine.stats()
    assert stats.loaded_tokens == {} and stats.cached_tokens == 32
    assert len(warnings()) == 2
    for what, warning in zip(("be read", "be written"), warnings(), strict=True):
        assert warning.startswith(f"the store {url} cannot {what} (PermissionDeniedError: ")


def test_a_bucket_that_is_not_there(server, warnings):
    with make(store=ObjectStore("s3://nowhere/a", **server.options)) as engine:
        run(engine, [text(0)])
    assert len(warnings()) == 1 and "the store s3://nowhere/a cannot be written" in warnings()[0]


def test_a_server_that_does_not_answer_delays_nobody_for_long(server, warnings, monkeypatch):
    monkeypatch.setattr("paged_jax.engine.tiered.PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = server.options | {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        impatient = {"client_options": {"timeout": "1s"}, "retry_config": {"max_retries": 0}}
        store = ObjectStore("s3://bucket/a", **options, **impatient)
        asked, find = [], store.find
        monkeypatch.setattr(store, "find", lambda pages: asked.append(pages) or find(pages))
        with make(store=store) as engine:
            for seed in range(3):
                stats = run(engine, [text(seed)])
            assert len(asked) == 1, "only the first prompt waited"
    assert stats.loaded_tokens == {} and 1 <= len(warnings()) <= 2


# ---- what makes no sense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, options, message",
    [
        ("s4://bucket", {}, "the store 's4://bucket' cannot be opened .*give a URL such as s3://BUCKET/PREFIX"),
        ("s3://bucket", {"colour": "red"}, "cannot be opened .*colour"),
        ("file://", {}, "the store 'file://' names no folder: write file:///FOLDER"),
        ("memory:///", {"max_bytes": float("inf")}, "a size must be a whole number of bytes, got inf"),
        ("memory:///", {"max_bytes": 0}, r"ObjectStore\(max_bytes=0\): give at least one byte"),
    ],
)
def test_what_makes_no_sense_is_refused(url, options, message):
    with pytest.raises(ValueError, match=message):
        ObjectStore(url, **options)


def test_without_obstore_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ImportError, match=r"pip install 'paged_jax\[object-store\]'"):
        make_engine(tokenizer=None, store="s3://bucket/prefix")


# ---- the command line --------------------------------------------------------------------------------------------


def test_info_verify_and_prune(server, url, monkeypatch, capsys):
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: None)
    in_environment(monkeypatch, server)
    store = ObjectStore(url)
    store.write(prefix(1))
    assert main(["store", "info", url]) == 0
    expected = f"3 pages, {3 * SIZE} bytes\n  3 of the model {'66' * 8}\n0 damaged pages were set aside\n"
    assert capsys.readouterr().out == expected
    obstore.put(store._objects, names(store)[0], b"")
    assert main(["store", "verify", url]) == 1
    assert capsys.readouterr().out.startswith(f"2 pages are good, 1 were not and were set aside, in {url}/aside\n")
    assert main(["store", "prune", url, "--max-bytes", "1KiB"]) == 0
    assert capsys.readouterr().out.startswith("2 pages were removed\n0 pages, 0 bytes")
    assert main(["store", "info", "s4://x"]) == 2
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    for action in ("info", "verify"):
        assert main(["store", action, url]) == 2
        assert f"the store {url} does not answer (" in capsys.readouterr().err
