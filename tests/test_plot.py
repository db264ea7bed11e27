"""Pictures of the memory, and what is printed of it."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from rich.console import Console

import toy
from paged_jax import CacheReport, KVCache, MemoryReport, PagePool, PageTables, plot
from paged_jax.cache.show import page_ranges
from paged_jax.engine.stats import Event
from paged_jax.memory import find_tables

matplotlib.use("Agg")
CONFIG = toy.config(num_pages=25, max_sequences=5)


def rows(*values):
    return jnp.array(values, jnp.int32)


@jax.jit
def make():
    """Row 0 and its forks 1 and 2, of which 2 was forked again to 3; row 4 is gone, but a handle keeps 6 tokens."""
    tables, _ = PageTables.create(CONFIG).reserve(rows(10, 0, 0, 0, 6))
    tables, _ = tables.publish(4, 6)
    tables = tables.release(jnp.array([False, False, False, False, True]))
    tables, _ = tables.fork(rows(0, 0), rows(1, 2))
    tables, _ = tables.reserve(rows(3, 3, 3, 0, 0))
    tables, _ = tables.fork(rows(2), rows(3))
    return tables.reserve(rows(2, 2, 2, 2, 0))[0]


@pytest.fixture(scope="module")
def tables():
    return make()


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def labels(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def check_nothing_overlaps(figure) -> None:
    """Texts of one axes must not overlap, nor leave the picture."""
    figure.canvas.draw()
    whole = figure.bbox
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
        for i, box in enumerate(boxes):
            assert box.x0 >= whole.x0 - 1 and box.x1 <= whole.x1 + 1 and box.y0 >= whole.y0 - 1, "a text is cut"
            assert not any(box.overlaps(other) for other in boxes[:i]), "two texts overlap"


def test_printing_tables_says_who_owns_and_shares_what(tables):
    text = repr(tables)
    assert "4 of 5 rows hold 60 tokens, in pages of 4 tokens" in text
    report = MemoryReport.measure(tables)
    assert f"{report.pages_in_use} of 24 pages in use ({report.pages_shared} shared, 2 only cached)" in text
    cells = text.split("\n")[2].strip()
    assert len(cells) == 24 and cells.count("▒") == 2 and cells.count("4") == 2, "two pages have four rows"
    assert cells.count("2") == 1 and cells.count("·") == 24 - report.pages_in_use
    assert {"a", "b", "c", "d"} <= set(cells)
    pages = np.asarray(tables.groups[0].pages[1])
    assert f"row 1: 15 tokens in pages {page_ranges(pages[pages > 0].tolist())}" in text


def test_printing_never_fails_for_want_of_values(tables):
    seen = []

    def look(cache):
        seen.append((repr(cache.tables), repr(cache.pool), repr(cache), cache._repr_html_()))
        return cache

    cache = KVCache(tables, PagePool.create(CONFIG))
    jax.jit(look)(cache)
    jax.eval_shape(look, cache)
    for texts in seen:
        assert all("inside a traced function" in text for text in texts) and all("24 pages" in text for text in texts)
    for tree in (cache.tables, cache.pool):
        assert "with int in the place of arrays" in repr(jax.tree.map(lambda x: 1, tree))
        assert "ShapeDtypeStruct" in jax.eval_shape(lambda tree=tree: tree)._repr_html_()
        consumed = jax.tree.map(jnp.copy, tree)
        jax.tree.leaves(consumed)[0].delete()
        assert "consumed: a jitted call to which it was donated" in repr(consumed)
    assert "a stack of several" in repr(jax.tree.map(lambda x: np.stack([x, x]), tables))
    nothing = jax.tree.unflatten(jax.tree.structure(0), [0])
    assert "something else in the place of tables" in repr(dataclasses.replace(tables, groups=nothing))


def test_in_a_notebook_tables_and_pools_are_pictures(tables):
    html = tables._repr_html_()
    assert html.count("<rect") == 24 and "<title>page 1: rows 0, 1, 2, 3</title>" in html
    pool = PagePool.create(toy.config(windows=(None, 4), window_pages=9))
    assert "layer 1 with a window of 4 tokens" in pool._repr_html_() and "2 KV heads of 16 in float32" in repr(pool)
    assert (KVCache(tables, pool)._repr_html_()).count("<rect") == 24


def test_a_large_pool_is_printed_in_few_cells():
    tables = PageTables.create(toy.config(num_pages=5001))
    assert "a cell stands for 10 pages" in repr(tables) and len(repr(tables)) < 1200
    assert "4488 more pages are not drawn" in tables._repr_html_()
    assert not [label for label in labels(plot.draw_pages(tables)) if label.isdigit()]


def test_reports_and_pictures_take_what_one_has_in_hand(tables):
    cache = KVCache(tables, PagePool.create(CONFIG))
    for source in (cache, tables, tables.groups[0]):
        assert MemoryReport.measure(source) == MemoryReport.measure(tables)
    assert CacheReport.measure(cache, CONFIG).bytes_in_use == CacheReport.measure(tables, CONFIG).bytes_in_use
    with pytest.raises(ValueError, match="type PagePool, which has no page tables: pass an Engine, a KVCache"):
        find_tables(cache.pool)
    with pytest.raises(ValueError, match="need the sizes of its cache: pass its CacheConfig"):
        CacheReport.measure(cache)


def test_the_picture_of_the_pages_names_owners_and_wraps_long_rows(tables):
    figure = plot.draw_pages(tables, title="shared", width=6)
    check_nothing_overlaps(figure)
    pages = np.asarray(tables.groups[0].pages)
    report = MemoryReport.measure(tables)
    assert len(figure.axes[0].patches) == 24 + np.count_nonzero(pages)
    assert labels(figure).count("×4") == 2 and report.pages_shared == 3


def test_the_sharing_tree_is_that_of_the_forks(tables):
    branches = plot.sharing_branches(tables)
    assert sum(len(b.pages) for b in branches) == MemoryReport.measure(tables).sequence_pages
    root, *rest = branches
    assert root.rows == (0, 1, 2, 3) and root.pages == (1, 2) and root.refcounts == (4, 4) and root.parent is None
    twins = [b for b in rest if b.rows == (2, 3)]
    assert len(twins) == 1 and twins[0].refcounts == (2,)
    figure = plot.draw_forks(tables)
    check_nothing_overlaps(figure)
    assert len(figure.axes[0].patches) == len(branches) and "1-2 (×4)" in labels(figure)
    console = Console(file=io.StringIO(), width=80)
    console.print(plot.fork_tree(tables))
    assert "pages 1-2 (×4)" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]  a StringIO
    assert plot.sharing_branches(PageTables.create(CONFIG)) == [] and plot.draw_forks(PageTables.create(CONFIG))


def test_bytes_are_those_of_the_report(tables):
    figure = plot.draw_bytes(tables, CONFIG)
    widths = [
        bar.get_path().transformed(bar.get_patch_transform()).get_extents().width for bar in figure.axes[0].patches
    ]
    report = CacheReport.measure(tables, CONFIG)
    token = CONFIG.page_bytes / 4
    assert np.allclose(widths, [
        4 * 64 * token, 4 * 16 * token, report.mapped_bytes, sum(report.bytes_in_use), report.ideal_bytes
    ])  # fmt: skip
    assert report.ideal_bytes == MemoryReport.measure(tables).slots_filled * token


def test_the_history_is_drawn_moment_by_moment(tables):
    history = [plot.page_states(PageTables.create(CONFIG)), plot.page_states(tables)]
    figure = plot.draw_occupancy(history)
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image.shape == (24, 2) and np.all(image[:, 0] == 0) and image[0, 1] == 5
    with pytest.raises(ValueError, match=r"append page_states\(engine\) to it after each step"):
        plot.draw_occupancy([])


def test_capacity_is_a_line_for_each_policy():
    points = [plot.CapacityPoint(64, 0.1, 90), plot.CapacityPoint(128, 0.2, 10)]
    figure = plot.draw_capacity({"a": points, "b": points})
    assert [len(ax.lines) for ax in figure.axes] == [2, 2]
    assert np.asarray(figure.axes[0].lines[0].get_ydata()).tolist() == [10, 20]


LOG = [
    Event(10.0, "queued", 0, 0, 5), Event(10.0, "queued", 1, 0, 5), Event(10.5, "admitted", 0, 0, 0),
    Event(11.0, "prefilled", 0, 0, 5), Event(11.0, "decoded", 0, 0, 1), Event(11.5, "admitted", 1, 0, 0),
    Event(12.0, "prefilled", 1, 0, 5), Event(12.0, "decoded", 1, 0, 1), Event(12.5, "preempted", None, None, 1),
    Event(12.5, "preempted", 1, 0, 1), Event(13.0, "decoded", 0, 0, 4), Event(13.0, "finished", 0, 0, 5),
    Event(14.0, "decoded", 1, 0, 1), Event(15.0, "evicted", None, None, 3),
]  # fmt: skip


def test_the_timeline_is_what_the_log_says():
    spans = [(s.request, s.kind, s.start, s.stop) for s in plot.request_spans(LOG)]
    assert spans == [
        (0, "waiting", 0, 0.5), (0, "prefill", 0.5, 1), (0, "decode", 1, 3),
        (1, "waiting", 0, 1.5), (1, "prefill", 1.5, 2), (1, "decode", 2, 2.5), (1, "preempted", 2.5, 4),
        (1, "decode", 4, 5),
    ]  # fmt: skip
    figure = plot.draw_timeline(LOG)
    assert len(figure.axes[0].patches) == len(spans) and len(figure.axes[0].lines) == 1, "one preemption has no name"
    first, second, legend = plot.timeline_map(LOG, width=10).plain.split("\n")
    assert first == "0.0 ·▒████" and second == "1.0 ···▒█xxx██" and "5.0 s in all" in legend


def test_latencies_are_from_the_request_to_the_first_piece_and_between_pieces():
    found = plot.latencies(LOG)
    assert found.first_token.tolist() == [1, 2] and found.gaps.tolist() == [2, 2]
    assert len(plot.draw_latencies(LOG).axes) == 2
    assert len(plot.draw_latencies([]).axes) == 2 and plot.draw_timeline([])


def test_pictures_refuse_what_they_cannot_draw(tables):
    def consumed():
        cache = KVCache.create(CONFIG)
        jax.jit(lambda cache: cache.tables.lengths + 1, donate_argnums=0)(cache)
        for leaf in jax.tree.leaves(cache):
            leaf.delete()  # a CPU may ignore the donation of what no output can use
        return cache

    def unchecked(function):  # outside of tests nobody checks the annotations
        return getattr(function, "__wrapped__", function)

    for draw, wrong, message in [
        (plot.draw_pages, 5, "type int, which has no page tables"),
        (plot.draw_forks, [tables], "type list, which has no page tables"),
        (plot.page_map, consumed(), "no values .consumed: a jitted call to which it was donated"),
        (jax.jit(plot.page_states), tables, "no values .inside a traced function"),
        (lambda wrong: plot.draw_pages(tables, wrong), 7, "no group 7 of layers: these tables have the groups 0 to 0"),
        (plot.draw_timeline, 5, "type int, which has no events: pass an Engine"),
        (plot.latencies, [1, 2], "type list, which has no events"),
        (plot.draw_occupancy, [np.zeros(3), np.zeros(4)], "a list with the page states of one or more moments"),
        (plot.draw_occupancy, [], "append page_states.engine. to it after each step"),
        (unchecked(plot.draw_capacity), [1], "must be a dict from a name to a list of CapacityPoint, got list"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(wrong)
