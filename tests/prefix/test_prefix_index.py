"""From tokens to pages: digests, collisions, the order of eviction."""

import numpy as np
import pytest

from paged_jax.prefix.index import Namespace, PrefixIndex, blake2b, least_recently_used

NAMESPACE = Namespace("", "", "")


def constant(data: bytes) -> bytes:
    return b"the same for everything"


def ids(path) -> list[int]:
    return [page.page for page in path]


@pytest.fixture(params=[blake2b, constant], ids=["blake2b", "constant digest"])
def index(request):
    return PrefixIndex(2, digest=request.param)


def test_match_goes_page_by_page(index):
    index.insert([1, 2, 3, 4, 5], NAMESPACE, [10, 11])  # the fifth token fills no page
    assert ids(index.match([1, 2, 3, 4, 5, 6], NAMESPACE)) == [10, 11]
    assert ids(index.match([1, 2, 3], NAMESPACE)) == [10]
    assert ids(index.match([1, 2, 9, 4], NAMESPACE)) == [10]
    assert ids(index.match([9, 2, 3, 4], NAMESPACE)) == []
    assert ids(index.match([3, 4], NAMESPACE)) == []  # cached, but behind other tokens
    assert ids(index.match([], NAMESPACE)) == []


def test_prefixes_nest(index):
    index.insert([1, 2, 3, 4], NAMESPACE, [10, 11])
    index.insert([1, 2, 3, 4, 5, 6], NAMESPACE, [12])
    index.insert([1, 2, 7, 8], NAMESPACE, [13])
    assert ids(index.match([1, 2, 3, 4, 5, 6], NAMESPACE)) == [10, 11, 12]
    assert ids(index.match([1, 2, 7, 8], NAMESPACE)) == [10, 13]
    assert sorted(index.pages) == [10, 11, 12, 13] and len(index) == 4


@pytest.mark.parametrize("other", [Namespace("x", "", ""), Namespace("", "x", ""), Namespace("", "", "x")])
def test_namespaces_do_not_mix(index, other):
    index.insert([1, 2], NAMESPACE, [10])
    index.insert([1, 2], other, [11])
    assert ids(index.match([1, 2], NAMESPACE)) == [10]
    assert ids(index.match([1, 2], other)) == [11]
    assert ids(index.match([1, 2], Namespace("x", "x", ""))) == []


def test_digests_keep_apart_what_differs():
    """Each input of the digest is told apart: no two of these may hash the same bytes."""
    seen: list[bytes] = []

    def record(data: bytes) -> bytes:
        seen.append(data)
        return blake2b(data)

    index = PrefixIndex(2, digest=record)
    for namespace in (
        Namespace("ab", "c", ""),
        Namespace("a", "bc", ""),
        Namespace("", "abc", ""),
        Namespace("", "", "abc"),
    ):
        index.match([1, 2], namespace)
    for tokens in ([1, 2], [2, 1], [1, 2 + 2**32], [1, 2 + 2**16], [1 + 2**8, 2], [-1, 2], [2**63 - 1, 2]):
        index.match(tokens, NAMESPACE)
    index.insert([1, 2], NAMESPACE, [1])
    index.match([1, 2, 1, 2], NAMESPACE)
    distinct = set(seen)
    assert len(distinct) == 4 + 7 + 1
    assert len({blake2b(data) for data in distinct}) == len(distinct)


def test_digests_are_the_same_in_every_process():
    index = PrefixIndex(2)
    index.insert([1, 2, 3, 4], Namespace("salt", "adapter", "weights"), [1, 2])
    path = index.match([1, 2, 3, 4], Namespace("salt", "adapter", "weights"))
    assert path[1].digest.hex() == "9220242700c843a4cf44054eb5dd3f07425160e48d568e4c2537eeb8be6df9a0"


def test_tokens_may_be_arrays_of_any_integer_type(index):
    index.insert(np.array([1, 2], np.int32), NAMESPACE, [10])
    assert ids(index.match(np.array([1, 2], np.uint16), NAMESPACE)) == [10]


@pytest.mark.parametrize("tokens", [np.array([1.0, 2.0]), np.array([[1, 2]]), np.array(["a", "b"])])
def test_tokens_must_be_whole_numbers(index, tokens):
    with pytest.raises(ValueError, match="tokens must be a list of whole numbers"):
        index.match(tokens, NAMESPACE)


class TestEviction:
    def test_leaves_first_then_what_they_continue(self, index):
        index.insert([1, 2, 3, 4, 5, 6], NAMESPACE, [10, 11, 12])
        assert index.evict(2) == [12, 11]
        assert ids(index.match([1, 2, 3, 4, 5, 6], NAMESPACE)) == [10]

    def test_the_least_recently_used_first(self, index):
        for page in range(4):
            index.insert([page, page], NAMESPACE, [page + 10])
        index.match([0, 0], NAMESPACE)
        index.match([2, 2], NAMESPACE)
        assert index.evict(3) == [11, 13, 10]

    def test_a_used_continuation_keeps_what_it_continues(self, index):
        index.insert([1, 2, 3, 4], NAMESPACE, [10, 11])
        index.insert([5, 6], NAMESPACE, [12])
        assert index.evict(9, in_use=lambda page: page == 11) == [12]
        assert index.evict(9) == [11, 10]
        assert len(index) == 0 and index.evict(1) == []

    def test_another_policy(self):
        index = PrefixIndex(1, policy=lambda page: (page.num_uses, -page.depth))  # rarely used first, then deep ones
        index.insert([1], NAMESPACE, [10])
        index.insert([2, 3], NAMESPACE, [11, 12])
        index.insert([4, 5, 6], NAMESPACE, [13, 14, 15])
        index.match([4, 5, 6], NAMESPACE)
        assert index.evict(6) == [12, 10, 11, 15, 14, 13]

    def test_a_head_never_goes_before_its_tail_whatever_the_policy_prefers(self):
        index = PrefixIndex(1, policy=lambda page: page.depth)
        index.insert([1, 2, 3], NAMESPACE, [10, 11, 12])
        index.insert([1, 4], NAMESPACE, [13])
        assert index.evict(4) == [13, 12, 11, 10]

    def test_the_heap_of_leaves_stays_small(self, index):
        index.insert([1, 2], NAMESPACE, [10])
        for _ in range(1000):
            index.match([1, 2], NAMESPACE)
        assert len(index._leaves) < 100
        assert index.evict(1) == [10]

    def test_the_default_is_least_recently_used(self):
        assert PrefixIndex(1)._policy is least_recently_used


def test_a_page_stands_once(index):
    index.insert([1, 2], NAMESPACE, [10])
    with pytest.raises(ValueError, match=r"pages \[10\] are cached already: a page stands once"):
        index.insert([3, 4], NAMESPACE, [10])


def test_pages_that_do_not_fit_the_tokens(index):
    with pytest.raises(ValueError, match="2 pages of these tokens are not cached, but 1 were given"):
        index.insert([1, 2, 3, 4], NAMESPACE, [10])


def test_a_page_holds_a_token():
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        PrefixIndex(0)
