"""`paged_jax store`: what is there, whether it is good, and less of it."""

import pytest
from store_cases import prefix

from paged_jax.cli import main
from paged_jax.store import Store


@pytest.fixture(autouse=True)
def nothing_is_kept_on_disk(monkeypatch):
    """Of compiled programs."""
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: None)


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["info", "nowhere"],
            "nowhere is no store: it has no folder of pages, and is no URL such as s3://bucket/prefix",
        ),
        (["info", "file:///no%20such/folder"], "file:///no%20such/folder is no store: there is no such folder"),
        (["prune", "."], "prune needs --max-bytes: how much of the pages stays, such as 4GiB"),
        (["info", ".", "--max-bytes", "3"], "--max-bytes is for prune: leave it out of info"),
        (["prune", ".", "--max-bytes=-3"], "'-3' is no size: write a number of bytes, or one with a unit, as in 16GiB"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "pages").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["store", *arguments]) == 2
    assert capsys.readouterr().err == f"paged_jax: {message}\n"


def test_a_folder_by_its_url_is_looked_into_and_none_is_made(tmp_path, capsys):
    folder = tmp_path / "a folder"
    url = folder.as_uri()
    assert main(["store", "info", url]) == 2
    assert not folder.exists()
    folder.mkdir()
    for same in (url, url.replace("file:///", "file://localhost/")):
        assert main(["store", "info", same]) == 0
        assert capsys.readouterr().out.startswith("0 pages, 0 bytes")
