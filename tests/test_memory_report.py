"""Counts and pictures of the memory."""

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import toy
from paged_jax import MemoryReport, PageTable
from paged_jax.plot import CACHED, FREE, draw_pages, page_map, page_states

matplotlib.use("Agg")


def rows(*values):
    return jnp.array(values, jnp.int32)


@pytest.fixture(scope="module")
def shared():
    """Rows of 10 and 6 tokens in pages of 4; two forks of the first, one of which drew 3 tokens."""
    table, _ = PageTable.create(toy.config(num_pages=17)).reserve(rows(10, 6, 0, 0))
    table, _ = table.fork(rows(0, 0), rows(2, 3))
    table, _ = table.reserve(rows(0, 0, 3, 0))
    return table


def test_a_report_counts_pages_slots_and_sharing(shared):
    report = MemoryReport.measure(shared)
    assert report.num_sequences == 4 and report.tokens == 10 + 6 + 13 + 10 and report.longest == 13
    assert report.pages_mapped == 3 + 2 + 4 + 3
    assert report.pages_in_use == report.sequence_pages == 3 + 2 + 2  # the fork copied one page and took one
    assert report.pages_shared == 3
    assert report.slots_filled == 10 + 6 + (13 - 8)
    assert report.waste == 1 - 21 / 28
    assert report.saved_by_sharing == 1 - 7 / 12
    assert report.contiguous_slots(64) == 4 * 64


def test_pages_that_only_a_handle_holds_are_cached(shared):
    table, _ = shared.publish(1, 6)
    table = table.release(jnp.array([False, True, False, False]))
    report = MemoryReport.measure(table)
    assert report.pages_cached == 2 and report.sequence_pages == 5


def test_an_empty_table_wastes_nothing():
    report = MemoryReport.measure(PageTable.create(toy.config()))
    assert report.waste == 0 and report.saved_by_sharing == 0 and report.pages_in_use == 0


def test_the_terminal_picture_has_a_cell_for_every_page(shared):
    table, _ = shared.publish(1, 6)
    table = table.release(jnp.array([False, True, False, False]))
    assert page_states(table).tolist().count(CACHED) == 2
    assert page_states(table).tolist().count(FREE) == 16 - 7
    text = page_map(table, width=8).plain
    assert [len(line) for line in text.split("\n")] == [8, 8]
    assert sorted(text.replace("\n", "")) == sorted("33" + "2" + "■■" + "▒▒" + "·" * 9)


def test_the_notebook_picture_shows_every_page_and_every_mapped_column(shared):
    figure = draw_pages(shared, title="shared")
    (ax,) = figure.axes
    assert len(ax.patches) == 16 + 12
    assert ax.get_title(loc="left") == "shared"
    numbers = [int(t.get_text()) for t in ax.texts if t.get_text().isdigit()]
    assert sorted(numbers) == sorted(np.asarray(shared.pages)[np.asarray(shared.pages) > 0].tolist())
