"""The prefix cache by itself: what is found, what is pinned, what goes, what is refused."""

import numpy as np
import pytest
from paged_rows import Handle, PagedRows, Row

from paged_jax.cache.config import CacheConfig
from paged_jax.prefix.policies import Policy
from paged_jax.prefix.prefix_cache import Namespace, PrefixCache, Taken
from paged_jax.prefix.tree import Root, encode

S, M = 4, 16
NAMESPACE = Namespace()
PROMPT = tuple(range(100, 114))  # three pages and a half


def config(*windows: int | None, page_size: int = S, max_pages: int = M) -> CacheConfig:
    return CacheConfig(
        num_layers=len(windows), num_kv_heads=1, head_dim=8, num_pages=64, max_sequences=4,
        max_pages_per_sequence=max_pages, page_size=page_size, windows=windows,
    )  # fmt: skip


class Served:
    """A cache, and the rows that use it."""

    def __init__(self, *windows: int | None, **options):
        self.cache = PrefixCache(config(*windows), **options)
        self.rows = PagedRows(config(*windows))

    def give_up(self, drops: list[list[int]]) -> list[int]:
        """Drop what the cache returns; how many pages of each group these are."""
        for group, pages in enumerate(drops):
            for page in pages:
                self.rows.drop(group, page)
        return [len(pages) for pages in drops]

    def begin(self, prompt: tuple[int, ...], namespace: Namespace = NAMESPACE) -> tuple[Row, Taken]:
        taken = self.cache.take(self.cache.lookup(prompt, namespace))
        row = self.rows.attach(namespace, taken, prompt)
        return row, taken

    def publish(self, row: Row, num_tokens: int, taken: Taken | None = None) -> list[int]:
        handles = self.rows.publish(row, num_tokens)
        return self.give_up(self.cache.insert(row.tokens, row.namespace, handles, taken))

    def serve(self, prompt: tuple[int, ...], answer: tuple[int, ...] = (), namespace: Namespace = NAMESPACE) -> int:
        """A request as an engine serves it; how many of its tokens were found."""
        match = self.cache.lookup(prompt, namespace)
        taken = self.cache.take(match)
        row = self.rows.attach(namespace, taken, prompt)
        for stop in sorted({match.parts_at, (len(prompt) - 1) // S * S}):
            if stop > len(row.tokens):
                self.rows.append(row, prompt[len(row.tokens) : stop])
                self.publish(row, stop, taken)
        self.rows.append(row, prompt[len(row.tokens) :])
        for token in answer:
            self.rows.append(row, (token,))
        self.publish(row, len(row.tokens))
        self.give_up(self.cache.give_back(taken))
        self.rows.release(row)
        return taken.num_tokens

    def found(self, prompt: tuple[int, ...], namespace: Namespace = NAMESPACE) -> int:
        return self.cache.lookup(prompt, namespace).num_tokens


# ---- what is found -------------------------------------------------------------------------------------------


def test_a_prompt_is_found_but_for_its_last_token():
    served = Served(None)
    assert served.serve(PROMPT) == 0
    assert served.found(PROMPT) == len(PROMPT) - 1
    assert served.found((*PROMPT, 1)) == len(PROMPT)
    assert served.found(PROMPT[:1]) == served.found(()) == 0
    assert served.found(PROMPT[:2]) == 1


def test_prompts_may_part_in_the_middle_of_a_page():
    served = Served(None)
    served.serve(PROMPT)
    for count in range(len(PROMPT)):
        assert served.found((*PROMPT[:count], 1, 2)) == count


def test_of_several_pages_that_begin_alike_the_one_that_agrees_longest_is_found():
    served = Served(None)
    for tail in ((1, 1, 1), (1, 2, 1, 1), (1, 2, 3), (2,)):
        served.serve((*PROMPT[:S], *tail))
    for tail, common in (((1, 2, 3, 9), 3), ((1, 2, 9), 2), ((1, 1, 1, 1, 1), 3), ((2, 2), 1), ((3, 3), 0)):
        assert served.found((*PROMPT[:S], *tail, 0)) == S + common


def test_a_longer_page_takes_the_place_of_the_one_that_it_extends():
    served = Served(None)
    served.serve(PROMPT[:6])
    served.serve(PROMPT[:7])
    assert served.cache.num_pages == (2,)
    served.serve(PROMPT[:5])  # already there
    served.serve(PROMPT[:8])
    assert served.cache.num_pages == (2,)
    assert served.cache.statistics.evicted_pages == (0,)


def test_answers_are_found_too():
    served = Served(None)
    served.serve(PROMPT, answer=(1, 2, 3))
    assert served.found((*PROMPT, 1, 2, 3, 9)) == len(PROMPT) + 3


@pytest.mark.parametrize("other", [Namespace("x"), Namespace("", "x"), Namespace("", "", 1)])
def test_namespaces_do_not_mix(other):
    served = Served(None)
    served.serve(PROMPT)
    assert served.found(PROMPT, other) == 0
    served.serve(PROMPT, namespace=other)
    assert served.found(PROMPT, other) == len(PROMPT) - 1
    assert served.cache.num_pages == (8,)


def test_tokens_may_be_arrays_of_any_integer_type():
    served = Served(None)
    served.serve(PROMPT)
    for dtype in (np.uint8, np.int32, np.int64):
        assert served.cache.lookup(np.array(PROMPT, dtype), NAMESPACE).num_tokens == len(PROMPT) - 1


def test_tokens_are_compared_at_full_width():
    served = Served(None)
    served.serve((1, 2, 3))
    assert served.found((1 + 2**32, 2, 3)) == served.found((1 + 2**16, 2, 3)) == served.found((-1, 2, 3)) == 0


# ---- windows -------------------------------------------------------------------------------------------------


def test_the_third_prompt_that_parts_where_no_window_is_kept_is_found():
    served = Served(None, 5)
    shared = tuple(range(20))
    served.serve((*shared, *range(50, 70)))
    match = served.cache.lookup((*shared, *range(70, 90)))
    assert (match.num_tokens, match.num_known, match.parts_at) == (0, 20, 20)
    served.serve((*shared, *range(70, 90)))
    assert served.serve((*shared, *range(90, 99))) == 20
    assert served.serve((*shared, *range(200, 230))) == 20


def test_a_prompt_that_is_asked_again_and_again_stays_found():
    served = Served(None, 5)
    hits = [served.serve(PROMPT, answer=tuple(range(20))) for _ in range(5)]
    assert hits[0] == 0 and hits[2:] == [12, 12, 12]


def test_a_window_that_covers_everything_is_found_at_any_token():
    served = Served(None, 40)
    served.serve(PROMPT)
    assert [served.found((*PROMPT[:count], 1, 2)) for count in range(14)] == list(range(14))


def test_a_page_with_fewer_tokens_in_common_is_found_where_the_closest_has_no_window():
    served = Served(None, 5)
    served.serve((1, 0))
    served.serve((1, 1, *[0] * 7))  # its window begins after the first page
    match = served.cache.lookup((1, 1, 1))
    assert (match.num_tokens, match.num_known) == (1, 2)


def test_a_page_beside_a_whole_one_is_found_where_that_has_no_window():
    served = Served(None, 5)
    served.serve((*PROMPT[:5], 1))
    served.serve(PROMPT)
    match = served.cache.lookup((*PROMPT[:8], 1))
    assert (match.num_tokens, match.num_known, match.parts_at) == (5, 8, 8)


def test_the_last_tokens_may_have_pages_of_several_prefixes():
    served = Served(None, 7, 1, max_kept_pages=2)
    served.serve((0, 0, 1))
    served.serve((0, 1, 0, 0, 0, 0))  # the window of 1 token is past its first page
    served.give_up(served.cache.evict([0, 1, 0]))  # of the first prefix
    assert served.found((0, 1, 1)) == 1
    served.begin((0, 1, 1))
    kept = served.cache.keep((0, 1))
    assert (kept.num_tokens, served.cache.num_kept_pages) == (1, 2)
    served.give_up(served.cache.give_back(kept))
    served.cache.keep((0, 0))
    assert served.cache.keep((0, 1)).num_tokens == 0, "there is no room for two pages"


def test_layers_that_all_have_windows_need_no_other_pages():
    served = Served(6, 9)
    served.serve(PROMPT, answer=tuple(range(9)))
    assert served.found((*PROMPT, *range(9), 5)) == 23
    assert served.cache.num_pages == (3, 2)  # the wider window first
    served.give_up(served.cache.evict([9, 9]))
    assert served.found((*PROMPT, *range(9), 5)) == 0 and served.cache.statistics.num_branches == 0


def test_a_conversation_keeps_about_one_window():
    served = Served(None, 8)
    conversation = PROMPT
    for turn in range(6):
        found = served.serve(conversation, answer=(turn, 1, 2))
        assert turn == 0 or found == len(conversation) - 2  # all but what the user said
        conversation = (*conversation, turn, 1, 2, turn, 7)
        assert served.cache.statistics.pages_per_branch[1] <= 3
    assert served.cache.statistics.num_branches == 1


def test_forks_keep_their_windows():
    served = Served(None, 7)
    shared = tuple(range(16))
    for branch in range(4):
        served.serve((*shared, *range(branch * 50 + 20, branch * 50 + 44)))
    assert served.found((*shared, 1)) == 16
    assert served.cache.num_pages[1] == 4 * 2 + 2  # a window at the end of each branch, and that before the fork


# ---- requests ------------------------------------------------------------------------------------------------


def test_each_request_is_counted_once():
    served = Served(None)
    served.serve(PROMPT)
    match = served.cache.lookup(PROMPT)
    served.give_up(served.cache.give_back(served.cache.take(match)))
    served.give_up(served.cache.give_back(served.cache.take(match, counted=False)))
    statistics = served.cache.statistics
    assert (statistics.requests, statistics.asked_tokens, statistics.hit_tokens) == (2, 28, 13)


def test_pages_in_use_are_not_evicted():
    served = Served(None)
    served.serve(PROMPT)
    match = served.cache.lookup((*PROMPT[:8], 1))
    assert match.num_evictable == (2,)
    taken = served.cache.take(match)
    assert served.cache.num_evictable == (2,)
    assert served.give_up(served.cache.evict([9])) == [2]
    served.cache.give_back(taken)
    assert served.give_up(served.cache.evict([9])) == [2]


def test_a_page_is_used_until_all_rows_have_given_it_back():
    served = Served(None)
    served.serve(PROMPT)
    first, second = (served.cache.take(served.cache.lookup(PROMPT)) for _ in range(2))
    served.cache.give_back(first)
    assert served.cache.num_evictable == (0,)
    served.cache.give_back(second)
    assert served.cache.num_evictable == (4,)


def test_what_a_row_published_and_goes_on_holding_is_pinned():
    served = Served(None)
    row, taken = served.begin(PROMPT)
    served.rows.append(row, PROMPT)
    served.publish(row, 12, taken)
    assert (served.cache.num_pages, served.cache.num_evictable) == ((3,), (0,))
    served.give_up(served.cache.give_back(taken))
    assert served.cache.num_evictable == (3,)


def test_continuations_go_before_what_they_continue():
    served = Served(None)
    served.serve(PROMPT)
    served.serve((*PROMPT[:8], *range(8)))
    found = [served.found((*PROMPT, 1))]
    while served.cache.num_pages[0]:
        assert served.give_up(served.cache.evict([1])) == [1]
        found.append(served.found((*PROMPT, 1)))
    assert found == [14, 12, 8, 8, 8, 4, 0]


def test_an_evicted_leaf_takes_its_window_along():
    served = Served(None, 5)
    served.serve(PROMPT)
    assert served.cache.num_pages == (4, 2)
    assert served.give_up(served.cache.evict([1, 0])) == [1, 1]
    assert served.cache.statistics.evicted_pages == (1, 1)


def test_windows_are_evicted_without_the_pages_of_other_layers():
    served = Served(None, 5)
    served.serve(PROMPT)
    assert served.give_up(served.cache.evict([0, 2])) == [0, 2]
    match = served.cache.lookup((*PROMPT, 1))
    assert (match.num_tokens, match.num_known, match.parts_at) == (0, 14, 12)


def test_a_match_from_before_an_eviction_is_refused():
    served = Served(None)
    served.serve(PROMPT)
    match = served.cache.lookup(PROMPT)
    served.give_up(served.cache.evict([1]))
    with pytest.raises(ValueError, match="has lost some of the 13 tokens of this match .* look the prompt up again"):
        served.cache.take(match)
    assert served.cache.num_evictable == served.cache.num_pages == (3,)


def test_pages_are_given_back_once():
    served = Served(None)
    taken = served.cache.take(served.cache.lookup(PROMPT))
    served.cache.give_back(taken)
    with pytest.raises(ValueError, match="these 0 tokens were given back before: each is given back exactly once"):
        served.cache.give_back(taken)


def test_new_weights_make_all_pages_unreachable_at_once():
    served = Served(None, 5)
    served.serve(PROMPT)
    row, taken = served.begin((*PROMPT, 1))
    assert served.give_up(served.cache.clear()) == [0, 0]
    assert served.found((*PROMPT, 1)) == 0 and served.cache.num_evictable == (0, 0)
    served.rows.check(row)
    assert served.cache.num_pages == (4, 2)
    assert served.give_up(served.cache.give_back(taken)) == [4, 2]
    served.rows.release(row)
    assert served.cache.num_pages == (0, 0) and not any(served.rows.slots)


def test_the_cache_keeps_no_more_than_it_may():
    served = Served(None, 5, max_pages=[6, 3])
    for start in range(5):
        served.serve(tuple(range(start, start + 14)))
        assert all(held <= most for held, most in zip(served.cache.num_pages, (6, 3), strict=True))


# ---- kept prefixes -------------------------------------------------------------------------------------------


def test_a_kept_prefix_outlives_every_eviction():
    served = Served(None, 5, max_kept_pages=4)
    served.serve(PROMPT)
    kept = served.cache.keep(PROMPT)
    assert (kept.num_tokens, served.cache.num_kept_pages) == (14, 4)
    served.serve(tuple(range(20)))
    served.give_up(served.cache.evict([99, 99]))
    assert served.found((*PROMPT, 1)) == 14
    served.give_up(served.cache.give_back(kept))
    served.give_up(served.cache.evict([99, 99]))
    assert served.cache.num_pages == (0, 0)


def test_no_more_is_kept_than_there_is_room_for():
    served = Served(None, max_kept_pages=3)
    served.serve(PROMPT)
    assert served.cache.keep(PROMPT[:6]).num_tokens == 6
    assert served.cache.keep(PROMPT).num_tokens == 4
    assert served.cache.keep(PROMPT).num_tokens == 0
    assert PrefixCache(config(None)).keep(PROMPT).num_tokens == 0


def test_keeping_counts_as_no_request():
    served = Served(None, max_kept_pages=9)
    served.serve(PROMPT)
    before = served.cache.statistics
    served.cache.keep(PROMPT)
    assert served.cache.statistics == before


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [np.array([1.0, 2.0]), np.array([[1, 2]]), np.array(["a", "b"])])
def test_tokens_must_be_whole_numbers(tokens):
    with pytest.raises(ValueError, match="tokens must be a list of whole numbers, got shape"):
        PrefixCache(config(None)).lookup(tokens)


def test_handles_must_fit_the_tokens_and_the_groups():
    cache, handle = PrefixCache(config(None)), Handle(np.zeros(M, np.int32), 3, 0)
    with pytest.raises(ValueError, match="the handles hold 3 tokens, but 2 tokens were given"):
        cache.insert([1, 2], NAMESPACE, [handle])
    with pytest.raises(ValueError, match="2 handles for 1 groups of layers: give one for each"):
        cache.insert([1, 2, 3], NAMESPACE, [handle, handle])


def test_a_refused_publication_caches_nothing():
    cache = PrefixCache(config(None))
    assert cache.insert([1, 2], NAMESPACE, [Handle(np.zeros(M, np.int32), 0, 0)]) == [[]]
    assert cache.num_pages == (0,)


def test_limits_are_given_for_every_group():
    with pytest.raises(ValueError, match=r"max_pages=\[3\]: give one number for each of 2 groups"):
        PrefixCache(config(None, 5), max_pages=[3])


# ---- what it costs -------------------------------------------------------------------------------------------


def test_a_lookup_compares_few_of_many_pages_that_begin_alike():
    root, compared = Root(NAMESPACE, 1), []
    for i in range(2000):
        root.add(encode((1, i, i, i)))

    class Counted(bytes):
        def __getitem__(self, item):
            compared.append(item)
            return bytes(self)[item]

    child, common = root.closest(Counted(encode((1, 7, 7, 9))))
    assert child is root.child(encode((1, 7, 7, 7))) and common == 3 and len(compared) < 100


def test_a_policy_of_ones_own():
    class FirstInFirstOut(Policy):
        def __init__(self):
            self.order = {}

        def insert(self, node):
            self.order[node] = None

        def remove(self, node):
            del self.order[node]

        def victim(self, can_go):
            node = next(node for node in self.order if can_go(node))
            del self.order[node]
            return node

    served = Served(None, policy=FirstInFirstOut)
    for start in (0, 50, 90):
        served.serve(tuple(range(start, start + 3)))
    served.serve((0, 1, 2, 9))
    served.give_up(served.cache.evict([1]))
    assert served.found((50, 51, 52)) == 0 and served.found((90, 91, 92)) == 2
