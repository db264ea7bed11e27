"""One table of attention cases, their inputs, and what they must give: for tests, benchmarks and new kernels.

The oracle is numpy in float64 and shares no code with the ops. The inputs are hostile wherever a kernel may go
wrong: physical pages are shuffled, every slot that no sequence owns (the null page and the slots behind a length
too) holds NaN, and unused entries of the page table hold ids that do not exist.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Pages, Sharing, init_pages, paged_attention

# Every test of an op runs for each of these. They refuse no case; what a kernel refuses stands in the case.
IMPLEMENTATIONS = ("reference", "xla")

# Unit-scale data. f32: summation order. bf16: the output's rounding (2 ** -8 of values up to about 2) and that of
# the weights. int8: half a step, amax / 254 with amax about 4 sigma, on each value and, through the scores, on the
# weights; measured below .02 on these cases.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 4e-2, "float8_e4m3fn": 4e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]
    query_lens: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)  # N, K
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"  # of the pages
    q_dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    padding: int = 0  # tokens behind the last sequence's
    write: bool = True  # k and v are given
    is_padded: bool = False  # the pages have zeros behind each head
    holes: tuple[tuple[int, int], ...] = ()  # (row, column) of the table left unmapped
    bound_query_len: bool = True  # pass max_query_len
    tpu_refuses: str | None = None  # what the TPU kernels say to it (a pattern); None: they take it

    @property
    def options(self) -> dict:
        longest = max(self.query_lens)
        return dict(
            window=self.window,
            soft_cap=self.soft_cap,
            scale=self.scale,
            max_query_len=round_up(longest, (1, 8, 128)) if self.bound_query_len else None,
        )

    @property
    def tolerance(self) -> float:
        return max(TOLERANCES[self.dtype], TOLERANCES[self.q_dtype])


def round_up(x: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the sizes that holds x, or x itself: cases of like shapes share what was compiled."""
    return min((size for size in sizes if size >= x), default=x)


RAGGED = (0, 1, 16, 17, 40, 130)
DECODE = (0, 1, 1, 1, 1, 1)
MIXED = (0, 1, 16, 1, 13, 70)

# What the TPU kernels say to a case that they refuse.
TILES = "copies move tiles of"
SCALES = "XLA would copy all their scales"
LANES = "XLA would copy all pages, whose rows"

