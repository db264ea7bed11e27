"""The hard cases of a page table by name.

`Driver` compares the table with plain lists after every transition; a test here says what happens and what is special.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax.cache.fault import Fault
from paged_jax.cache.invariants import check
from paged_jax.cache.page_table import PageTable
from paged_jax.cache.page_tables import Reservations
from paged_jax.cache.pool import PagePool
from pallas_kernels import read_pages
from table_model import CONFIG, TRANSITIONS, B, Driver, M, P, S

USABLE = P - 1


def only(**counts: int) -> list[int]:
    """Arguments for `reserve`: only(row0=3) asks for 3 tokens of row 0."""
    return [counts.get(f"row{b}", 0) for b in range(B)]


def mask(*rows: int) -> list[bool]:
    return [b in rows for b in range(B)]


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.release_everything()


def fill(driver: Driver, num_free: int) -> None:
    """Take pages until `num_free` are left, through handles of the last row."""
    while driver.num_free > num_free:
        driver.reserve(only(row5=min(driver.num_free - num_free, M) * S))
        driver.publish(5, len(driver.rows[5].tokens))
        driver.release(mask(5))


class TestFork:
    def test_fork_of_a_fork_then_free_the_middle_one(self, driver):
        driver.reserve(only(row0=6))
        driver.fork([(0, 1)])
        driver.reserve(only(row1=3))
        driver.fork([(1, 2)])
        driver.release(mask(1))
        driver.reserve(only(row0=1, row2=1))
        assert driver.pages[0][0] == driver.pages[2][0]

    def test_more_children_than_free_pages(self, driver):
        driver.reserve(only(row0=5))
        fill(driver, num_free=1)
        driver.release(mask(5))
        driver.fork([(0, 1), (0, 2), (0, 3), (0, 4)])
        assert driver.num_free == 1  # a fork itself needs none
        assert driver.reserve([1] * 5 + [0]) == [True, False, False, False, False, True]
        assert driver.fault == Fault.OUT_OF_PAGES

    def test_at_length_0(self, driver):
        assert driver.fork([(0, 1), (0, 2)]) == [True, True]
        assert driver.num_free == USABLE
        driver.reserve([3] * B)

    def test_at_an_exact_page_boundary(self, driver):
        driver.reserve(only(row0=2 * S))
        driver.fork([(0, 1)])
        driver.reserve(only(row0=1, row1=1))
        assert driver.num_free == USABLE - 4  # both take a fresh page and nothing is copied

    def test_fork_and_release_of_the_parent_in_one_step(self, driver):
        driver.reserve(only(row0=6))

        @jax.jit
        def step(table):
            table, ok = table.fork(jnp.array([0]), jnp.array([3]))
            return table.release(jnp.array(mask(0))), ok

        driver.table, ok = step(driver.table)
        assert ok.tolist() == [True]
        driver.rows[3], driver.rows[0] = driver.rows[0], driver.rows[1].copy()
        driver.num_transitions += 1
        driver.compare()
        driver.reserve(only(row3=1))
        assert driver.num_free == USABLE - 2  # the only owner appends in place

    def test_prompts_of_several_pages_forked_before_prefill(self, driver):
        driver.fork([(0, 1), (0, 2)])
        driver.reserve(only(row0=3 * S + 1, row1=2 * S, row2=S + 1))
        assert [sum(page > 0 for page in driver.pages[b]) for b in range(3)] == [4, 2, 2]

    def test_prompts_that_share_a_prefix_get_all_their_pages(self, driver):
        driver.reserve(only(row0=S + 1))
        driver.fork([(0, 1), (0, 2)])
        driver.reserve(only(row0=2 * S, row1=2 * S, row2=3 * S))
        assert len({driver.pages[b][0] for b in range(3)}) == 1
        assert len({driver.pages[b][1] for b in range(3)}) == 3

    @pytest.mark.parametrize(
        "pairs, expected",
        [
            ([(0, 1), (0, 1)], [False, False]),  # which of them did the caller mean?
            ([(0, 1), (1, 2)], [True, True]),  # row 1 was empty, so row 2 stays so
            ([(0, 0), (0, 6)], [False, False]),
            ([(6, 1), (-2, 2)], [False, False]),
            ([(-1, 1), (0, -1)], [False, False]),
        ],
    )
    def test_pairs_that_make_no_sense(self, driver, pairs, expected):
        driver.reserve(only(row0=5))
        assert driver.fork(pairs) == expected
        assert (driver.fault == Fault.BAD_ARGUMENT) == ((-1, 1) not in pairs and False in expected)

    def test_more_children_than_slots(self, driver):
        driver.reserve(only(row0=5))
        made = driver.fork([(0, b) for b in range(B + 2)])
        assert made == [False] + [True] * (B - 1) + [False] * 2


class TestCopyOnWrite:
    def test_two_sharers_of_a_partial_page_append_in_the_same_step(self, driver):
        driver.reserve(only(row0=6))
        driver.fork([(0, 1)])
        driver.reserve(only(row0=1, row1=1))
        assert driver.num_free == USABLE - 3  # one copies, the other keeps the page

    def test_all_sharers_append_by_priority(self, driver):
        driver.reserve(only(row0=6))
        driver.fork([(0, 1), (0, 2)])
        page = driver.pages[0][1]
        driver.reserve([1] * 3 + [0] * 3, priority=[3, 1, 2, 0, 0, 0])
        assert [driver.pages[b][1] == page for b in range(3)] == [True, False, False]
        assert driver.num_free == USABLE - 4

    def test_a_sharer_that_does_not_append_keeps_the_page(self, driver):
        driver.reserve(only(row0=6))
        driver.fork([(0, 1), (0, 2)])
        page = driver.pages[0][1]
        driver.reserve(only(row0=1, row1=1))
        assert driver.pages[2][1] == page and driver.refcounts[page] == 1

    def test_the_last_sharer_is_refused_where_an_earlier_one_could_not_copy(self, driver):
        driver.reserve(only(row0=6))
        driver.fork([(0, 1)])
        fill(driver, num_free=0)
        assert driver.reserve(only(row0=1, row1=1)) == [False, False, True, True, True, True]

    def test_both_sharers_released_in_the_same_step(self, driver):
        driver.reserve(only(row0=6))
        driver.fork([(0, 1)])
        driver.release(mask(0, 1))
        assert driver.num_free == USABLE

    def test_a_copy_and_further_pages_in_one_call(self, driver):
        driver.reserve(only(row0=S + 1))
        driver.fork([(0, 1)])
        driver.reserve(only(row0=3 * S))
        assert driver.num_free == USABLE - 2 - 4

    def test_truncate_into_a_shared_full_page_then_append(self, driver):
        driver.reserve(only(row0=2 * S))
        driver.fork([(0, 1)])
        driver.truncate([2 * S, S + 1, 0, 0, 0, 0])
        driver.reserve(only(row1=1))
        assert driver.pages[0][1] != driver.pages[1][1]

    def test_sharers_of_different_length_append_in_the_same_step(self, driver):
        driver.reserve(only(row0=S + 3))
        driver.fork([(0, 1)])
        driver.truncate([S + 3, S + 1, 0, 0, 0, 0])
        driver.reserve(only(row0=1, row1=1))

    def test_a_handle_to_a_partial_page_survives_appends(self, driver):
        driver.reserve(only(row0=S + 2))
        driver.publish(0, S + 1)
        driver.reserve(only(row0=1))
        driver.attach(1, driver.held[0].handle)
        driver.attach(2, driver.held[0].handle)
        driver.reserve(only(row1=1, row2=1))
        assert len({driver.pages[b][1] for b in range(3)} | {driver.held[0].pages[1]}) == 4


class TestReserve:
    def test_a_pool_exactly_full(self, driver):
        rows = [M * S, M * S, M * S, M * S, 3 * S, 0]
        assert all(driver.reserve(rows)) and driver.num_free == 0
        assert driver.reserve(only(row5=1)) == mask(0, 1, 2, 3, 4)
        driver.truncate([M * S, M * S, M * S, M * S, 3 * S - 1, 0])
        assert all(driver.reserve(only(row4=1)))  # in the page it has: needs none

    def test_all_slots_used(self, driver):
        driver.reserve([3 * S] * B)
        driver.reserve([1] * B)
        assert driver.num_free == USABLE - 4 * (B - 1) - 3  # the last page went to row 4

    def test_a_row_at_m_pages_asked_for_one_more(self, driver):
        driver.reserve(only(row0=M * S, row1=M * S - 1))
        assert driver.reserve(only(row0=1, row1=1, row2=1)) == mask(1, 2, 3, 4, 5)
        assert driver.fault == Fault.ROW_FULL

    def test_a_full_row_does_not_use_up_the_pages_of_others(self, driver):
        driver.reserve(only(row0=1))
        fill(driver, num_free=1)
        driver.release(mask(5))
        assert driver.reserve(only(row0=M * S, row1=1)) == mask(1, 2, 3, 4, 5)
        assert driver.fault == Fault.ROW_FULL

    def test_a_number_of_tokens_near_the_largest_integer(self, driver):
        driver.reserve(only(row0=5))
        assert driver.reserve(only(row0=2**31 - 1, row1=1)) == mask(1, 2, 3, 4, 5)

    def test_a_negative_number_of_tokens(self, driver):
        assert driver.reserve(only(row0=-1, row1=1)) == mask(1, 2, 3, 4, 5)
        assert driver.fault == Fault.BAD_ARGUMENT

    def test_whole_rows_or_nothing_and_no_overtaking(self, driver):
        driver.reserve(only(row3=1))
        fill(driver, num_free=2)
        driver.release(mask(5))
        assert driver.reserve([S, 2 * S, S, 1, 0, 0]) == [True, False, False, True, True, True]
        assert driver.num_free == 1

    def test_priority_decides_who_is_served(self, driver):
        fill(driver, num_free=1)
        driver.release(mask(5))
        assert driver.reserve([1] * 5 + [0], priority=[5, 4, 3, 2, 2, 0]) == mask(3, 5)

    def test_a_sticky_fault_then_recovery(self, driver):
        driver.reserve(only(row0=M * S, row1=M * S, row2=M * S, row3=M * S))
        driver.reserve(only(row4=M * S))
        driver.reserve(only(row4=1))
        assert driver.fault == Fault.OUT_OF_PAGES
        driver.release(mask(0))
        driver.clear_fault()
        assert all(driver.reserve(only(row0=M * S))) and driver.fault == Fault(0)

    def test_out_of_pages_in_the_middle_of_a_jitted_loop(self):
        table = PageTable.create(CONFIG)

        @jax.jit
        def decode(table):
            def step(_, carry):
                table, refused = carry
                table, reservation = table.reserve(jnp.ones(B, jnp.int32))
                return table, refused + jnp.where(reservation.granted, 0, 1)

            return jax.lax.fori_loop(0, 30, step, (table, jnp.zeros(B, jnp.int32)))

        table, refused = decode(table)
        check(table)
        lengths = np.asarray(table.lengths)
        assert lengths.tolist() == [16, 16, 16, 16, 16, 12]  # 23 pages; nobody's length ran ahead of its pages
        assert (lengths + np.asarray(refused)).tolist() == [30] * B
        assert int(table.fault) == Fault.OUT_OF_PAGES  # it stuck; rows at 16 of 20 tokens are not full

    def test_a_page_freed_and_handed_out_again_in_one_step_while_a_copy_is_pending(self, driver):
        """Row 0 frees its page, which becomes the copy of row 1's page, in one jitted step with the real pool."""
        pool = PagePool.create(dataclasses.replace(CONFIG, dtype="float32"))
        ids = jnp.broadcast_to(jnp.arange(P, dtype=jnp.float32)[:, None, None, None], pool.arrays[0].data.shape)
        pool = pool.replace(0, dataclasses.replace(pool.arrays[0], data=ids))  # page p holds p
        driver.reserve(only(row0=3, row1=3))
        driver.fork([(1, 2)])
        freed, shared = driver.pages[0][0], driver.pages[1][0]
        fill(driver, num_free=0)
        new_tokens = jnp.array(only(row1=1, row2=1), jnp.int32)

        @jax.jit
        def step(table, pool):
            table = table.release(jnp.array(mask(0)))
            table, reservation = table.reserve(new_tokens)
            return table, pool.copy(Reservations(reservation.granted, (reservation,))), reservation

        table, pool, reservation = step(driver.table, pool)
        check(table, [held.handle for held in driver.held], appended=new_tokens)
        assert reservation.copy_source.tolist() == [0, shared, 0, 0, 0, 0]
        assert reservation.copy_target.tolist() == [0, freed, 0, 0, 0, 0]
        keys, values = read_pages(pool.arrays[0], jnp.arange(P, dtype=jnp.int32))
        expected = np.arange(P)
        expected[freed] = shared
        assert keys[:, 0, 0, 0].tolist() == values[:, 0, 0, 0].tolist() == expected.tolist()


