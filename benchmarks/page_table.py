"""Microseconds that the page table takes in a decode step, inside one donated loop on the device.

    python -m benchmarks.page_table [--json]

A step of serving is what a decode loop asks of the table: sequences that reached their length are released, new prompts
take their rows, everybody else gets one token. Lengths are staggered, so one row in 16 needs a page. Where nobody needs
a page, all new tokens fit in the pages that the rows have. The last two find free pages in other ways: one argmin over
the refcounts a page (as in Levanter's page table), and a running count of the free pages searched for the k-th.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.report import Report, add_json_option
from benchmarks.timing import compare
from paged_jax.cache.config import CacheConfig
from paged_jax.cache.page_table import PageTable

Step = Callable[[PageTable], PageTable]
MAX_PAGES = 128


def serve(max_length: int, prompt_length: int, table: PageTable) -> PageTable:
    """Release, admit, append."""
    table = table.release(table.lengths >= max_length)
    return table.reserve(jnp.where(table.lengths == 0, prompt_length, 1))[0]


def append_in_place(table: PageTable) -> PageTable:
    """A token for every row, none of which needs a page; then the lengths go back."""
    lengths = table.lengths
    return dataclasses.replace(table.reserve(jnp.ones_like(lengths))[0], lengths=lengths)


def serve_with(find_pages: Callable[[PageTable, jax.Array], PageTable], max_length: int, table: PageTable) -> PageTable:
    """`serve` with prompts of one token, and another way to find the pages."""
    table = table.release(table.lengths >= max_length)
    table = find_pages(table, table.lengths % table.page_size == 0)
    return dataclasses.replace(table, lengths=table.lengths + 1)


def argmin_a_page(table: PageTable, needs: jax.Array) -> PageTable:
    def find_one(b, carry):
        refcounts, pages = carry

        def take(refcounts, pages):
            page = jnp.argmin(refcounts).astype(jnp.int32)
            return refcounts.at[page].set(1), pages.at[b, table.lengths[b] // table.page_size].set(page)

        return lax.cond(needs[b], take, lambda *carry: carry, refcounts, pages)

    refcounts, pages = lax.fori_loop(0, len(needs), find_one, (table.refcounts, table.pages))
    return dataclasses.replace(table, refcounts=refcounts, pages=pages)


def count_and_search(table: PageTable, needs: jax.Array) -> PageTable:
    rank = jnp.cumsum(needs, dtype=jnp.int32)
    num_free = jnp.cumsum(table.refcounts == 0, dtype=jnp.int32)
    page = jnp.searchsorted(num_free, rank).astype(jnp.int32)
    row = jnp.arange(len(needs), dtype=jnp.int32)
    column = jnp.where(needs, table.lengths // table.page_size, table.pages.shape[1])
    return dataclasses.replace(
        table,
        refcounts=table.refcounts.at[jnp.where(needs, page, table.num_pages + row)].set(1, mode="drop"),
        pages=table.pages.at[row, column].set(page, mode="drop"),
    )


def staggered(num_pages: int, num_rows: int, shortest: int, longest: int) -> PageTable:
    """A table in the middle of its work: the rows hold from `shortest` to `longest` tokens."""
    config = CacheConfig(1, 1, 128, num_pages, num_rows, MAX_PAGES)
    lengths = np.random.default_rng(0).permutation(np.linspace(shortest, longest, num_rows).astype(np.int32))
    table, reservation = jax.jit(PageTable.reserve)(PageTable.create(config), lengths)
    assert np.all(np.asarray(reservation.granted)), "the pool is too small for these lengths"
    return table


class Loop:
    """A step many times over in one donated loop, which goes on with the table where the last call left it."""

    def __init__(self, step: Step, table: PageTable, num_steps: int):
        self.num_steps = num_steps
        self.table = jax.tree.map(jnp.copy, table)
        self.run = jax.jit(
            lambda table: lax.fori_loop(0, num_steps, lambda _, table: step(table), table), donate_argnums=0
        )

    def __call__(self) -> PageTable:
        self.table = self.run(self.table)
        return self.table


def loops() -> dict[tuple[str, int, int], Loop]:
    """What is measured, by its name, sequences and pages."""
    all_loops = {}
    for num_rows, num_pages, longest in ((256, 8192, 900), (1024, 131_072, 2040)):
        table = staggered(num_pages, num_rows, 64, longest)
        steps = {
            "serving, prompts of 1": partial(serve, longest, 1),
            "serving, prompts of 64": partial(serve, longest, 64),
            "serving, prompts of 1, argmin a page": partial(serve_with, argmin_a_page, longest),
            "serving, prompts of 1, count and search": partial(serve_with, count_and_search, longest),
        }
        for name, step in steps.items():
            slow = name.endswith(("argmin a page", "count and search"))
            all_loops[name, num_rows, num_pages] = Loop(step, table, num_steps=10 if slow else 500)
    for num_rows in (256, 1024):
        for num_pages in (8192, 32_768, 131_072):
            table = staggered(num_pages, num_rows, 4, 4)
            all_loops["nobody needs a page", num_rows, num_pages] = Loop(append_in_place, table, 500)
    return all_loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    add_json_option(parser)
    options = parser.parse_args()
    report = Report("page_table", f"the page table in a decode step, pages of 16 tokens, rows of {MAX_PAGES} pages")
    measured = loops()
    timings = compare({str(key): loop for key, loop in measured.items()}, options.repeats)
    for key, loop in measured.items():
        timing, (name, num_rows, num_pages) = timings[str(key)], key
        scale = 1e3 / loop.num_steps
        report.add(
            step=name,
            sequences=num_rows,
            pages=num_pages,
            fastest_us=timing.fastest * scale,
            median_us=timing.wall * scale,
            cpu_us=timing.cpu * scale,
        )
    report.finish(options)


if __name__ == "__main__":
    main()
