"""What reading shared pages once saves in a decode step on a CPU, and what finding them costs.

    taskset -c 1 python -m benchmarks.sharing [--json] [--parts attention groups]

Attention: 64 rows of 8/4/128 in float32, pages of 16, 32 to 64 tokens of each row after what it shares. The same step
with and without the groups, which are looked for in each step: CPU milliseconds of interleaved pairs, beside the
megabytes that rows map and those that the pool holds. Groups: what `find_groups` takes in a step, in a loop on the
device in which tables and lengths change.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Report, add_json_option
from benchmarks.timing import compare
from pallas_kernels import find_groups, init_pages, paged_attention

ROWS, HEADS, PAGE_SIZE, REST = 64, (8, 4, 128), 16, 64
# What rows have in common on each level: tokens, and how many rows share them.
FORESTS = {
    "512 tokens in common with all": [(512, 64)],
    "2048 tokens in common with all": [(2048, 64)],
    "512 tokens in common with 7 others": [(512, 8)],
    "2048 tokens in common with 7 others": [(2048, 8)],
    "512 tokens in common with all, 512 with 7": [(512, 64), (512, 8)],
    "nothing in common, 576 of its own": [(512, 1)],
    "nothing in common, 64 of its own": [],
}


@jax.jit
def plain(q, pages, table, lengths):
    starts = jnp.arange(len(lengths) + 1, dtype=jnp.int32)
    return paged_attention(q, None, None, pages, table, lengths, starts, max_query_len=1, implementation="xla").out


@jax.jit
def shared(q, pages, table, lengths):
    starts = jnp.arange(len(lengths) + 1, dtype=jnp.int32)
    sharing = find_groups(table, lengths, PAGE_SIZE)
    return paged_attention(
        q, None, None, pages, table, lengths, starts, sharing=sharing, max_query_len=1, implementation="xla"
    ).out


def make_table(levels: list[tuple[int, int]], rows: int, num_columns: int = 0) -> tuple[np.ndarray, int]:
    """The pages of rows in random order, in so many columns at least, and how many columns are shared."""
    rng = np.random.default_rng(0)
    parts, used = [], 1
    for tokens, members in [*levels, (REST, 1)]:
        columns = tokens // PAGE_SIZE
        ids = used + np.arange(rows // members * columns).reshape(-1, columns)
        parts.append(np.repeat(ids, members, axis=0))
        used += ids.size
    table = np.concatenate(parts, axis=1)[rng.permutation(rows)]
    ids = np.concatenate([[0], 1 + rng.permutation(used - 1)])
    table = np.pad(ids[table], ((0, 0), (0, max(num_columns - table.shape[1], 0))))
    return table.astype(np.int32), sum(tokens for tokens, _ in levels)


def measure_attention(report: Report, name: str, repeats: int) -> None:
    num_heads, num_kv_heads, head_dim = HEADS
    rng = np.random.default_rng(0)
    table, common = make_table(FORESTS[name], ROWS)
    lengths = jnp.asarray(common + rng.integers(REST // 2, REST + 1, ROWS), jnp.int32)
    pages = init_pages(int(table.max()) + 1, num_kv_heads, PAGE_SIZE, head_dim, "float32")
    pages = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), pages)
    q = jnp.asarray(rng.standard_normal((ROWS, num_heads, head_dim), np.float32))
    arguments = q, pages, jnp.asarray(table), lengths
    functions = {"one by one": plain, "shared": shared}
    np.testing.assert_allclose(*(f(*arguments) for f in functions.values()), atol=1e-5)
    timings = compare({key: functools.partial(f, *arguments) for key, f in functions.items()}, repeats)
    alone, together = (timings[key].cpu for key in functions)
    page_megabytes = pages.num_bytes / pages.num_pages / 1e6
    page_counts = {"MB mapped": table.size, "MB held": int(table.max())}
    report.add(
        **{"each row has": name, **{key: n * page_megabytes for key, n in page_counts.items()}},
        **{"one by one, ms": alone, "shared, ms": together, "faster": alone / together},
    )


def measure_groups(report: Report, rows: int, num_pages: int, repeats: int) -> None:
    num_columns, steps = 128, 200

    @functools.partial(jax.jit, static_argnums=0)
    def run(finds, table, lengths):
        def step(i, carry):  # a row gets a page, so that nothing can be computed before the loop
            table, total = carry
            table = table.at[i % rows, -1].set(i)
            if finds:
                total += jnp.sum(find_groups(table, lengths + i % 2, PAGE_SIZE).tokens)
            return table, total

        return jax.lax.fori_loop(0, steps, step, (table, jnp.int32(0)))

    functions = {}
    for name, levels in [("all", [(512, rows)]), ("8", [(512, 8)]), ("all, then 8", [(512, rows), (512, 8)]), ("", [])]:
        table, common = make_table(levels, rows, num_columns)
        assert table.max() < num_pages
        arguments = jnp.asarray(table), jnp.full(rows, common + REST - 8, jnp.int32)
        functions[name] = functools.partial(run, True, *arguments)
    functions["loop"] = functools.partial(run, False, *arguments)
    timings = compare(functions, repeats)
    for name in functions:
        microseconds = 1e3 * timings[name].cpu / steps
        report.add(rows=rows, pages=num_pages, columns=num_columns, share=name or "nothing", microseconds=microseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("attention", "groups"), default=("attention", "groups"))
    parser.add_argument("--repeats", type=int, default=15, help="rounds of interleaved pairs")
    add_json_option(parser)
    options = parser.parse_args()
    if "attention" in options.parts:
        report = Report("sharing", "Decode attention of 64 rows, 8/4/128 heads, float32: CPU ms a step")
        for name in FORESTS:
            measure_attention(report, name, options.repeats)
        report.finish(options)
    if "groups" in options.parts:
        report = Report("sharing_groups", "find_groups: CPU microseconds a step")
        for rows, num_pages in ((256, 8 << 10), (1024, 128 << 10)):
            measure_groups(report, rows, num_pages, options.repeats)
        report.finish(options)


if __name__ == "__main__":
    main()
