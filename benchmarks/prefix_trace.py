"""How often a prefix cache hits on a recorded trace of requests, and what a request costs the host.

    python -m benchmarks.prefix_trace conversation_trace.jsonl.gz [--json]

A trace is a file of JSON lines, each with `hash_ids`: one number for each 512-token block of a prompt, equal where the
prompts are equal up to and including that block (the format of the Mooncake traces). Each block is a page here.
"""

import argparse
import gzip
import json
import pathlib
import time

from benchmarks.report import Report, add_json_option
from paged_jax.prefix.index import Namespace, Policy, PrefixIndex, least_recently_used

NAMESPACE = Namespace("", "", "")
POLICIES: dict[str, Policy] = {
    "least recently used": least_recently_used,
    "least often used": lambda page: (page.num_uses, page.last_used),
}


def read_trace(path: pathlib.Path) -> list[list[int]]:
    """The blocks of each request."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as lines:
        return [json.loads(line)["hash_ids"] for line in lines]


def replay(requests: list[list[int]], capacity: int, policy: Policy) -> float:
    """The share of all blocks that were cached when their request came."""
    index = PrefixIndex(page_size=1, policy=policy)
    free = list(range(capacity))
    num_hits = 0
    for blocks in requests:
        num_hits += len(index.match(blocks, NAMESPACE))
        blocks = blocks[:capacity]
        missing = len(blocks) - len(index.match(blocks, NAMESPACE, num_uses=0))
        free += index.evict(missing - len(free))
        missing = len(blocks) - len(index.match(blocks, NAMESPACE, num_uses=0))  # eviction may reach its own prefix
        if missing > len(free):
            blocks, missing = blocks[: len(blocks) - missing + len(free)], len(free)
        index.insert(blocks, NAMESPACE, [free.pop() for _ in range(missing)])
    return num_hits / sum(map(len, requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=pathlib.Path)
    parser.add_argument("--capacities", type=int, nargs="+", default=[1000, 10_000, 50_000], help="blocks")
    add_json_option(parser)
    options = parser.parse_args()
    requests = read_trace(options.trace)
    report = Report("prefix_trace", f"{options.trace.name}: {len(requests)} requests")
    for name, policy in POLICIES.items():
        for capacity in options.capacities:
            start = time.process_time()
            hit_rate = replay(requests, capacity, policy)
            microseconds = (time.process_time() - start) / len(requests) * 1e6
            report.add(policy=name, blocks=capacity, hit_rate=hit_rate, microseconds_a_request=microseconds)
    report.finish(options)


if __name__ == "__main__":
    main()
