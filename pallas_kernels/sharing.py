"""Which rows of the page table begin with the same pages, so that attention can read those once for all of them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.platform import target_platform

NOBODY = -1  # the leader of a row without a group
HASH_PLACES = 32  # for each row, so that few pages are hashed to the same place
RUN = 8  # rows, to a multiple of which kernels round the size of a group

# When sharing pays: measured on a CPU; for TPUs and GPUs counted, not timed. A step is faster when
# - it has this many rows. With fewer it gains little on a CPU, for more to compile. Elsewhere nobody has timed it, and
#   a step looks for groups only if it is told to.
FEWEST_STEP_ROWS = 32
# - a group has this many rows and reads that many tokens less: those that it shares, for all of its rows but one. On a
#   CPU, 64 rows in groups of 4 after 192 tokens (of 8 after 128) are 1.36 (1.38) times as fast with 8/4/128 heads in
#   float32, 1.42 (1.80) times with 32/8/128, .95 (1.21) times with 8/2/64.
FEWEST_ROWS, FEWEST_TOKENS = 4, 512
# - on a GPU, it reads that many bytes less: a guess, what an H200 reads in 14 us, while its further kernels start.
FEWEST_GPU_BYTES = 2.0**26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharing:
    """Groups of rows that begin with the same pages, on several levels. It changes the speed only, and is trusted.

    On level i, a group is all rows with the same `leader[i, b]`. They have the same `tokens[i, b]`, and hold that many
    tokens, counted from the first, in the same pages. The groups of a level are parts of those of the level before it:
    on level 0 all rows may share 512 tokens, and on level 1 eight of them may share 1024.

    Args:
        leader: row of the page table for each row, or -1 where the row has no group.
        tokens: how many tokens the group shares, a multiple of the page size; 0 where the row has no group.

    Examples:
        >>> own = jnp.arange(3, 7)[:, None]  # four rows of 300 tokens, which share two of their pages
        >>> table = jnp.concatenate([jnp.tile(jnp.array([1, 2]), (4, 1)), own], axis=1)
        >>> lengths = jnp.full(4, 300)
        >>> sharing = find_groups(table, lengths, page_size=128)
        >>> sharing.leader[0].tolist(), sharing.tokens[0].tolist()
        ([3, 3, 3, 3], [256, 256, 256, 256])
    """

    leader: Int32[Array, "levels B"]
    tokens: Int32[Array, "levels B"]

    @classmethod
    def of_all(cls, lengths: Int32[Array, " B"], tokens: Int32[Array, ""] | int) -> Sharing:
        """One group of all rows that have at least `tokens` tokens.

        Args:
            lengths: tokens of each row, the new ones included.
            tokens: how many they share, a multiple of the page size.

        Returns:
            The group, on one level.
        """
        member = lengths >= jnp.maximum(tokens, 1)
        leader = jnp.argmax(member).astype(jnp.int32)
        return cls(jnp.where(member, leader, NOBODY)[None], jnp.where(member, tokens, 0).astype(jnp.int32)[None])


class Runs(NamedTuple):
    """The groups of a decode step on each level, as runs of rows that read the same tokens.

    The rows of a group stand side by side, from a multiple of `RUN` places on; P places are enough for any groups.

    Args:
        row: `[levels, P]`, the row at each place; -1 where there is none.
        place: `[levels, B]`, the place of each row; P where it has none.
        size: `[levels, B]`, how many rows the group of row b has; 0 where it has none.
        leads: `[levels, B]`, whether row b is the first of its group.
        begin: `[levels, B]`, the first of the tokens that the group of row b reads.
        end: `[levels, B]`, the end of these.
        rest: `[B]`, the first token that is left for row b.
    """

    row: Int32[Array, "levels P"]
    place: Int32[Array, "levels B"]
    size: Int32[Array, "levels B"]
    leads: Bool[Array, "levels B"]
    begin: Int32[Array, "levels B"]
    end: Int32[Array, "levels B"]
    rest: Int32[Array, " B"]


def runs_of(sharing: Sharing, lengths: Int32[Array, " B"], takes_part: Bool[Array, " B"], page_size: int) -> Runs:
    """Runs of the rows that take part in a step in which each has one query, its last token.

    Each level reads what the one before it has left. Rows of groups in which too few take part read by themselves.

    Args:
        sharing: the groups.
        lengths: tokens of each row.
        takes_part: rows that have a query.
        page_size: S; runs read whole pages.
    """
    row = jnp.arange(lengths.size, dtype=jnp.int32)
    place = jnp.arange(lengths.size // FEWEST_ROWS * RUN, dtype=jnp.int32)
    rest, levels = jnp.zeros_like(row), []
    for leader, tokens in zip(sharing.leader, sharing.tokens, strict=True):
        end = tokens - tokens % page_size
        member = takes_part & (leader >= 0) & (end > rest) & (end < lengths)
        same = member[:, None] & member[None, :] & (leader[:, None] == leader[None, :])
        same &= (rest[:, None] == rest[None, :]) & (end[:, None] == end[None, :])
        size = jnp.sum(same, axis=1, dtype=jnp.int32)
        size = jnp.where(size >= FEWEST_ROWS, size, 0)
        rank = jnp.sum(same & (row[None, :] < row[:, None]), axis=1, dtype=jnp.int32)
        leads = (size > 0) & (rank == 0)
        first = jnp.min(jnp.where(same, row[None, :], row.size), axis=1)
        places = jnp.where(leads, -(-size // RUN) * RUN, 0)
        start = jnp.sum(jnp.where(row[None, :] < first[:, None], places[None, :], 0), axis=1, dtype=jnp.int32)
        mine = jnp.where(size > 0, start + rank, place.size)
        at = jnp.max(jnp.where(mine[None, :] == place[:, None], row[None, :], -1), axis=1)
        levels.append((at, mine, size, leads, rest, end))
        rest = jnp.where(size > 0, end, rest)
    at, mine, size, leads, begin, end = (jnp.stack(x) for x in zip(*levels, strict=True))
    return Runs(at, mine, size, leads, begin, end, rest)


def step_pays(num_rows: int) -> bool:
    """Whether a step of this many rows, in which none prefills, should look for groups without being told to."""
    return num_rows >= FEWEST_STEP_ROWS and target_platform() == "cpu"


def gpu_step_pays(saved_bytes: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a step on a GPU that reads this many bytes less pays for its further kernels."""
    return saved_bytes > FEWEST_GPU_BYTES


