"""Pages between the pool and the host: dispatched between visits, read with the next snapshot.

What leaves goes through pinned memory of the host, to which a device copies by itself while it computes.
A few widths are compiled once; pages past the last one are null, and cost what a page costs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from paged_jax.cache.contents import PageContents, PageFormat, export_from_pool, import_to_pool
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.page_table import NULL_PAGE
from paged_jax.decoding.rows import DecodeState
from paged_jax.engine.runner import Runner, count_traces

WIDTHS = (8, 64)  # pages that go at once
STAGING = "pinned_host"  # the kind of memory


class Transfers:
    """Moves pages of a runner's pool.

    Args:
        runner: whose.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._formats = PageFormat.of(runner.config)
        self._warm: set[tuple[int, int]] = set()  # groups and widths that were filled before

    def export(self, group: int, pages: Sequence[int]) -> Iterator[tuple[slice, PageContents]]:
        """Dispatch the copies of some pages: of which, and their contents on the device, a width at a time."""
        for part in _parts(len(pages)):
            ids = np.full(_width(part), NULL_PAGE, np.int32)
            ids[: part.stop - part.start] = pages[part]
            contents = _export(self._runner.state.cache, group, ids)
            contents = contents if is_on_host(contents) else stage(contents)
            for leaf in jax.tree.leaves(contents):
                leaf.copy_to_host_async()
            yield part, contents

    def claim(self, num_pages: Sequence[int]) -> Int32[Array, "G M"]:
        """Take free pages of each group, all or none; returns their ids, on the device."""
        return self._runner.change(_claim, np.asarray(num_pages, np.int32))

    def fill(self, group: int, claimed: Int32[Array, "G M"], pages: Sequence[bytes | memoryview]) -> bool:
        """Put the bytes of pages into the first claimed ones of their group.

        Returns:
            Whether that was done by programs that ran before, and so says what it costs.
        """
        was_warm = True
        for part in _parts(len(pages)):
            was_warm &= (group, _width(part)) in self._warm
            self._warm.add((group, _width(part)))
            contents = self._formats[group].contents(pages[part], _width(part))
            where = np.asarray([part.start, part.stop - part.start], np.int32)
            self._runner.change(_fill, group, claimed, where, contents)
        return was_warm


def is_on_host(contents: PageContents) -> bool:
    """Whether contents are in the memory of the host already: then staging is one more copy."""
    return all(device.platform == "cpu" for device in contents.keys.devices())


def stage(contents: PageContents) -> PageContents:
    """Contents in pinned memory of the host, split as they were; the call returns at once."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(STAGING), contents)
    return jax.device_put(contents, shardings)


def _parts(num_pages: int) -> Iterator[slice]:
    for start in range(0, num_pages, WIDTHS[-1]):
        yield slice(start, min(start + WIDTHS[-1], num_pages))


def _width(part: slice) -> int:
    return next(width for width in WIDTHS if part.stop - part.start <= width)


@functools.partial(jax.jit, static_argnums=1)
@count_traces
def _export(cache: KVCache, group: int, ids: Int32[Array, " n"]) -> PageContents:
    return export_from_pool(cache.pool, group, ids)


@functools.partial(jax.jit, donate_argnums=0)
@count_traces
def _claim(state: DecodeState, num_pages: Int32[Array, " G"]) -> tuple[DecodeState, Int32[Array, "G M"]]:
    tables, pages = state.cache.tables.claim(num_pages)
    return state.with_tables(tables), pages


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
@count_traces
def _fill(
    state: DecodeState, group: int, claimed: Int32[Array, "G M"], where: Int32[Array, " 2"], contents: PageContents
) -> tuple[DecodeState, None]:
    first, count = where
    width = contents.keys.shape[0]
    order = jnp.arange(width, dtype=jnp.int32)
    ids = claimed[group].at[first + order].get(mode="fill", fill_value=NULL_PAGE)
    ids = jnp.where(order < count, ids, NULL_PAGE)
    pool = import_to_pool(state.cache.pool, group, ids, contents)
    return dataclasses.replace(state, cache=KVCache(state.cache.tables, pool)), None
