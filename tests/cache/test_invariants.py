"""Each invariant is broken by hand and named, on the host and in jit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.cache.invariants import InvariantError, Violation, check, violations
from paged_jax.cache.page_table import PageTable
from table_model import CONFIG, TRANSITIONS, B, S

bits = jax.jit(violations)
NOTHING_HELD = np.zeros(2, np.int32)


@pytest.fixture(scope="module")
def table() -> PageTable:
    """Rows 0 and 1 share a full page (1) and a partial one (2), row 2 owns page 3, row 3 is behind its window."""
    table = PageTable.create(CONFIG)
    table, _ = TRANSITIONS.reserve(table, np.array([S + 2, 0, 1, 0, 0, 0], np.int32))
    table, _ = TRANSITIONS.fork(table, np.array([0, -1, -1, -1], np.int32), np.array([1, -1, -1, -1], np.int32))
    table, _ = TRANSITIONS.reserve(table, np.array([0, 0, 0, 2 * S, 0, 0], np.int32))
    return table


def test_a_sound_table(table):
    check(table)
    assert int(bits(table, NOTHING_HELD)) == 0


def put(field, index, value):
    return lambda table: dataclasses.replace(table, **{field: getattr(table, field).at[index].set(value)})


BREAK = {
    "the null page is owned": (
        put("refcounts", 0, 2),
        Violation.NULL_PAGE,
        "the null page has another refcount than 1$",
    ),
    "a negative refcount": (
        put("refcounts", 2, -1),
        Violation.NEGATIVE_REFCOUNT | Violation.REFCOUNT,
        "a page has a refcount below 0: pages 2\n",
    ),
    "a reference too many": (put("refcounts", 2, 3), Violation.REFCOUNT, "how often it stands in .*: pages 2$"),
    "a leaked page": (
        put("refcounts", 9, 1),
        Violation.REFCOUNT | Violation.NUM_FREE | Violation.FREE_STACK,
        "num_free is not how many",
    ),
    "a wrong count of free pages": (
        put("num_free", (), 3),
        Violation.NUM_FREE | Violation.FREE_STACK,
        "num_free is not how many pages have refcount 0\nthe free",
    ),
    "a page twice on the stack": (put("free_stack", 0, 22), Violation.FREE_STACK, "the free stack .*: pages 22, 23$"),
    "an owned page on the stack": (put("free_stack", 0, 1), Violation.FREE_STACK, "the free stack .*: pages 1, 23$"),
    "a negative length": (put("lengths", 4, -1), Violation.LENGTH, "a row's length or first column .*: rows 4"),
    "a length beyond the row": (
        put("lengths", 2, 99),
        Violation.LENGTH | Violation.MAPPING,
        "a row's length or first column .*: rows 2",
    ),
    "an empty row behind a window": (put("first_column", 5, 1), Violation.LENGTH, "first column .*: rows 5"),
    "a length without a page": (put("lengths", 2, S + 1), Violation.MAPPING, "inside its mapped columns.*: rows 2"),
    "a page behind the length": (put("lengths", 3, S), Violation.MAPPING, "or one outside: rows 3"),
    "a page that does not exist": (
        put("pages", (2, 0), 24),
        Violation.MAPPING | Violation.REFCOUNT,
        "a row has no page .*: rows 2",
    ),
    "a page twice in a row": (
        put("pages", (0, 1), 1),
        Violation.REPEATED_PAGE | Violation.REFCOUNT,
        "a row holds a page twice: rows 0",
    ),
}


@pytest.mark.parametrize("name", BREAK)
def test_what_is_broken_is_named(table, name):
    change, expected, message = BREAK[name]
    broken = change(table)
    assert Violation(int(bits(broken, NOTHING_HELD))) == expected
    with pytest.raises(InvariantError, match=message) as error:
        check(broken)
    assert error.value.violations == expected


def test_pages_of_handles_count(table):
    published, handle = TRANSITIONS.publish(table, np.int32(0), np.int32(S), np.int32(0))
    check(published, [handle])
    check(published, [np.array([1])])
    with pytest.raises(InvariantError, match="in rows and handles: pages 1$"):
        check(published)
    with pytest.raises(InvariantError, match="in rows and handles: pages 1, 2$"):
        check(table, [handle, handle, np.array([2, 0])])


def test_an_append_to_a_shared_page(table):
    appended = np.zeros(B, np.int32)
    appended[0] = 1
    assert int(bits(table, NOTHING_HELD, appended)) == Violation.SHARED_APPEND
    with pytest.raises(InvariantError, match="appended to a page that has other owners: rows 0$"):
        check(table, appended=jnp.asarray(appended))
    appended[:] = 0
    appended[3] = 2 * S
    check(table, appended=jnp.asarray(appended))


def test_long_lists_are_cut(table):
    with pytest.raises(InvariantError, match=r"pages 1, 2, 3, 4, 5, 6, 7, 8, \.\.\."):
        check(dataclasses.replace(table, refcounts=jnp.full_like(table.refcounts, 7)))
