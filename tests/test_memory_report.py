"""Counts and pictures of the memory."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import toy
from paged_jax import CacheReport, MemoryReport, PageTables
from paged_jax.plot import CACHED, FREE, draw_pages, page_map, page_states

matplotlib.use("Agg")
reserve, fork = jax.jit(PageTables.reserve), jax.jit(PageTables.fork)


def rows(*values):
    return jnp.array(values, jnp.int32)


@pytest.fixture(scope="module")
def shared():
    """Rows of 10 and 6 tokens in pages of 4; two forks of the first, one of which drew 3 tokens."""
    tables, _ = reserve(PageTables.create(toy.config(num_pages=17)), rows(10, 6, 0, 0))
    tables, _ = fork(tables, rows(0, 0), rows(2, 3))
    return reserve(tables, rows(0, 0, 3, 0))[0]


@pytest.fixture(scope="module")
def cached(shared):
    """Two of the pages are held by a handle only."""

    @jax.jit
    def end(tables):
        return tables.publish(1, 6)[0].release(jnp.array([False, True, False, False]))

    return end(shared)


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


def test_pages_that_only_a_handle_holds_are_cached(cached):
    report = MemoryReport.measure(cached)
    assert report.pages_cached == 2 and report.sequence_pages == 5


def test_an_empty_table_wastes_nothing():
    report = MemoryReport.measure(PageTables.create(toy.config()))
    assert report.waste == 0 and report.saved_by_sharing == 0 and report.pages_in_use == 0


def test_the_terminal_picture_has_a_cell_for_every_page(cached):
    assert page_states(cached).tolist().count(CACHED) == 2
    assert page_states(cached).tolist().count(FREE) == 16 - 7
    text = page_map(cached, width=8).plain
    assert [len(line) for line in text.split("\n")] == [8, 8]
    assert sorted(text.replace("\n", "")) == sorted("33" + "2" + "cc" + "▒▒" + "·" * 9)


def test_the_notebook_picture_shows_every_page_and_every_mapped_column(shared):
    figure = draw_pages(shared, title="shared")
    (ax,) = figure.axes
    assert len(ax.patches) == 16 + 12
    assert ax.get_title(loc="left") == "shared"
    shown = [text.get_text() for text in ax.texts]
    pages = np.asarray(shared.groups[0].pages)
    in_rows = shown[shown.index("row 0") : shown.index("pool")]
    assert sorted(int(text) for text in in_rows if text.isdigit()) == sorted(pages[pages > 0].tolist())


def test_each_group_of_layers_is_counted_and_drawn_by_itself():
    """A row of 14 tokens, whose layer with a window of 4 has given up the pages that no later token sees."""
    config = toy.config(num_pages=17, windows=(None, 4), window_pages=9)
    tables = jax.jit(lambda tables: tables.reserve(rows(14, 0, 0, 0))[0].slide())(PageTables.create(config))
    report = CacheReport.measure(tables, config)
    assert [group.num_pages for group in report.groups] == [16, 8]
    assert [group.pages_in_use for group in report.groups] == [4, 2]
    assert [group.pages_given_up for group in report.groups] == [0, 2]
    assert report.saved_by_windows == 1 - 6 / 8
    assert report.bytes_in_use == (4 * config.layer_page_bytes, 2 * config.layer_page_bytes)
    assert page_map(tables, 1).plain.count("a") == 2 and len(page_map(tables, 1).plain) == 8
    assert len(draw_pages(tables, 1).axes[0].patches) == 8 + 2
