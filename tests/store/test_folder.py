"""The store: what is written is found, and what is damaged is a miss, said once, and set aside."""

import dataclasses
import random
import shutil
import sqlite3
from pathlib import Path

import pytest
from store_cases import LARGE, SMALL, bytes_on_disk, check, prefix, read

from paged_jax.store import Store, open_store
from paged_jax.store.page_file import Damaged, pack, unpack


@pytest.mark.parametrize("num_bytes", [SMALL, LARGE])
def test_what_is_written_is_found_by_every_process(tmp_path, warnings, num_bytes):
    pages = prefix(1, num_bytes=num_bytes)
    first = Store(tmp_path)
    assert check(first, pages) == 0
    assert first.write(pages) == 3 and first.write(pages) == 0
    other = Store(tmp_path)
    assert check(first, pages) == check(other, pages) == 3
    first.close()
    assert not first.is_open and check(first, pages) == 0 and first.write(pages) is None
    assert check(Store(tmp_path), pages) == 3 and other.verify() == (3, 0)
    contents = other.contents()
    assert contents.pages == 3 and contents.inline_pages == (3 if num_bytes == SMALL else 0)
    assert warnings() == [] and not list((tmp_path / "writing").glob("*/*"))


def test_the_first_of_two_equal_pages_stays_and_leaves_no_file_behind(tmp_path):
    pages, store = prefix(1), Store(tmp_path)
    others = [dataclasses.replace(page, payload=bytes(LARGE)) for page in pages]
    assert store.write(pages) == 3 and store.write(others) == 0
    assert check(store, pages) == 3 and len(list((tmp_path / "pages").iterdir())) == 3


# ---- the byte cap ------------------------------------------------------------------------------------------------


def test_the_byte_cap_holds_across_restarts_and_leaves_go_first(tmp_path):
    size = len(pack(prefix(0)[0]))
    for number in range(5):
        store = Store(tmp_path, max_bytes=7 * size)
        store.write(prefix(number))
        assert bytes_on_disk(store) == store.contents().bytes <= 7 * size
        store.close()
    store = Store(tmp_path, max_bytes=7 * size)
    assert [check(store, prefix(number)) for number in range(5)] == [0, 0, 1, 3, 3]
    assert read(store, prefix(2)[0]) is not None, "what it continues stays longest"


def test_what_was_used_stays(tmp_path):
    store, size = Store(tmp_path), len(pack(prefix(0)[0]))
    for number in range(3):
        store.write(prefix(number))
    store.touch(prefix(0)[2:])
    assert store.prune(4 * size) == 5
    assert [check(store, prefix(number)) for number in range(3)] == [3, 0, 1]


def test_what_a_new_page_continues_was_used_too(tmp_path):
    store, size = Store(tmp_path), len(pack(prefix(0)[0]))
    longer = prefix(0, num_pages=6)
    for pages in (longer[:3], prefix(1), longer[3:]):
        store.write(pages)
    store.prune(6 * size)
    assert check(store, longer) == 6 and check(store, prefix(1)) == 0


@pytest.mark.parametrize(
    "size, reason",
    [
        (0, "give at least one byte, or None for no limit"),
        (-1, "give at least one byte, or None for no limit"),
        (1.5, "a size must be a whole number of bytes"),
        ("9 apples", "write a number of bytes, or one with a unit"),
    ],
)
def test_other_caps_are_refused(tmp_path, size, reason):
    with pytest.raises(ValueError, match=rf"Store\(max_bytes={size!r}\): .*{reason}"):
        Store(tmp_path, max_bytes=size)


def test_a_cap_may_be_written_as_a_size(tmp_path):
    assert Store(tmp_path, max_bytes="3KiB").max_bytes == 3 * 1024


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        Store(tmp_path / "file")


