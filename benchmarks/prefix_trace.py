"""How often a prefix cache hits on a recorded trace of requests, and what a request costs the host.

    python -m benchmarks.prefix_trace FILE [--blocks 1000 10000 50000] [--policies lru s3-fifo gdsf] [--json]

A trace is a file of JSON lines (perhaps gzipped), each with `hash_ids`: one number for each block of a prompt, equal
where the prompts are equal up to and including that block. The public Mooncake traces look like this, with blocks of
512 tokens.

Requests come one after the other through the `PrefixCache` that an engine uses: looked up, taken, given back, inserted.
A block stands for a page of one token, and its number for that token, so that only whole blocks hit. The hit rate is
the share of all blocks that were cached when their request came.
"""

import argparse
import gzip
import json
import pathlib
import time
from typing import NamedTuple

import numpy as np

from benchmarks.report import Report, add_json_option
from paged_jax import CacheConfig
from paged_jax.prefix.policies import POLICIES
from paged_jax.prefix.prefix_cache import Namespace, PrefixCache

LAST_TOKEN = -1  # after the blocks of a prompt: a lookup leaves one token to compute


class Published(NamedTuple):
    """The pages of a request."""

    pages: np.ndarray
    num_tokens: int
    first_column: int = 0


def read_trace(path: pathlib.Path) -> list[list[int]]:
    """The blocks of each request.

    Raises:
        ValueError: a line without `hash_ids`.
    """
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as lines:
        requests = [json.loads(line) for line in lines]
    for number, request in enumerate(requests, 1):
        if "hash_ids" not in request:
            raise ValueError(f'line {number} of {path} has no "hash_ids": each request needs the numbers of its blocks')
    return [request["hash_ids"] for request in requests]


def replay(requests: list[list[int]], num_blocks: int, policy: str) -> PrefixCache:
    """A cache of so many blocks after all requests."""
    most = max(map(len, requests))
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=64, num_pages=num_blocks + 1, max_sequences=1,
        max_pages_per_sequence=most, page_size=1,
    )  # fmt: skip
    cache = PrefixCache(config, POLICIES[policy], max_pages=[num_blocks])
    next_page = 1
    for blocks in requests:
        taken = cache.take(cache.lookup([*blocks, LAST_TOKEN]))
        pages, num_new = taken.pages[0].copy(), len(blocks) - taken.num_tokens
        pages[taken.num_tokens : len(blocks)] = range(next_page, next_page + num_new)
        next_page += num_new
        cache.give_back(taken)
        cache.insert(blocks, Namespace(), [Published(pages, len(blocks))])
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1000, 10_000, 50_000], help="sizes of the cache")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    add_json_option(parser)
    options = parser.parse_args()
    requests = [blocks for blocks in read_trace(options.trace) if blocks]
    asked = sum(map(len, requests))
    report = Report("prefix_trace", f"{options.trace.name}: {len(requests)} requests, {asked} blocks")
    for policy in options.policies:
        for num_blocks in options.blocks:
            start = time.process_time()
            statistics = replay(requests, num_blocks, policy).statistics
            seconds = time.process_time() - start
            report.add(
                policy=policy,
                blocks=num_blocks,
                hit_rate=round(statistics.hit_tokens / asked, 4),
                evicted=statistics.evicted_pages[0],
                cpu_seconds=seconds,
                microseconds_a_request=seconds / len(requests) * 1e6,
            )
    report.finish(options)


if __name__ == "__main__":
    main()