CASES = (
    Case("decode", RAGGED, DECODE),
    Case("decode without writing", RAGGED, DECODE, write=False),
    Case("decode: rows that take no part", (0, 1, 0, 17, 0, 130), (1, 1, 1, 1, 1, 1)),
    Case("decode: bf16, head size 128", RAGGED, DECODE, (8, 2), 128, 16, "bfloat16", "bfloat16"),
    Case("decode: padded head size 96", RAGGED, DECODE, (8, 2), 96, 16, "bfloat16", "bfloat16", is_padded=True),
    Case("decode: int8", RAGGED, DECODE, (4, 4), 64, 16, "int8", tpu_refuses=TILES),
    Case("decode: int8, head size 128", RAGGED, DECODE, (4, 1), 128, 16, "int8", "bfloat16", tpu_refuses=SCALES),
    Case("decode: fp8", RAGGED, DECODE, (4, 4), 64, 16, "float8_e4m3fn", tpu_refuses=TILES),
    Case("decode: window in a page, sinks", RAGGED, DECODE, window=5, sinks=True),
    Case("decode: window of a page", RAGGED, DECODE, window=16),
    Case("decode: window over pages, soft cap", RAGGED, DECODE, window=100, soft_cap=3.0),
    Case("decode: sinks, page size 1", (0, 1, 2, 3, 20, 9), DECODE, sinks=True, page_size=1, tpu_refuses=TILES),
    Case("decode: page size 24", RAGGED, DECODE, page_size=24, scale=0.3),
    Case("decode: page size 256, head size 128", (0, 1, 256, 257, 300, 9), DECODE, (2, 1), 128, 256),
    Case("mixed", RAGGED, MIXED),
    Case("mixed, padding, no bound", RAGGED, MIXED, padding=11, bound_query_len=False),
    Case("mixed: bf16, head size 128", RAGGED, MIXED, (8, 2), 128, 16, "bfloat16", "bfloat16", sinks=True),
    Case("mixed: int8", RAGGED, MIXED, (4, 2), 64, 8, "int8", soft_cap=5.0, tpu_refuses=TILES),
    Case(
        "mixed: int8, head size 128", RAGGED, MIXED, (4, 2), 128, 16, "int8", "bfloat16", window=20, tpu_refuses=SCALES
    ),
    Case("mixed: int8, padded scales", RAGGED, MIXED, (4, 2), 128, 16, "int8", "bfloat16", 20, 5.0, is_padded=True),
    Case("mixed: fp8, head size 128", RAGGED, MIXED, (4, 2), 128, 16, "float8_e4m3fn", "bfloat16", tpu_refuses=SCALES),
    Case("mixed: heads 5, 1; head size 80", RAGGED, MIXED, (5, 1), 80, 64, window=30, sinks=True, tpu_refuses=LANES),
    Case("mixed: padded head size 80", RAGGED, MIXED, (5, 1), 80, 64, window=30, sinks=True, is_padded=True),
    Case("mixed: heads 3, 3", RAGGED, MIXED, (3, 3), 96, 16, soft_cap=2.0, write=False, tpu_refuses=LANES),
    Case("mixed: heads 12, 2; head size 256", RAGGED, MIXED, (12, 2), 256, 128, padding=5),
    Case("mixed: window in a page", RAGGED, MIXED, (5, 1), 128, window=3),
    Case("query length is KV length", (1, 16, 17, 70), (1, 16, 17, 70)),
    Case("query length is KV length, window, cap", (1, 16, 17, 70), (1, 16, 17, 70), window=33, soft_cap=4.0),
    Case("more queries than a block", (150, 40, 16, 5), (140, 9, 16, 1), (2, 1), sinks=True, holes=((2, 0), (3, 0))),
    Case("few queries each", (5, 16, 40, 129), (5, 4, 3, 2), (3, 3), 80, page_size=8, tpu_refuses=LANES),
    Case("tokens with negative positions", (2, 0, 30, 0), (4, 3, 30, 1)),
    Case("pages missing", (60, 50, 20, 40), (1, 30, 1, 40), holes=((0, 0), (0, 2), (1, 1), (2, 1), (3, 0))),
    Case("no page at all, sinks", (1, 16, 5), (1, 16, 1), sinks=True, holes=((0, 0), (1, 0), (2, 0))),
    Case("bf16 pages, f32 queries", RAGGED, DECODE, (4, 2), 128, 16, "bfloat16", "float32"),
    Case("f32 pages, bf16 queries", RAGGED, MIXED, (4, 2), 64, 16, "float32", "bfloat16"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of `paged_attention` for a case, and the data they were made from (numpy, by position)."""

    q: jax.Array
    k: jax.Array | None
    v: jax.Array | None
    pages: Pages
    page_table: jax.Array
    lengths: jax.Array
    query_starts: jax.Array
    sinks: jax.Array | None
    keys: list[np.ndarray]  # of each sequence [length, K, H], as stored
    values: list[np.ndarray]

    @property
    def arguments(self) -> tuple:
        return (self.q, self.k, self.v, self.pages, self.page_table, self.lengths, self.query_starts)


@functools.lru_cache(maxsize=2)  # a case runs for one implementation after the other
def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs in which everything that must not be read is NaN or out of range."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    num_heads, num_kv_heads = case.heads
    page_size, head_dim = case.page_size, case.head_dim
    idle_rows = round_up(len(case.lengths), (6,)) - len(case.lengths)
    lengths = np.array([*case.lengths, *[0] * idle_rows], np.int32)
    starts = np.concatenate([[0], np.cumsum([*case.query_lens, *[0] * idle_rows])]).astype(np.int32)
    num_tokens = round_up(int(starts[-1]), (6, 28, 112)) + case.padding

    columns = [-(-length // page_size) for length in case.lengths]
    max_pages = round_up(max(columns) + 2, (12,))
    num_pages = round_up(sum(columns) + 4, (24, 128))
    ids = iter(rng.permutation(np.arange(1, num_pages)))
    invalid = [0, -1, num_pages, 2**31 - 1, -(2**31), num_pages + 7]
    table = rng.choice(invalid, (len(lengths), max_pages)).astype(np.int32)
    for row, used in enumerate(columns):
        for column in range(used):
            if (row, column) not in case.holes:
                table[row, column] = next(ids)

    def random(shape, dtype):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    store = Store(
        jax.eval_shape(lambda: init_pages(num_pages, num_kv_heads, page_size, head_dim, case.dtype, case.is_padded))
    )
    # Packed new tokens; those that no position receives stay NaN, and so do their queries.
    q = np.full((num_tokens, num_heads, head_dim), np.nan, jnp.dtype(case.q_dtype))
    k = np.full((num_tokens, num_kv_heads, head_dim), np.nan, jnp.dtype(case.q_dtype))
    v = k.copy()
    keys, values = [], []
    for row, (length, num_queries) in enumerate(zip(case.lengths, case.query_lens, strict=True)):
        rows = [random((length, num_kv_heads, head_dim), case.q_dtype) for _ in range(2)]
        stored = [np.asarray(store.stored(x)) for x in rows]
        for position in range(length):
            token = int(starts[row]) + position - (length - num_queries)
            if position >= length - num_queries:
                q[token] = random((num_heads, head_dim), case.q_dtype)
                k[token], v[token] = rows[0][position], rows[1][position]
                if case.write:
                    continue
            page = table[row, position // page_size]
            if 0 < page < num_pages:
                store.put(page, position % page_size, rows[0][position], rows[1][position])
        keys.append(stored[0])
        values.append(stored[1])
    sinks = jnp.asarray(rng.standard_normal(num_heads), jnp.float32) if case.sinks else None
    return Inputs(
        q=jnp.asarray(q),
        k=jnp.asarray(k) if case.write else None,
        v=jnp.asarray(v) if case.write else None,
        pages=store.pages(),
        page_table=jnp.asarray(table),
        lengths=jnp.asarray(lengths),
        query_starts=jnp.asarray(starts),
        sinks=sinks,
        keys=keys,
        values=values,
    )


class Store:
    """Pages in numpy, NaN where nothing was put: the layout of pages.py, written down a second time."""

    def __init__(self, empty: Pages):
        self.empty = empty
        self.stacked = empty.data.shape[2] == 2 * empty.page_size
        self.data = np.full(empty.data.shape, 77 if empty.dtype == np.int8 else np.nan, empty.dtype)
        self.scales = None if empty.scales is None else np.full(empty.scales.shape, np.nan, np.float32)

    def quantised(self, x):
        x = np.asarray(x, np.float32)
        is_int8 = self.data.dtype == np.int8
        scale = np.abs(x).max(-1) / np.float32(127 if is_int8 else 448)
        x = x / scale[..., None]
        return (np.rint(x) if is_int8 else x).astype(self.data.dtype), scale

    def stored(self, x):
        """What reading gives back after writing x, in float64."""
        if self.scales is None:
            return x.astype(self.data.dtype).astype(np.float64)
        data, scale = self.quantised(x)
        return data.astype(np.float64) * scale[..., None]

    def put(self, page, slot, key, value):  # [K, H] each
        size = self.empty.page_size
        key, value = (np.pad(x, ((0, 0), (0, self.empty.padding))) for x in (key, value))
        if self.scales is not None:
            key, self.scales[page, :, slot] = self.quantised(key)
            value, self.scales[page, :, size + slot] = self.quantised(value)
        if self.stacked:
            self.data[page, :, slot], self.data[page, :, size + slot] = key, value
        else:
            self.data[page, :, slot] = np.concatenate([key, value], -1)

    def pages(self) -> Pages:
        scales = None if self.scales is None else jnp.asarray(self.scales)
        data = jnp.asarray(self.data.view(self.empty.data.dtype))
        return dataclasses.replace(self.empty, data=data, scales=scales)


@functools.lru_cache(maxsize=2)
def expected(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64, straight from the definition."""
    num_heads, num_kv_heads = case.heads
    group = num_heads // num_kv_heads
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    q = np.asarray(inputs.q, np.float64)
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    table, num_pages = np.asarray(inputs.page_table), inputs.pages.num_pages
    starts = np.asarray(inputs.query_starts)
    for row, (length, num_queries) in enumerate(zip(case.lengths, case.query_lens, strict=True)):
        pages = np.repeat(table[row], case.page_size)[:length]
        mapped = (pages > 0) & (pages < num_pages)
        for position in range(max(length - num_queries, 0), length):
            token = starts[row] + position - (length - num_queries)
            seen = np.flatnonzero(mapped[: position + 1])
            if case.window is not None:
                seen = seen[seen > position - case.window]
            for head in range(num_heads):
                keys, values = inputs.keys[row][seen, head // group], inputs.values[row][seen, head // group]
                scores = keys @ q[token, head] * scale
                if case.soft_cap is not None:
                    scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                if inputs.sinks is not None:
                    scores = np.append(scores, float(inputs.sinks[head]))
                if scores.size:
                    top = scores.max()
                    weights = np.exp(scores - top)
                    lse[token, head] = top + np.log(weights.sum())
                    out[token, head] = weights[: seen.size] @ values / weights.sum()
    return out, lse


traces = collections.Counter()


@functools.partial(
    jax.jit,
    static_argnames=("scale", "window", "soft_cap", "max_query_len", "return_lse", "implementation"),
)
def attend(*arguments, **options):
    traces[options["implementation"]] += 1  # runs when jit traces, not when it runs what it compiled
    return paged_attention(*arguments, **options)


def share(inputs: Inputs, levels: list[list[tuple[tuple[int, ...], int]]]) -> tuple[Inputs, Sharing]:
    """Inputs on pages that rows have in common, and the promise. What unowned slots hold stays NaN.

    Args:
        inputs: of rows that share nothing.
        levels: groups of rows and how many tokens each shares, from the first token on.
    """
    size, table = inputs.pages.page_size, np.array(inputs.page_table)
    keys, values = list(inputs.keys), list(inputs.values)
    leader = np.full((len(levels), len(table)), -1, np.int32)
    tokens = np.zeros_like(leader)
    for level, groups in enumerate(levels):
        for rows, count in groups:
            leader[level, list(rows)], tokens[level, list(rows)] = rows[0], count
            for row in rows[1:]:
                table[row, : count // size] = table[rows[0], : count // size]
                for x in (keys, values):
                    x[row] = np.concatenate([x[rows[0]][:count], x[row][count:]])
    inputs = dataclasses.replace(inputs, page_table=jnp.asarray(table), keys=keys, values=values)
    return inputs, Sharing(jnp.asarray(leader), jnp.asarray(tokens))


Levels = list[list[tuple[tuple[int, ...], int]]]  # as for `share`
FOREST_ROWS, FOREST_SIZE = 14, 16


def random_forest(seed: int, **options) -> tuple[Case, Levels]:
    """Rows as they are after forks and forks of forks: a case of `FOREST_ROWS` rows, and what they share.

    A group may have one row or all of them, a row may share all but its last token, or be empty (a parent that was
    released), or take no part in the step. What a row has of its own ends within a page.

    Args:
        seed: of everything; for 0 all rows are in one group, on both levels.
        options: fields of the case.
    """
    rng = np.random.default_rng(seed)
    query_lens = rng.choice([0, 1, 1, 1, 2], FOREST_ROWS)
    shared, levels = np.zeros(FOREST_ROWS, int), [[], []]

    def split(level: int, rows: np.ndarray) -> None:
        cuts = np.sort(rng.integers(0, len(rows) + 1, rng.integers(0, 3))) if seed else []
        for group in np.split(rows, cuts):
            if group.size and (not seed or rng.random() < 0.8):
                shared[group] += FOREST_SIZE * rng.integers(1, 4)
                levels[level].append((tuple(group.tolist()), int(shared[group[0]])))
                if level == 0:
                    split(1, group)

    split(0, rng.permutation(FOREST_ROWS))
    own = query_lens + rng.choice([0, 1, 7, 15, 16, 17, 40], FOREST_ROWS)
    lengths = np.where(shared + own > 0, shared + np.maximum(own, 1), 0)
    return Case(f"forest {seed}", tuple(lengths.tolist()), tuple(query_lens.tolist()), **options), levels