@pytest.mark.parametrize("where", ["", Path("s3://bucket/prefix"), "file:store", Path("FILE:///store")], ids=str)
def test_what_is_no_folder_is_not_made_one(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name a folder|write a URL as a str"):
        open_store(where)
    assert not list(tmp_path.iterdir())


# ---- damage ------------------------------------------------------------------------------------------------------


def files(store: Store):
    return sorted((store.folder / "pages").iterdir())


def is_miss(store: Store, pages, warnings, *, num_aside: int = 1) -> bool:
    """One page is a miss, now and later, with one warning; the others are read."""
    assert check(store, pages) == check(store, pages) == len(pages) - 1
    assert len(warnings()) == 1 and "is damaged" in warnings()[0]
    return len(list((store.folder / "aside").iterdir())) == num_aside


def flips(num: int):
    """Bytes of a file, those of its header first, and what is done to each."""
    chosen = random.Random(0)
    header = range(len(pack(prefix(1)[0])) - LARGE)
    places = [*header, *(chosen.randrange(header.stop, LARGE + header.stop) for _ in range(num))]
    return [(place, 1 << chosen.randrange(8)) for place in places]


@pytest.mark.parametrize(
    "num",
    [50, pytest.param(2000, marks=pytest.mark.long)],  # the whole number that the guarantee names
)
def test_no_flipped_bit_passes_the_checks(num):
    data = pack(prefix(1)[0])
    assert unpack(data) == prefix(1)[0]
    for place, bit in flips(num):
        damaged = bytearray(data)
        damaged[place] ^= bit
        with pytest.raises(Damaged):
            unpack(bytes(damaged))
    for stop in [*range(0, 400, 7), len(data) - 1]:
        with pytest.raises(Damaged):
            unpack(data[:stop])
    with pytest.raises(Damaged, match="bytes where its header says"):
        unpack(data + b"\0")


@pytest.mark.parametrize("place", [3, 20, 200, -1])
def test_a_flipped_bit_on_the_disk_is_a_miss(tmp_path, warnings, place):
    store, pages = Store(tmp_path), prefix(1)
    store.write(pages)
    data = bytearray(files(store)[1].read_bytes())
    data[place] ^= 1
    files(store)[1].write_bytes(data)
    assert is_miss(store, pages, warnings)
    assert store.write(pages) == 1 and check(store, pages) == 3, "it can be written again"


def test_a_flipped_bit_in_the_index_is_a_miss(tmp_path, warnings):
    store, pages = Store(tmp_path), prefix(1, num_bytes=SMALL)
    store.write(pages)
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        (data,) = index.execute("SELECT inline FROM pages WHERE digest=?", (pages[0].digest,)).fetchone()
        index.execute("UPDATE pages SET inline=? WHERE digest=?", (data[:-9] + b"x" + data[-8:], pages[0].digest))
    assert is_miss(store, pages, warnings, num_aside=0)


def test_truncated_files_are_misses(tmp_path, warnings):
    store, pages = Store(tmp_path), prefix(1)
    store.write(pages)
    for path, size in zip(files(store), (0, 100, LARGE), strict=True):
        with path.open("rb+") as file:
            file.truncate(size)
    assert check(store, pages) == 0 and len(warnings()) == 1


def test_a_file_that_is_gone_is_a_miss(tmp_path, warnings):
    store, pages = Store(tmp_path), prefix(1)
    store.write(pages)
    files(store)[0].unlink()
    assert is_miss(store, pages, warnings, num_aside=0)


def test_swapped_files_are_misses(tmp_path, warnings):
    store, pages = Store(tmp_path), prefix(1)
    store.write(pages)
    one, two, _ = files(store)
    for old, new in ((one, tmp_path / "x"), (two, one), (tmp_path / "x", two)):
        old.rename(new)
    assert check(store, pages) == 1 and len(warnings()) == 1
    assert "one of other tokens" in warnings()[0]


@pytest.mark.parametrize("lie", ["name", "digest"])
def test_an_index_that_lies_is_a_miss(tmp_path, warnings, lie):
    store, pages = Store(tmp_path), prefix(1)
    store.write(pages)
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        if lie == "name":
            (other,) = index.execute("SELECT name FROM pages WHERE depth=3").fetchone()
            index.execute("UPDATE pages SET name=? WHERE depth=1", (other,))
        else:
            index.execute("UPDATE pages SET digest=? WHERE depth=1", (prefix(2)[0].digest,))
    assert read(store, (prefix(2) if lie == "digest" else pages)[0]) is None
    assert len(warnings()) == 1
    assert check(store, pages) <= 2 and check(store, prefix(2)) == 0


@pytest.mark.parametrize("name", ["../../precious", "/etc/hostname", "", "7"])
def test_an_index_never_names_a_file_outside_of_the_folder(tmp_path, warnings, name):
    (tmp_path / "precious").write_bytes(b"not ours")
    store, pages = Store(tmp_path / "store"), prefix(1)
    store.write(pages)
    with sqlite3.connect(tmp_path / "store/index.sqlite") as index:
        index.execute("UPDATE pages SET name=? WHERE depth=1", (name,))
    assert read(store, pages[0]) is None
    assert len(warnings()) == 1
    store.prune(1)
    assert (tmp_path / "precious").read_bytes() == b"not ours"


@pytest.mark.parametrize("damage", ["deleted", "garbage", "flipped", "half"])
def test_a_lost_index_is_made_again_from_the_files(tmp_path, warnings, damage):
    store, pages = Store(tmp_path), [*prefix(1), *prefix(2)]
    store.write(pages)
    store.close()
    path = tmp_path / "index.sqlite"
    data = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"no database" * 1000)
    elif damage == "flipped":
        data[: len(data) // 2] = bytes(x ^ 0x5A for x in data[: len(data) // 2])
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2])
    store = Store(tmp_path, max_bytes=1 << 30)
    assert check(store, pages) == 6 and store.verify() == (6, 0)
    assert len(warnings()) == (damage != "deleted")


def test_an_index_that_is_damaged_while_it_is_used(tmp_path, warnings):
    store, pages = Store(tmp_path), [page for number in range(60) for page in prefix(number)]
    store.write(pages)
    store.close()
    data = bytearray((tmp_path / "index.sqlite").read_bytes())
    for place in range(3 * 4096, len(data)):  # all but the pages that it reads first
        data[place] ^= 0xFF
    (tmp_path / "index.sqlite").write_bytes(data)
    store = Store(tmp_path)
    check(store, pages)
    assert check(store, pages) == len(pages), "after the first that failed, the index is made again from the files"
    assert len(warnings()) == 1 and "made again from the files" in warnings()[0]


def test_damaged_files_that_nobody_names_are_set_aside(tmp_path, warnings):
    store, pages = Store(tmp_path), prefix(1)
    store.write(pages)
    store.close()
    (tmp_path / "index.sqlite").unlink()
    one, *_ = files(store)
    one.write_bytes(one.read_bytes()[:-1])
    shutil.copy(files(store)[1], tmp_path / "pages" / "another-name")
    assert check(Store(tmp_path), pages) == 2
    assert len(warnings()) == 1 and len(list((tmp_path / "aside").iterdir())) == 2


def test_pages_of_another_layout_version_are_misses(tmp_path, monkeypatch, warnings):
    store, pages = Store(tmp_path), prefix(1)
    monkeypatch.setattr("paged_jax.store.page_file.VERSION", 2)
    store.write(pages)
    monkeypatch.undo()
    assert check(store, pages) == 0 and "the layout is version 2, and version 1 is read" in warnings()[0]
