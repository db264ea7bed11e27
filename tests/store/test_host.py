"""Host memory for pages: its budget, its order, and what is on its way."""

from paged_jax.store.costs import Rate
from paged_jax.store.host import HostPages
from paged_jax.store.page_file import PageKey

ONE, TWO, THREE = (PageKey(name, 0) for name in (b"1", b"2", b"3"))


def test_what_came_first_leaves_first_and_the_budget_holds():
    host = HostPages(max_bytes=20)
    for key in (ONE, TWO, THREE):
        host.expect(key, b"root", key.digest, 8)
        assert host.num_bytes <= 20
    assert [host.has(key) for key in (ONE, TWO, THREE)] == [False, True, True] and len(host) == 2
    host.expect(TWO, b"root", b"2", 8)  # given up again: the newest now
    host.expect(ONE, b"root", b"1", 8)
    assert [host.has(key) for key in (ONE, TWO, THREE)] == [True, True, False]
    host.expect(THREE, b"root", b"3", 21)
    assert not host.has(THREE) and host.num_bytes == 16


def test_a_page_has_its_place_before_its_bytes():
    host = HostPages(max_bytes=20)
    host.expect(ONE, b"root", b"1", 8)
    host.expect(TWO, b"root", b"2", 8)
    assert host.get(ONE) is None and host.has(ONE)
    host.fill(ONE, b"12345678")
    host.fill(THREE, b"12345678")  # gone by now
    assert host.get(ONE) == b"12345678" and not host.has(THREE)
    host.forget_expected()
    assert host.has(ONE) and not host.has(TWO)
    host.discard(ONE)
    assert len(host) == host.num_bytes == 0


def test_a_page_that_begins_with_some_tokens_is_found():
    host = HostPages(max_bytes=100)
    host.expect(PageKey(b"1", 0), b"root", b"abcd", 8)
    host.expect(PageKey(b"1", 1), b"root", b"abcd", 8)  # of another group of layers
    assert host.beginning(b"root", b"ab") == b"abcd"
    assert host.beginning(b"root", b"b") is None and host.beginning(b"other", b"ab") is None
    host.discard(PageKey(b"1", 0))
    assert host.beginning(b"root", b"ab") == b"abcd"
    host.discard(PageKey(b"1", 1))
    assert host.beginning(b"root", b"ab") is None


def test_a_rate_follows_what_is_measured_and_hope_tries_it_again():
    rate = Rate()
    assert rate.seconds(10, unknown=7.0) == 7.0
    rate.hope()
    rate.measured(100, 1.0)
    assert rate.seconds(10, unknown=7.0) == 0.1
    for _ in range(30):
        rate.measured(10, 1.0)
    assert 0.9 < rate.seconds(10, unknown=7.0) < 1.01
    for _ in range(100):
        rate.hope()
    assert rate.seconds(10, unknown=7.0) < 0.1
