"""How often a prefix cache hits on a recorded trace of requests, and what a request costs the host.

    python -m benchmarks.prefix_trace FILE [--blocks 1000 10000 50000] [--policies lru s3-fifo gdsf] [--pool .25]

A trace is a file of JSON lines (perhaps gzipped), each with `hash_ids`: one number for each block of a prompt, equal
where the prompts are equal up to and including that block. The public Mooncake traces look like this, with blocks of
512 tokens.

Requests come one after the other through the `PrefixCache` that an engine uses: looked up, taken, given back, inserted.
With `--pool SHARE` that share of a cache is the pool, and the rest is host memory to which the pool gives up its pages,
as in an `Engine(host_cache_bytes=...)`.

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
from paged_jax.cache.contents import PageFormat
from paged_jax.prefix.digests import Namespace
from paged_jax.prefix.policies import POLICIES
from paged_jax.prefix.prefix_cache import PrefixCache
from paged_jax.prefix.tree import Node, encode
from paged_jax.store.page_file import PageKey
from paged_jax.store.tiers import Tiers, Wanted

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


class HostTier:
    """What the pool gives up, as an engine keeps it: the pages of each hit are in the pool or here, never in both.

    Args:
        config: of the pool.
        num_blocks: that host memory holds.
    """

    def __init__(self, config: CacheConfig, num_blocks: int):
        (form,) = PageFormat.of(config)
        self._tiers, self._page = Tiers(config, num_blocks * form.num_bytes), bytes(form.num_bytes)
        assert self._tiers.host is not None
        self._host, self._num_columns = self._tiers.host, config.max_pages_per_sequence

    def cached(self, namespace: Namespace, node: Node, group: int) -> None:
        self._host.discard(PageKey(node.fingerprint, group))

    def evicted(self, node: Node, group: int) -> None:
        key = PageKey(node.fingerprint, group)
        assert node.parent is not None
        self._host.expect(key, node.parent.fingerprint, node.tokens, len(self._page))
        self._host.fill(key, self._page)

    def bring(self, cache: PrefixCache, blocks: list[int], next_page: int) -> int:
        """Bring the blocks of a request back into the pool; returns how many were."""
        match = cache.lookup([*blocks, LAST_TOKEN])
        in_pool = {node.fingerprint: (True,) for node in match.path}
        found = self._tiers.find(Wanted(Namespace(), encode(blocks), match.num_tokens, in_pool)).result()
        if found is None:
            return 0
        pins = cache.take(match, counted=False)
        pages, (columns,) = np.zeros(self._num_columns, np.int32), found.columns
        pages[list(columns)] = range(next_page, next_page + len(columns))
        cache.insert(blocks, Namespace(), [Published(pages, found.num_tokens)])
        cache.give_back(pins)
        return len(columns)


def replay(requests: list[list[int]], num_blocks: int, policy: str, pool_share: float = 1.0) -> PrefixCache:
    """A cache of so many blocks after all requests; a share of them are the pool, the others are host memory."""
    most = max(map(len, requests))
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=64, num_pages=num_blocks + 1, max_sequences=1,
        max_pages_per_sequence=most, page_size=1,
    )  # fmt: skip
    num_pool = round(num_blocks * pool_share)
    cache, host = PrefixCache(config, POLICIES[policy], max_pages=[num_pool]), None
    if num_pool < num_blocks:
        host = HostTier(config, num_blocks - num_pool)
        cache.tell(host)
    next_page = 1
    for blocks in requests:
        next_page += host.bring(cache, blocks, next_page) if host is not None else 0
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
    parser.add_argument("--pool", type=float, default=1.0, help="share of a cache that is the pool")
    add_json_option(parser)
    options = parser.parse_args()
    requests = [blocks for blocks in read_trace(options.trace) if blocks]
    asked = sum(map(len, requests))
    report = Report("prefix_trace", f"{options.trace.name}: {len(requests)} requests, {asked} blocks")
    for policy in options.policies:
        for num_blocks in options.blocks:
            start = time.process_time()
            statistics = replay(requests, num_blocks, policy, options.pool).statistics
            seconds = time.process_time() - start
            report.add(
                policy=policy,
                blocks=num_blocks,
                pool=options.pool,
                hit_rate=round(statistics.hit_tokens / asked, 4),
                evicted=statistics.evicted_pages[0],
                cpu_seconds=seconds,
                microseconds_a_request=seconds / len(requests) * 1e6,
            )
    report.finish(options)


if __name__ == "__main__":
    main()
