"""Eviction policies by themselves: which page goes next."""

import pytest

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
