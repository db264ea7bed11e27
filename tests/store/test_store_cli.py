"""`paged_jax store`: what is there, whether it is good, and less of it."""

import functools

import pytest
from store_cases import prefix

from paged_jax import models
from paged_jax.cli import main
from paged_jax.engine import Engine
from paged_jax.store import Store


@pytest.fixture(autouse=True)
def nothing_is_kept_on_disk(monkeypatch):
    """Of compiled programs; and a model that is loaded again is compiled again."""
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: None)
    monkeypatch.setattr(models, "load", functools.cache(models.load))


def test_info_verify_and_prune(tmp_path, capsys):
    store = Store(tmp_path)
    store.write([*prefix(1), *prefix(2, num_bytes=300)])
    total = store.contents().bytes
    store.close()
    assert main(["store", "info", str(tmp_path)]) == 0
    expected = (
        f"6 pages, {total} bytes, 3 of them in the index\n  6 of the model {'66' * 8}\n0 damaged pages were set aside\n"
    )
    assert capsys.readouterr().out == expected
    path = next((tmp_path / "pages").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["store", "verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"5 pages are good, 1 were not and were set aside, in {tmp_path / 'aside'}\n5 pages, ")
    assert out.endswith("1 damaged pages were set aside\n")
    assert main(["store", "prune", str(tmp_path), "--max-bytes", "0"]) == 0
    assert capsys.readouterr().out.startswith("5 pages were removed\n0 pages, 0 bytes")


@pytest.fixture
def statistics(monkeypatch):
    """Of the engines that were closed."""
    found, close = [], Engine.close

    def close_and_keep(engine):
        close(engine)
        found.append(engine.stats())

    monkeypatch.setattr(Engine, "close", close_and_keep)
    return found


def test_generate_finds_what_an_earlier_call_has_stored(tmp_path, capsys, statistics):
    command = ["generate", 20 * "x = 1\n", "--max-new-tokens", "4", "--page-size", "4", "--store", str(tmp_path)]
    outputs = []
    for _ in range(2):
        assert main([*command, "--host-cache-bytes", "1MiB"]) == 0
        outputs.append(capsys.readouterr().out)
    first, second = statistics
    assert outputs[0] == outputs[1] and first.loaded_tokens == {}
    assert second.loaded_tokens["store"] == second.prompt_tokens - 1
    assert f"{second.prompt_tokens - 1} tokens loaded from the store; 0 pages in host memory" in second.summary


def test_chat_has_the_same_options(monkeypatch):
    seen = {}

    def from_pretrained(folder, **options):
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    assert main(["chat", "--store", "there", "--host-cache-bytes", "2GiB"]) == 2
    assert (seen["store"], seen["host_cache_bytes"]) == ("there", "2GiB")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host-cache-bytes", "much"], "host_cache_bytes='much': 'much' is no size: write a number of bytes"),
        (["--store", "s4://x"], "the store 's4://x' cannot be opened"),
        (["--store", __file__], "is a file: name a folder"),
    ],
)
def test_what_makes_no_sense_for_an_engine_is_refused(capsys, options, message):
    assert main(["generate", "x", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["info", "nowhere"], "nowhere is no store: it has no folder of pages"),
        (["prune", "."], "`prune` needs --max-bytes, and the other actions take none"),
        (["info", ".", "--max-bytes", "3"], "`prune` needs --max-bytes, and the other actions take none"),
        (["prune", ".", "--max-bytes=-3"], "'-3' is no size: write a number of bytes, or one with a unit, as in 16GiB"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["store", *arguments]) == 2
    assert capsys.readouterr().err == f"paged_jax: {message}\n"