class TestTruncateAndPermute:
    def test_truncate_then_append_again_equals_never_appended(self, driver):
        driver.reserve(only(row0=S + 1))
        before = driver.table
        driver.reserve(only(row0=2 * S))
        driver.truncate([S + 1] + [0] * 5)
        for name in ("refcounts", "num_free", "pages", "lengths"):
            assert np.array_equal(getattr(driver.table, name), getattr(before, name)), name

    @pytest.mark.parametrize("length", [0, 1, S - 1, S, S + 1, 2 * S, 2 * S + 1])
    def test_truncate_to(self, driver, length):
        driver.reserve(only(row0=2 * S + 1))
        driver.truncate([length] + [0] * 5)
        assert driver.num_free == USABLE - -(-length // S)

    @pytest.mark.parametrize("length", [-1, 6, 100])
    def test_truncate_cannot(self, driver, length):
        driver.reserve(only(row0=5))
        driver.truncate([length] + [0] * 5)
        assert driver.fault == Fault.BAD_ARGUMENT

    def test_truncate_behind_what_the_window_gave_up(self, driver):
        driver.reserve(only(row0=3 * S))
        driver.slide(4)
        driver.truncate([S] + [0] * 5)
        assert driver.fault == Fault.BAD_ARGUMENT
        driver.truncate([2 * S] + [0] * 5)
        driver.truncate([0] * 6)

    def test_rejected_drafts_leave_no_trace(self, driver):
        driver.reserve(only(row0=S - 1))
        driver.fork([(0, 1)])
        for _ in range(3):
            driver.reserve(only(row0=4))  # drafts over the page boundary, in a copy of the shared page
            driver.truncate([S - 1, S - 1, 0, 0, 0, 0])
        assert driver.num_free == USABLE - 2

    def test_permute_adds_the_new_references_before_it_drops_the_old(self, driver):
        driver.reserve([S + 1] * 3 + [0] * 3)
        driver.permute([1, 2, 0, 3, 4, 5])  # each page is dropped by one row and added by another
        assert driver.num_free == USABLE - 6

    def test_a_beam_that_duplicates_and_one_that_dies_in_the_same_step(self, driver):
        driver.reserve([S + 1] * 3 + [0] * 3)
        driver.permute([0, 0, 2, 3, 4, 5])
        driver.reserve([1] * 3 + [0] * 3)
        assert driver.pages[0][0] == driver.pages[1][0] and driver.num_free == USABLE - 5

    def test_permute_with_a_parent_out_of_range_leaves_that_row_alone(self, driver):
        driver.reserve([S + 1] * 3 + [0] * 3)
        driver.permute([0, B, -1, 1, 4, 5])
        assert driver.fault == Fault.BAD_ARGUMENT

    def test_permute_to_an_empty_row(self, driver):
        driver.reserve([S + 1] * 3 + [0] * 3)
        driver.permute([5, 5, 5, 5, 5, 5])
        assert driver.num_free == USABLE


class TestSlide:
    @pytest.mark.parametrize("window", [1, 3, 4, 9])  # smaller than a page, equal to it, larger
    def test_windows(self, driver, window):
        for _ in range(M * S):
            driver.reserve(only(row0=1, row1=1))
            driver.slide(window)
        kept = M * S - driver.rows[0].first * S
        assert window - 1 <= kept < window - 1 + S

    def test_on_a_shared_page(self, driver):
        driver.reserve(only(row0=2 * S + 1))
        driver.fork([(0, 1)])
        driver.publish(1, S)
        driver.reserve(only(row0=1, row1=S))
        driver.slide(4)
        assert driver.refcounts[driver.held[0].pages[0]] == 1

    def test_a_row_behind_its_window_is_full_at_the_same_length(self, driver):
        driver.reserve(only(row0=M * S))
        driver.slide(4)
        assert driver.reserve(only(row0=1)) == mask(1, 2, 3, 4, 5)

    def test_forks_and_handles_of_a_row_behind_its_window(self, driver):
        driver.reserve(only(row0=3 * S + 1))
        driver.slide(5)
        driver.fork([(0, 1)])
        driver.publish(0, 3 * S)
        driver.attach(2, driver.held[0].handle)
        assert not driver.publish(0, S)  # those pages are gone
        driver.reserve([2] * 3 + [0] * 3)

    def test_a_window_of_nothing(self):
        with pytest.raises(ValueError, match="window must be at least 1"):
            PageTable.create(CONFIG).slide(0)


class TestHandles:
    def test_the_pages_live_until_the_handle_is_dropped(self, driver):
        driver.reserve(only(row0=S + 2))
        driver.publish(0, S + 2)
        driver.release(mask(0))
        assert driver.num_free == USABLE - 2
        driver.drop(driver.held[0].handle)
        assert driver.num_free == USABLE

    def test_a_handle_attaches_many_times(self, driver):
        driver.reserve(only(row0=2 * S))
        driver.publish(0, 2 * S)
        for b in range(1, B):
            assert driver.attach(b, driver.held[0].handle)
        driver.reserve([1] * B)
        assert driver.num_free == USABLE - 2 - B

    def test_attach_needs_an_empty_row(self, driver):
        driver.reserve(only(row0=5))
        driver.publish(0, 5)
        for slot in (0, B, -1):
            assert not driver.attach(slot, driver.held[0].handle)

    @pytest.mark.parametrize("slot, num_tokens, first", [(0, 6, 0), (0, -1, 0), (B, 0, 0), (-1, 1, 0), (0, 4, 2)])
    def test_publish_what_is_not_there(self, driver, slot, num_tokens, first):
        driver.reserve(only(row0=5))
        assert not driver.publish(slot, num_tokens, first)

    def test_a_freed_page_is_never_revived(self, driver):
        driver.reserve(only(row0=S))
        driver.publish(0, S)
        driver.release(mask(0))
        driver.drop(driver.held[0].handle)
        assert not driver.attach(1, driver.dropped[0])
        driver.drop(driver.dropped[0])
        assert driver.fault == Fault.STALE_HANDLE and driver.num_free == USABLE

    def test_handles_from_before_a_reset_are_stale(self, driver):
        driver.reserve(only(row0=S))
        driver.publish(0, S)
        driver.reset()
        driver.reserve(only(row0=S))  # the same page again
        assert not driver.attach(1, driver.dropped[0])
        driver.drop(driver.dropped[0])
        assert driver.num_free == USABLE - 1

    @pytest.mark.parametrize("publish", [PageTable.publish, TRANSITIONS.publish], ids=["eager", "jit"])
    def test_a_handle_outlives_the_donation_of_its_table(self, publish):
        table, _ = TRANSITIONS.reserve(PageTable.create(CONFIG), np.array(only(row0=5), np.int32))
        table, handle = publish(table, 0, 5)
        table = jax.jit(PageTable.clear_fault, donate_argnums=0)(table)
        table, ok = TRANSITIONS.attach(table, np.int32(1), handle)
        assert ok and table.lengths.tolist() == [5, 5, 0, 0, 0, 0]
