"""The prefix cache on a page table: what is shared, what is kept, what is refused."""

import numpy as np
import pytest

from paged_jax.cache.invariants import check
from paged_jax.cache.page_table import PageTable
from paged_jax.prefix.cache import PrefixCache
from table_model import CONFIG, TRANSITIONS, B, M, P, S

PROMPT = list(range(100, 100 + 3 * S + 2))


def append(table, row: int, num_tokens: int):
    """Compute the next tokens of a row."""
    new_tokens = np.zeros(B, np.int32)
    new_tokens[row] = num_tokens
    table, reservation = TRANSITIONS.reserve(table, new_tokens)
    assert reservation.granted[row]
    return table


def release(table, *rows: int):
    return TRANSITIONS.release(table, np.isin(np.arange(B), rows))


@pytest.fixture
def cache():
    return PrefixCache(S)


@pytest.fixture
def table(cache):
    """A table whose row 0 computed PROMPT, cached it, and was released."""
    table = append(PageTable.create(CONFIG), 0, len(PROMPT))
    return release(cache.insert(table, 0, PROMPT), 0)


def test_a_prompt_is_found_again(cache, table):
    assert int(table.num_free) == P - 1 - 3  # its last two tokens fill no page
    table, num_cached = cache.match(table, 1, PROMPT)
    assert num_cached == int(table.lengths[1]) == 3 * S
    assert np.asarray(table.pages[1, :3]).tolist() == cache.pages.tolist()
    check(table, [cache.pages])
    assert (cache.num_asked_tokens, cache.num_hit_tokens) == (len(PROMPT), 3 * S)


def test_match_and_pin_are_one_operation(cache, table):
    table, _ = cache.match(table, 1, PROMPT)
    table = cache.evict(table, 9)
    assert cache.num_pages == 3
    check(table, [cache.pages])


def test_never_the_whole_prompt(cache, table):
    _, num_cached = cache.match(table, 1, PROMPT[: 3 * S])
    assert num_cached == 2 * S  # one token at least is left to compute, and pages are whole
    assert cache.match(table, 1, PROMPT[: 3 * S + 1])[1] == 3 * S
    assert cache.match(table, 1, PROMPT[:S])[1] == 0
    assert cache.match(table, 1, [])[1] == 0


def test_a_page_is_matchable_only_after_the_step_that_wrote_it(cache):
    table = append(PageTable.create(CONFIG), 0, len(PROMPT))
    table, num_cached = cache.match(table, 1, PROMPT)
    assert num_cached == 0
    table = cache.insert(table, 0, PROMPT)
    assert cache.match(table, 1, PROMPT)[1] == 3 * S


def test_salt_and_adapter_keep_prompts_apart(cache):
    table = append(PageTable.create(CONFIG), 0, S)
    table = cache.insert(table, 0, PROMPT[:S], salt="a", adapter="b")
    for salt, adapter in (("", ""), ("a", ""), ("", "b"), ("ab", "")):
        assert cache.match(table, 1, PROMPT, salt=salt, adapter=adapter)[1] == 0
    assert cache.match(table, 1, PROMPT, salt="a", adapter="b")[1] == S


def test_nested_prefixes_share_their_pages(cache, table):
    longer = [*PROMPT[: 3 * S], *range(S)]
    table, num_cached = cache.match(table, 1, longer)
    table = append(table, 1, len(longer) - num_cached)
    table = cache.insert(table, 1, longer)
    assert cache.num_pages == 4
    check(table, [cache.pages])


def test_two_rows_that_computed_the_same_prompt_cache_it_once(cache):
    table = append(append(PageTable.create(CONFIG), 0, len(PROMPT)), 1, len(PROMPT))
    table = cache.insert(cache.insert(table, 0, PROMPT), 1, PROMPT)
    check(table, [cache.pages])
    table = release(table, 0, 1)
    assert int(table.num_free) == P - 1 - 3


def test_the_copy_of_a_computed_prompt_may_continue_the_cached_one(cache):
    table = append(append(PageTable.create(CONFIG), 0, S), 1, 2 * S)
    table = cache.insert(table, 0, PROMPT[:S])
    table = release(cache.insert(table, 1, PROMPT[: 2 * S]), 1)  # its first page is its own, its second is cached
    table, num_cached = cache.match(table, 2, PROMPT)
    assert num_cached == 2 * S
    assert table.pages[2, 0] == table.pages[0, 0]
    check(table, [cache.pages])