def group_pays(num_rows: Int32[Array, " B"], tokens: Int32[Array, " B"]) -> Bool[Array, " B"]:
    """Whether reading `tokens` tokens once for `num_rows` rows is faster than reading them once a row."""
    return (num_rows >= FEWEST_ROWS) & ((num_rows - 1) * tokens >= FEWEST_TOKENS)


def find_groups(page_table: Int32[Array, "B M"], lengths: Int32[Array, " B"], page_size: int) -> Sharing:
    """Groups of rows that begin with the same pages, read off the page table, where sharing pays.

    Rows with the same first page form a group, which shares the pages that all of its rows begin with. Its rows with
    the same page after those form a group of the next level: for example those of one question after a system prompt
    that all rows share. The page of a row's last token is never shared.

    Args:
        page_table: int32 `[B, M]`, the pages of each row.
        lengths: int32 `[B]`, tokens of each row, the new ones included.
        page_size: S, tokens of a page.

    Returns:
        The groups of two levels. Where no page is shared, only `[B]` integers are computed.

    Examples:
        >>> own = jnp.arange(3, 7)[:, None]  # four rows of 300 tokens, which share two of their pages
        >>> table = jnp.concatenate([jnp.tile(jnp.array([1, 2]), (4, 1)), own], axis=1)
        >>> lengths = jnp.full(4, 300)
        >>> sharing = find_groups(table, lengths, page_size=128)
        >>> sharing.tokens[0].tolist()
        [256, 256, 256, 256]
    """
    num_rows, num_columns = page_table.shape
    full = jnp.clip((lengths - 1) // page_size, 0, num_columns)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    nobody = jnp.full(num_rows, NOBODY, jnp.int32), jnp.zeros(num_rows, jnp.int32)

    def measure(leader: Int32[Array, " B"], column: Int32[Array, " B"]) -> tuple[Array, Array]:
        """Groups of rows with the same page in a column; how many columns from the first they share."""
        # XLA vectorises a minimum on a CPU, but not an argmin, and that of narrow numbers best.
        narrow = np.min_scalar_type(num_columns)
        columns = jnp.arange(num_columns, dtype=narrow)[None, :]
        length = jnp.min(jnp.where(page_table == page_table[leader], jnp.array(num_columns, narrow), columns), axis=1)
        length = jnp.minimum(length.astype(jnp.int32), jnp.minimum(full, full[leader]))
        length = jnp.where(length > column, length, 0)
        member = length > 0
        index = jnp.where(member, leader, num_rows)
        shortest = jnp.full(num_rows, num_columns, jnp.int32).at[index].min(length, mode="drop")[leader]
        count = jnp.zeros(num_rows, jnp.int32).at[index].add(1, mode="drop")[leader]
        member &= group_pays(count, (shortest - column) * page_size)
        return jnp.where(member, leader, NOBODY), jnp.where(member, shortest, 0)

    def find_second(columns: Array) -> tuple[Array, Array]:
        leader = rows_alike(page_table, columns, full)
        return jax.lax.cond(jnp.all(leader == row), lambda: nobody, lambda: measure(leader, columns))

    def find() -> tuple[Array, Array, Array, Array]:
        first, columns = measure(leader, jnp.zeros_like(full))
        second = jax.lax.cond(jnp.any(first >= 0), lambda: find_second(columns), lambda: nobody)
        return first, columns, *second

    leader = rows_alike(page_table, jnp.zeros_like(full), full)
    first, first_columns, second, second_columns = jax.lax.cond(
        jnp.all(leader == row), lambda: (*nobody, *nobody), find
    )
    return Sharing(jnp.stack([first, second]), jnp.stack([first_columns, second_columns]) * page_size)


def rows_alike(page_table: Int32[Array, "B M"], column: Int32[Array, " B"], full: Int32[Array, " B"]) -> Array:
    """For each row one row with the same page in a column, itself where there is none or the column is not full.

    All rows with the same page get the same one. Rows are hashed by their page. If two pages are hashed to the same
    place, the rows of one of them find no group, which costs only speed.
    """
    num_rows, num_columns = page_table.shape
    row = jnp.arange(num_rows, dtype=jnp.int32)
    page = page_table.reshape(-1)[row * num_columns + jnp.minimum(column, num_columns - 1)]
    size = HASH_PLACES * num_rows
    # Knuth's multiplicative hash: the upper bits of the product.
    hashed = (page.astype(jnp.uint32) * jnp.uint32(2654435761)) >> 8
    place = jnp.where((column < full) & (page > 0), (hashed % jnp.uint32(size)).astype(jnp.int32), size)
    leader = jnp.full(size, NOBODY, jnp.int32).at[place].max(row, mode="drop").at[place].get(mode="fill", fill_value=-1)
    at = jnp.maximum(leader, 0)
    alike = (leader >= 0) & (page[at] == page) & (column[at] == column)
    return jnp.where(alike, leader, row)


def check_sharing(
    sharing: Sharing, page_table: Array | np.ndarray, lengths: Array | np.ndarray, page_size: int
) -> None:
    """Checks on the host what `sharing` promises, for debugging: the ops trust it.

    Args:
        sharing: the promise.
        page_table: int32 `[B, M]`.
        lengths: int32 `[B]`, the new tokens included.
        page_size: S.

    Raises:
        ValueError: naming the first level and row for which the promise is broken, and how.

    Examples:
        >>> own = jnp.arange(3, 7)[:, None]  # four rows of 300 tokens, which share two of their pages
        >>> table = jnp.concatenate([jnp.tile(jnp.array([1, 2]), (4, 1)), own], axis=1)
        >>> lengths = jnp.full(4, 300)
        >>> sharing = find_groups(table, lengths, page_size=128)
        >>> check_sharing(sharing, table, lengths, page_size=128)
        >>> check_sharing(sharing, table.at[1, 1].set(9), lengths, page_size=128)
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    table, row_lengths = np.asarray(page_table), np.asarray(lengths)
    for level, (leaders, tokens) in enumerate(zip(np.asarray(sharing.leader), np.asarray(sharing.tokens), strict=True)):
        for row in np.flatnonzero(leaders >= 0):
            leader, shared = leaders[row], tokens[row]
            where = f"level {level}, row {row}"
            if leader >= len(table) or leaders[leader] != leader or tokens[leader] != shared:
                raise ValueError(
                    f"{where}: its leader {leader} is not the leader of a group that shares {shared} tokens"
                )
            if shared % page_size:
                raise ValueError(f"{where}: {shared} shared tokens are not a multiple of the page size {page_size}")
            if shared > row_lengths[row]:
                raise ValueError(f"{where}: it shares {shared} tokens and has {row_lengths[row]}")
            columns = shared // page_size
            if not np.array_equal(table[row, :columns], table[leader, :columns]):
                raise ValueError(f"{where}: its first {columns} pages are not those of its leader {leader}")
