"""Eviction policies by themselves: which page goes next."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from paged_jax import CacheConfig, PrefixCache
from paged_jax.prefix.digests import Namespace
from paged_jax.prefix.policies import POLICIES, GreedyDualSizeFrequency, LeastRecentlyUsed, Policy, S3Fifo
from paged_jax.prefix.tree import Node, Root


def nodes(count: int) -> list[Node]:
    root = Root(Namespace(), 1)
    return [root.add(i.to_bytes(8, "big")) for i in range(count)]


def anyone(node: Node) -> bool:
    return True


def order(policy: Policy, pages: list[Node]) -> list[int]:
    """The order in which all pages go."""
    return [pages.index(policy.victim(anyone)) for _ in pages]


def test_least_recently_used():
    policy, pages = LeastRecentlyUsed(), nodes(4)
    for node in pages:
        policy.insert(node)
    policy.hit(pages[0])
    policy.touch(pages[2])
    assert order(policy, pages) == [1, 3, 0, 2]


def test_what_was_used_often_long_ago_ages():
    policy, pages = GreedyDualSizeFrequency(), nodes(9)
    policy.insert(pages[0])
    for _ in range(10):
        policy.hit(pages[0])
    gone = []
    for node in pages[1:]:
        policy.insert(node)
        policy.hit(node)
        gone.append(pages.index(policy.victim(anyone)))
    assert gone == [1, 2, 3, 4, 5, 0, 6, 7], "it outlives five that were used less, but not all"


def test_what_is_used_more_often_stays_longer():
    policy, pages = GreedyDualSizeFrequency(), nodes(4)
    for node in pages:
        policy.insert(node)
    for i in (0, 0, 2, 3, 3, 3):
        policy.hit(pages[i])
    assert order(policy, pages) == [1, 2, 0, 3]


def test_pages_used_once_leave_without_disturbing_the_others():
    policy, pages = S3Fifo(), nodes(30)
    for node in pages[:10]:
        policy.insert(node)
        policy.hit(node)
    for node in pages[10:]:
        policy.insert(node)
    assert sorted(pages.index(policy.victim(anyone)) for _ in range(17)) == list(range(10, 27))


def test_a_page_that_comes_back_soon_stays():
    policy, pages = S3Fifo(), nodes(12)
    for node in pages[:10]:
        policy.insert(node)
    gone = policy.victim(anyone)
    assert gone is pages[0]
    policy.insert(gone)  # its ghost is remembered
    assert [pages.index(policy.victim(anyone)) for _ in range(8)] == list(range(1, 9))


@pytest.mark.parametrize("name", POLICIES)
def test_only_what_may_go_goes(name):
    policy, pages = POLICIES[name](), nodes(200)
    for i, node in enumerate(pages):
        policy.insert(node)
        for _ in range(i % 5):
            policy.hit(node)
    free = set(pages[::7])
    gone = []
    while free:
        node = policy.victim(free.__contains__)
        free.remove(node)
        gone.append(node)
    assert sorted(map(pages.index, gone)) == list(range(0, 200, 7))
    for node in set(pages) - set(gone):
        policy.remove(node)


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_remembers_is_bounded(name):
    policy, pages = POLICIES[name](), nodes(3000)
    for i, node in enumerate(pages):
        policy.insert(node)
        policy.hit(node)
        policy.touch(node)
        if i >= 100:
            policy.victim(anyone)
    assert all(len(kept) < 500 for kept in vars(policy).values() if hasattr(kept, "__len__"))


CONFIG = CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=8, num_pages=9, max_sequences=1, max_pages_per_sequence=4, page_size=2
)


class Newest(Policy):
    """A policy that works; those below break it in one way each."""

    def __init__(self):
        self.nodes: list[Node] = []

    def insert(self, node):
        self.nodes.append(node)

    def remove(self, node):
        self.nodes.remove(node)

    def victim(self, can_go):
        node = next(node for node in reversed(self.nodes) if can_go(node))
        self.nodes.remove(node)
        return node


class Published(NamedTuple):
    pages: np.ndarray
    num_tokens: int
    first_column: int = 0


def published(page: int) -> Published:
    return Published(np.array([page, 0, 0, 0], np.int32), num_tokens=2)


def fill(policy) -> list[list[int]]:
    """Three prefixes of a page in a cache that keeps two; what was given up."""
    cache, given_up = PrefixCache(CONFIG, policy, max_pages=[2]), []
    for page in (3, 4, 5, 6):
        given_up.append(cache.insert([page, page], Namespace(), [published(page)])[0])
    return given_up


def test_a_policy_chooses():
    assert fill(Newest) == [[], [], [5], [6]]


@pytest.mark.parametrize(
    "victim, message",
    [
        (lambda self, can_go: None, "Broken chose None: victim must return a node that was inserted and"),
        (lambda self, can_go: nodes(1)[0], "Broken chose a page that is not cached"),
        (lambda self, can_go: self.nodes[0], "not removed since, and forget it"),
        (lambda self, can_go: next(node for node in self.nodes if not can_go(node)), None),
    ],
    ids=["none", "unknown", "not forgotten", "raises"],
)
def test_a_victim_that_cannot_go_is_named_with_its_policy(victim, message):
    broken = type("Broken", (Newest,), {"victim": victim})
    with pytest.raises((ValueError, StopIteration), match=message) as error:
        fill(broken)
    if message is None:
        assert "the eviction policy Broken, in its method victim" in error.value.__notes__[0]


def test_a_victim_that_is_in_use_is_refused():
    cache = PrefixCache(CONFIG, type("Broken", (Newest,), {"victim": lambda self, can_go: self.nodes[0]}))
    for page in (3, 4):
        cache.insert([page, page], Namespace(), [published(page)])
    cache.take(cache.lookup([3, 3, 7]))
    with pytest.raises(ValueError, match="Broken chose a page that a row uses, or that something cached continues"):
        cache.evict([1])


def test_an_error_in_another_method_is_named_with_its_policy():
    def insert(self, node):
        raise KeyError(node.fingerprint)

    with pytest.raises(KeyError) as error:
        fill(type("Broken", (Newest,), {"insert": insert}))
    assert error.value.__notes__ == ["This came from the eviction policy Broken, in its method insert."]


def test_what_makes_no_policy_is_refused():
    cases: dict[Any, str] = {
        Newest(): "a policy of its own, got .*Newest object.*: pass a class, such as Newest",
        type("Half", (Policy,), {"insert": Newest.insert, "remove": Newest.remove}): "Half has no method victim",
        "lru": "a policy of its own, got 'lru': pass a class, such as LeastRecentlyUsed",
        dict: "the eviction policy dict has no method insert: derive it from Policy",
    }
    for wrong, message in cases.items():
        with pytest.raises(ValueError, match=message):
            PrefixCache(CONFIG, wrong)