def test_writing_behind_a_cached_prefix_leaves_it_alone(cache, table):
    pages = cache.pages.tolist()
    table, num_cached = cache.match(table, 1, PROMPT)
    table = TRANSITIONS.truncate(table, np.array([0, num_cached - 1, 0, 0, 0, 0], np.int32))
    table = append(table, 1, 1)  # into the last cached page: it gets a copy
    assert int(table.pages[1, 2]) not in pages
    check(table, [cache.pages])


def test_eviction_frees_pages_leaves_first(cache, table):
    table = cache.evict(table, 2)
    assert int(table.num_free) == P - 1 - 1
    assert cache.match(table, 1, PROMPT)[1] == S


def test_eviction_never_touches_a_page_in_use(cache, table):
    table, _ = cache.match(table, 1, PROMPT[: 2 * S + 1])
    table = cache.evict(table, 9)
    assert cache.num_pages == 2
    table = release(table, 1)
    table = cache.evict(table, 9)
    assert cache.num_pages == 0 and int(table.num_free) == P - 1


def test_eviction_spares_pages_that_a_handle_holds(cache, table):
    table, _ = cache.match(table, 1, PROMPT)
    table, handle = TRANSITIONS.publish(table, np.int32(1), np.int32(S), np.int32(0))
    table = cache.evict(release(table, 1), 9)
    assert cache.num_pages == 1
    table = cache.evict(TRANSITIONS.drop(table, handle), 9)
    assert int(table.num_free) == P - 1


def test_more_pages_than_a_row_holds_are_evicted_at_once(cache, table):
    for row in range(1, 4):
        tokens = [row] * (M * S)
        table = cache.insert(append(table, row, len(tokens)), row, tokens)
    table = cache.evict(release(table, 1, 2, 3), P)
    assert int(table.num_free) == P - 1


def test_reset_refuses_while_pages_are_in_use(cache, table):
    table, _ = cache.match(table, 1, PROMPT)
    with pytest.raises(RuntimeError, match="3 of 3 cached pages are in use: release their rows"):
        cache.reset(table)
    table = cache.reset(release(table, 1))
    assert int(table.num_free) == P - 1 and cache.num_pages == 0
    assert int(cache.reset(table).num_free) == P - 1


def test_changed_weights_forget_everything(cache, table):
    table, _ = cache.match(table, 1, PROMPT)
    with pytest.raises(RuntimeError, match="1 rows hold tokens that the old weights computed"):
        cache.renew(table, "v2")
    table = cache.renew(release(table, 1), "v2")
    assert cache.match(table, 1, PROMPT)[1] == 0 and int(table.num_free) == P - 1


def test_a_row_behind_its_window_is_not_cached(cache):
    table = append(PageTable.create(CONFIG), 0, len(PROMPT))
    table = cache.insert(TRANSITIONS.slide(table, 4), 0, PROMPT)
    assert cache.num_pages == 0
    check(table)


def test_one_page_is_not_cached_under_two_names(cache, table):
    table, _ = cache.match(table, 1, PROMPT)
    table = cache.insert(table, 1, PROMPT[: 2 * S], salt="another")
    assert cache.num_pages == 3
    check(table, [cache.pages])


def test_match_wants_an_empty_row(cache, table):
    table = append(table, 1, 1)
    for row in (1, B):
        with pytest.raises(
            ValueError, match=f"cannot attach a prefix to row {row}: there is no such row, or it is not"
        ):
            cache.match(table, row, PROMPT)


def test_insert_wants_the_tokens_in_the_row(cache, table):
    table = append(table, 1, S)
    with pytest.raises(ValueError, match=f"cannot cache {4 * S} tokens of row 1: it holds {S}"):
        cache.insert(table, 1, [*PROMPT, 1, 2])
    with pytest.raises(ValueError, match=f"cannot cache {S} tokens of row {B}: it holds 0"):
        cache.insert(table, B, list(range(S)))


def test_a_table_that_was_reset_needs_a_new_cache(cache, table):
    table = TRANSITIONS.reset(table)
    for use in (cache.evict, lambda table, _: cache.match(table, 1, PROMPT), lambda table, _: cache.reset(table)):
        with pytest.raises(ValueError, match="this cache holds pages of epoch 0, the table is of epoch 1"):
            use(table, 1)
