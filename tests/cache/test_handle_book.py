"""Handles on the host: wrong use raises, and says what to do."""

import numpy as np
import pytest

from paged_jax.cache.handle_book import HandleBook
from paged_jax.cache.handles import PageHandle
from paged_jax.cache.invariants import check
from paged_jax.cache.page_table import Fault, PageTable
from table_model import CONFIG, TRANSITIONS, B, P, S


@pytest.fixture
def book():
    return HandleBook()


@pytest.fixture
def table():
    """Row 0 holds S + 2 tokens."""
    return TRANSITIONS.reserve(PageTable.create(CONFIG), np.array([S + 2, 0, 0, 0, 0, 0], np.int32))[0]


def test_publish_attach_and_drop(book, table):
    table, handle = book.publish(table, 0, S + 1)
    assert isinstance(handle, PageHandle) and book.num_handles == 1
    table = book.attach(table, 1, handle)
    table = book.attach(table, 2, handle)
    check(table, [handle])
    table = book.drop(table, handle)
    check(table)
    assert book.num_handles == 0 and int(table.fault) == Fault(0)


def test_a_second_drop(book, table):
    table, handle = book.publish(table, 0, S)
    table = book.drop(table, handle)  # row 0 still owns the page, so the table itself cannot tell
    with pytest.raises(ValueError, match=r"handle 1 of epoch 0 is not out: .*each is dropped exactly once"):
        book.drop(table, handle)
    with pytest.raises(ValueError, match="is not out: it was dropped before"):
        book.attach(table, 1, handle)
    check(table)


def test_each_handle_is_dropped_for_itself(book, table):
    table, first = book.publish(table, 0, S)
    table, second = book.publish(table, 0, S)
    table = book.drop(table, first)
    check(table, [second])
    table = book.drop(table, second)
    assert int(table.num_free) == P - 1 - 2


def test_a_handle_of_another_book(book, table):
    table, handle = TRANSITIONS.publish(table, np.int32(0), np.int32(S), np.int32(0))
    with pytest.raises(ValueError, match="or this book did not publish it"):
        book.drop(table, handle)


def test_a_stale_epoch(book, table):
    table, handle = book.publish(table, 0, S)
    table = TRANSITIONS.reset(table)
    for use in (lambda: book.attach(table, 1, handle), lambda: book.drop(table, handle)):
        with pytest.raises(
            ValueError, match="this handle is of epoch 0, the table of epoch 1: a reset freed its pages"
        ):
            use()


def test_changed_weights_make_old_handles_stale(table):
    book = HandleBook(weights="step 1")
    table, handle = book.publish(table, 0, S)
    book.renew("step 2")
    with pytest.raises(ValueError, match="computed by weights 'step 1', the present ones are 'step 2': drop it"):
        book.attach(table, 1, handle)
    check(book.drop(table, handle))


def test_what_a_row_does_not_hold(book, table):
    for num_tokens in (-1, S + 3):
        with pytest.raises(ValueError, match=f"num_tokens={num_tokens} of row 0: it holds tokens up to {S + 2}"):
            book.publish(table, 0, num_tokens)
    with pytest.raises(ValueError, match=f"can be cut from {S} on"):
        book.publish(TRANSITIONS.slide(table, 3), 0, 1)
    for row in (-1, B):
        with pytest.raises(ValueError, match=f"row must lie in 0..{B - 1}, got {row}"):
            book.publish(table, row, 1)


def test_attach_wants_an_empty_row(book, table):
    table, handle = book.publish(table, 0, S)
    for row in (0, B):
        with pytest.raises(ValueError, match=f"cannot attach a handle to row {row}: there is no such row, or it is"):
            book.attach(table, row, handle)
