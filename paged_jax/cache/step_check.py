"""A check for the steps of a loop of your own, while you write it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.page_tables import PageTables


@dataclasses.dataclass
class StepCheck:
    """Raises where a step contradicts the page tables: a forgotten `reserve`, metadata that is used twice.

    Compiled code cannot notice such mistakes: it would write to other slots than you think. Make one `StepCheck` for
    each cache, and call it before each step: on the host, or inside jit through a callback. It waits for the device, so
    leave it out once the loop is right.

        check = StepCheck()
        cache, granted = cache.reserve(new_tokens)
        metadata = AttentionMetadata.decode(cache.tables, granted)
        check(cache, metadata)                                      # outside jit
        jax.debug.callback(check, cache.tables, metadata)           # inside

    Examples:
        >>> check, active = StepCheck(), jnp.array([True, False])
        >>> cache, granted = KVCache.create(config).reserve(jnp.array([1, 0]))
        >>> check(cache, AttentionMetadata.decode(cache.tables, active))
        >>> check(cache, AttentionMetadata.decode(cache.tables, active))  # nothing was reserved since then
        Traceback (most recent call last):
            ...
        ValueError: the tables have not changed since the last step, but this one computes 1 tokens: ...
    """

    version: int | None = None  # of the tables, at the last step

    def __call__(self, cache: Any, metadata: AttentionMetadata) -> None:
        """Check a step.

        Args:
            cache: the `KVCache` or `PageTables` after `reserve`.
            metadata: of the step, one entry for each row of the tables.

        Raises:
            ValueError: what is wrong, with both numbers, and what to do.
        """
        tables: PageTables = getattr(cache, "tables", cache)
        _check_alive(tables)
        lengths, given = np.asarray(tables.lengths), np.asarray(metadata.lengths)
        new_tokens = np.where(given > 0, np.diff(np.asarray(metadata.query_starts)), 0)
        if given.shape != lengths.shape:
            raise ValueError(f"the metadata has {len(given)} sequences, the tables {len(lengths)} rows: pass all rows")
        version = int(tables.groups[0].version)
        if version == self.version and np.any(new_tokens):
            raise ValueError(
                f"the tables have not changed since the last step, but this one computes {int(new_tokens.sum())} "
                "tokens: reserve room for them first, and build the metadata after that"
            )
        for row in np.flatnonzero(given):
            if given[row] != lengths[row]:
                raise ValueError(
                    f"row {row} has {lengths[row]} tokens, but the metadata was built when it had {given[row]}: build "
                    "it anew in each step, after reserve"
                )
        self.version = version


def _check_alive(tables: PageTables) -> None:
    for leaf in jax.tree.leaves(tables):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(
                "this cache was consumed: a jitted call to which it was donated has taken its memory; go on with the "
                "cache that the call returned"
            )
