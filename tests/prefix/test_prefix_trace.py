"""The replay of traces, on one that is small enough to be counted by hand and on one against a plain model."""

import collections
import gzip
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest

from benchmarks import prefix_trace
from paged_jax.prefix.policies import POLICIES


def write(path: pathlib.Path, requests: list[list[int]]) -> pathlib.Path:
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        for blocks in requests:
            file.write(json.dumps({"timestamp": 0, "hash_ids": blocks}) + "\n")
    return path


def hits(requests: list[list[int]], num_blocks: int, policy: str = "lru") -> int:
    return prefix_trace.replay(requests, num_blocks, policy).statistics.hit_tokens


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_is_read(tmp_path, name):
    requests = [[1, 2, 3], [1, 2, 4]]
    assert prefix_trace.read_trace(write(tmp_path / name, requests)) == requests


def test_a_line_without_blocks_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n{"ids": [1]}\n')
    with pytest.raises(ValueError, match='line 2 of .*trace.jsonl has no "hash_ids"'):
        prefix_trace.read_trace(path)


def test_hits_are_counted():
    requests = [[1, 2, 3], [1, 2, 4], [9], [1, 2, 3], [9]]
    assert hits(requests, 100) == 0 + 2 + 0 + 3 + 1
    assert hits(requests, 3) == 0 + 2 + 0 + 2 + 0  # 3 went for 4, 4 for 9, 9 for 3


@pytest.mark.parametrize("num_blocks", [20, 100, 400])
def test_the_least_recently_used_leaf_goes_first(num_blocks):
    """Against a model that looks for it among all prefixes."""
    drawn = random.Random(0)
    requests = []
    for _ in range(300):
        words = [drawn.randrange(3) for _ in range(drawn.randrange(1, 9))]
        requests.append([hash(tuple(words[: i + 1])) % 2**31 for i in range(len(words))])
    used: dict[tuple, int] = {}
    expected, clock = 0, 0
    for blocks in requests:
        prefixes = [tuple(blocks[: i + 1]) for i in range(len(blocks))]
        expected += sum(prefix in used for prefix in prefixes)
        clock += 1
        used |= dict.fromkeys(prefixes, clock)
        while len(used) > num_blocks:
            continued = collections.Counter(prefix[:-1] for prefix in used)
            del used[min((prefix for prefix in used if not continued[prefix]), key=lambda prefix: used[prefix])]
    assert hits(requests, num_blocks) == expected


@pytest.mark.parametrize("pool_share", [0.25])
def test_a_pool_and_host_memory_find_as_much_as_one_cache_of_their_sum(pool_share):
    drawn = random.Random(2)
    requests = []
    for _ in range(100):  # conversations, some of which go on
        words = [drawn.randrange(4) for _ in range(drawn.randrange(1, 12))]
        requests.append([hash(tuple(words[: i + 1])) % 2**31 for i in range(len(words))])
    asked = sum(map(len, requests))
    for num_blocks in (40, 120):
        whole = prefix_trace.replay(requests, num_blocks, "lru").statistics.hit_tokens
        split = prefix_trace.replay(requests, num_blocks, "lru", pool_share).statistics.hit_tokens
        assert abs(whole - split) / asked < 0.01 and whole > 0.2 * asked
        assert prefix_trace.replay(requests, round(num_blocks * pool_share), "lru").statistics.hit_tokens < whole


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_within_its_size(policy):
    drawn = random.Random(1)
    requests = [list(range(start := drawn.randrange(200), start + drawn.randrange(1, 30))) for _ in range(100)]
    cache = prefix_trace.replay(requests, 50, policy)
    assert cache.num_pages == (50,) and cache.statistics.requests == 100


@pytest.mark.long
@pytest.mark.parametrize(
    "policy, rates, tolerance",
    [
        ("lru", (0.045, 0.212, 0.355), 0.005),
        ("s3-fifo", (0.056, 0.199, 0.344), 0.01),
        ("gdsf", (0.045, 0.218, 0.355), 0.01),
    ],
)
def test_the_conversation_trace(policy, rates, tolerance):
    """Set CONVERSATION_TRACE to the file of the Mooncake conversation trace; the rates are another implementation's."""
    path = pathlib.Path(os.environ.get("CONVERSATION_TRACE", "conversation_trace.jsonl.gz"))
    if not path.exists():
        pytest.skip(f"no trace at {path}: set CONVERSATION_TRACE")
    # in a process of its own, where no annotation is checked at each call
    code = f"""
import pathlib
from benchmarks.prefix_trace import read_trace, replay
requests = read_trace(pathlib.Path({str(path)!r}))
asked = sum(map(len, requests))
print(*(replay(requests, size, {policy!r}).statistics.hit_tokens / asked for size in (1000, 10_000, 50_000)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for found, rate in zip(map(float, result.stdout.split()), rates, strict=True):
        assert abs(found - rate) < tolerance
