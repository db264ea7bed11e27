"""Handles on the host: wrong use raises, and says what to do."""

import jax
import numpy as np
import pytest

from paged_jax import CacheConfig, HandleBook, PageHandle, PageTables
from paged_jax.cache.fault import Fault
from paged_jax.cache.invariants import check

P, B, M, S = 24, 6, 5, 4
CONFIG = CacheConfig(2, 1, 8, P, B, M, page_size=S, windows=(None, 3), window_pages=P)
reserve, publish = jax.jit(PageTables.reserve), jax.jit(PageTables.publish)
slide, reset = jax.jit(PageTables.slide), jax.jit(PageTables.reset)


def check_all(tables, *handles):
    for group, table in enumerate(tables.groups):
        check(table, [each[group] for each in handles])


@pytest.fixture
def book():
    return HandleBook()


@pytest.fixture
def tables():
    """Row 0 holds S + 2 tokens."""
    return reserve(PageTables.create(CONFIG), np.array([S + 2, 0, 0, 0, 0, 0], np.int32))[0]


def test_publish_attach_and_drop(book, tables):
    tables, handles = book.publish(tables, 0, S + 1)
    assert len(handles) == 2 and all(isinstance(handle, PageHandle) for handle in handles) and book.num_handles == 1
    tables = book.attach(tables, 1, handles)
    tables = book.attach(tables, 2, handles)
    check_all(tables, handles)
    assert tables.lengths.tolist() == [S + 2, S + 1, S + 1, 0, 0, 0]
    tables = book.drop(tables, handles)
    check_all(tables)
    assert book.num_handles == 0 and int(tables.fault) == Fault(0)


def test_a_second_drop(book, tables):
    tables, handles = book.publish(tables, 0, S)
    tables = book.drop(tables, handles)  # row 0 still owns the page, so the tables themselves cannot tell
    with pytest.raises(ValueError, match=r"handle 1 of epoch 0 is not out: .*each is dropped exactly once"):
        book.drop(tables, handles)
    with pytest.raises(ValueError, match="is not out: it was dropped before"):
        book.attach(tables, 1, handles)
    check_all(tables)


def test_each_handle_is_dropped_for_itself(book, tables):
    tables, first = book.publish(tables, 0, S)
    tables, second = book.publish(tables, 0, S)
    tables = book.drop(tables, first)
    check_all(tables, second)
    tables = book.drop(tables, second)
    assert tables.num_free.tolist() == [P - 1 - 2] * 2


def test_a_handle_of_another_book(book, tables):
    tables, handles = publish(tables, np.int32(0), np.int32(S))
    with pytest.raises(ValueError, match="or this book did not publish it"):
        book.drop(tables, handles)


def test_a_stale_epoch(book, tables):
    tables, handles = book.publish(tables, 0, S)
    tables = reset(tables)
    for use in (lambda: book.attach(tables, 1, handles), lambda: book.drop(tables, handles)):
        with pytest.raises(
            ValueError, match="this handle is of epoch 0, the tables of epoch 1: a reset freed its pages"
        ):
            use()


def test_what_a_row_does_not_hold(book, tables):
    for num_tokens in (-1, S + 3):
        with pytest.raises(ValueError, match=f"num_tokens={num_tokens} of row 0: it holds {S + 2} tokens"):
            book.publish(tables, 0, num_tokens)
    for row in (-1, B):
        with pytest.raises(ValueError, match=f"row must lie in 0..{B - 1}, got {row}"):
            book.publish(tables, row, 1)


def test_a_row_is_published_only_where_its_next_token_sees_everything(book, tables):
    tables = slide(tables)  # the next token sees the last two, which stand in the second page
    with pytest.raises(ValueError, match="num_tokens=5 of row 0: it has given up pages that the token after them sees"):
        book.publish(tables, 0, S + 1)
    tables, handles = book.publish(tables, 0, S + 2)
    assert [np.count_nonzero(handle.pages) for handle in handles] == [2, 1]


def test_attach_wants_an_empty_row(book, tables):
    tables, handles = book.publish(tables, 0, S)
    for row in (0, B):
        with pytest.raises(ValueError, match=f"cannot attach a handle to row {row}: there is no such row, or it is"):
            book.attach(tables, row, handles)
