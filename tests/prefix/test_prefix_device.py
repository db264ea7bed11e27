"""The prefix cache beside real page tables: references agree, and tokens are those of a dense forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import AttentionMetadata, KVCache, PageTables
from paged_jax.cache.invariants import check
from paged_jax.prefix.prefix_cache import Namespace, PrefixCache, Taken

S, B, T, M = decoder.PAGE_SIZE, 4, 32, 8
WINDOWS = (None, 6)
CONFIG = decoder.config(1 + 24, B, M, WINDOWS, window_pages=1 + 16)
NAMESPACE = Namespace()
forward = decoder.forward_with(WINDOWS)


@functools.partial(jax.jit, donate_argnums=0)
def step(cache: KVCache, tokens, counts):
    tables, made = cache.tables.slide().reserve(counts)
    metadata = AttentionMetadata.ragged(tables, counts, T, active=made.granted)
    logits, pool = forward(jnp.int32(0), tokens, cache.pool.copy(made), metadata)
    return KVCache(tables, pool), made.granted, jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def attach(tables: PageTables, row, pages, first_columns, num_tokens):
    return tables.attach(row, tables.handles_to(pages, first_columns, num_tokens))


publish, drop_pages, release = map(jax.jit, (PageTables.publish, PageTables.drop_pages, PageTables.release))


class Server:
    """Serves requests one step at a time, with a prefix cache."""

    def __init__(self):
        self.cache, self.prefixes = KVCache.create(CONFIG), PrefixCache(CONFIG)
        self.waiting_drops: list[list[int]] = [[], []]
        self.tokens: list[list[int]] = [[] for _ in range(B)]  # what each row caches
        self.taken: list[Taken | None] = [None] * B

    def set_tables(self, tables: PageTables) -> None:
        self.cache = KVCache(tables, self.cache.pool)

    def give_up(self, drops: list[list[int]]) -> None:
        for waiting, pages in zip(self.waiting_drops, drops, strict=True):
            waiting += pages

    def apply_drops(self) -> None:
        while any(self.waiting_drops):
            batch = np.zeros((2, M), np.int32)
            for group, pages in enumerate(self.waiting_drops):
                batch[group, : len(pages[:M])] = pages[:M]
                del pages[:M]
            self.set_tables(drop_pages(self.cache.tables, batch))

    def make_room(self, num_tokens: int) -> None:
        """Evict until a sequence of this length fits, a copy of a partial page included."""
        self.apply_drops()
        need = np.array([CONFIG.pages_mapped(window, num_tokens, num_tokens) + 1 for window in WINDOWS])
        shortage = np.maximum(need - np.asarray(self.cache.tables.num_free), 0)
        self.give_up(self.prefixes.evict(shortage.tolist()))
        self.apply_drops()
        assert np.all(np.asarray(self.cache.tables.num_free) >= need), "eviction freed less than it promised"

    def compute(self, pieces: dict[int, list[int]]) -> dict[int, int]:
        """Rows compute tokens; the greedy ones after them."""
        flat = [token for row in range(B) for token in pieces.get(row, [])]
        counts = np.array([len(pieces.get(row, [])) for row in range(B)], np.int32)
        self.cache, granted, drawn = step(self.cache, np.array(flat + [0] * (T - len(flat)), np.int32), counts)
        assert np.all(granted)
        for row, piece in pieces.items():
            self.tokens[row] += piece
        return {row: int(drawn[row]) for row in pieces}

    def publish(self, row: int, num_tokens: int, taken: Taken | None) -> None:
        tables, handles = publish(self.cache.tables, np.int32(row), np.int32(num_tokens))
        self.set_tables(tables)
        self.give_up(self.prefixes.insert(self.tokens[row], NAMESPACE, jax.device_get(handles), taken))

    def admit(self, row: int, prompt: list[int]) -> int:
        """Compute a prompt; returns its next token."""
        match = self.prefixes.lookup(prompt, NAMESPACE)
        taken = self.taken[row] = self.prefixes.take(match)
        tables, ok = attach(
            self.cache.tables, np.int32(row), taken.pages, taken.first_columns, np.int32(taken.num_tokens)
        )
        assert ok
        self.set_tables(tables)
        self.tokens[row] = list(prompt[: taken.num_tokens])
        stops = sorted({stop for stop in (match.parts_at, (len(prompt) - 1) // S * S) if stop > taken.num_tokens})
        for stop in stops:
            self.compute({row: prompt[len(self.tokens[row]) : stop]})
            self.publish(row, stop, taken)
        return self.compute({row: prompt[len(self.tokens[row]) :]})[row]

    def end(self, row: int) -> None:
        self.publish(row, len(self.tokens[row]), None)
        taken = self.taken[row]
        assert taken is not None
        self.give_up(self.prefixes.give_back(taken))
        self.taken[row] = None
        self.set_tables(release(self.cache.tables, np.arange(B) == row))

    def check(self) -> None:
        assert not int(self.cache.tables.fault)
        held = zip(self.cache.tables.groups, self.prefixes.pages(), self.waiting_drops, strict=True)
        for table, cached, waiting in held:
            pages = np.array([*cached, *waiting], np.int32)
            check(table, [np.pad(pages, (0, 2 * table.num_pages - len(pages)))])  # one shape, one compilation


@pytest.fixture
def server():
    return Server()


def serve(server: Server, row: int, prompt: list[int], num_tokens: int) -> list[int]:
    """A request from beginning to end; the tokens that it draws, the last of which is not cached."""
    drawn = [server.admit(row, prompt)]
    while len(drawn) < num_tokens:
        drawn.append(server.compute({row: drawn[-1:]})[row])
    server.end(row)
    server.check()
    return drawn


def test_requests_with_common_beginnings_draw_what_a_dense_forward_draws(server):
    random = np.random.default_rng(0)
    roots = [random.integers(0, decoder.VOCAB, 14).tolist() for _ in range(2)]
    for turn in range(24):
        root = roots[turn % 2]
        prompt = root[: random.integers(1, 15)] + random.integers(0, 2, random.integers(1, 8)).tolist()
        server.make_room(len(prompt) + 3)
        assert serve(server, turn % B, prompt, 4) == decoder.dense_greedy(prompt, 4, WINDOWS)
    statistics = server.prefixes.statistics
    assert statistics.hit_tokens > 60 and min(statistics.evicted_pages) > 0
    server.give_up(server.prefixes.clear())
    server.apply_drops()
    assert server.cache.tables.num_free.tolist() == [24, 16]


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(server):
    conversation = [5, 6, 7]
    for _ in range(4):
        drawn = serve(server, 0, conversation, 3)
        assert drawn == decoder.dense_greedy(conversation, 3, WINDOWS)
        cached, conversation = len(conversation) + 2, [*conversation, *drawn, 9, 8]
        assert server.prefixes.lookup(conversation, NAMESPACE).num_tokens == cached  # also in the middle of a page
        server.apply_drops()
        server.check()
    assert server.prefixes.statistics.pages_per_branch[1] <= 3, "more than one window a branch"


def test_rows_that_share_a_partial_page_write_copies(server):
    serve(server, 0, [1, 2, 3, 4, 5, 6, 7], 1)
    prompts = {1: [1, 2, 3, 4, 5, 6, 7, 11], 2: [1, 2, 3, 4, 5, 6, 7, 12], 3: [1, 2, 3, 4, 5, 13]}
    drawn = {row: server.admit(row, prompt) for row, prompt in prompts.items()}
    assert [server.taken[row].num_tokens for row in (1, 2, 3)] == [7, 7, 5]
    server.check()
    for row, prompt in prompts.items():
        after = server.compute({row: [drawn[row]]})[row]
        assert [drawn[row], after] == decoder.dense_greedy(prompt, 2, WINDOWS)
        server.end(row)
    server.check()


def test_a_page_evicted_under_a_row_stays_until_the_row_ends(server):
    prompt = list(range(9))
    serve(server, 0, prompt, 1)
    drawn = server.admit(1, [*prompt, 3])
    server.give_up(server.prefixes.clear())
    server.apply_drops()
    server.check()
    assert [drawn, server.compute({1: [drawn]})[1]] == decoder.dense_greedy([*prompt, 3], 2, WINDOWS)
    server.give_up(server.prefixes.give_back(server.taken[1]))
    server.set_tables(release(server.cache.tables, np.arange(B) == 1))
    server.apply_drops()
    assert server.cache.tables.num_free.tolist() == [24, 16] and not any(map(len, server.prefixes.pages()))
