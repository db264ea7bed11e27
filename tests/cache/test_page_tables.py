"""Groups of layers: tables in step with each other, and hybrid decoders that draw what they draw over one table."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
import toy
from paged_jax import AttentionMetadata, Engine, KVCache, PagePool, PageTables, SamplingParams
from paged_jax.cache.fault import Fault
from paged_jax.cache.invariants import check
from paged_jax.cache.page_table import PageTable

WINDOW, S, B = 6, decoder.PAGE_SIZE, 4
WINDOWS = (WINDOW, None)
HELD = -(-WINDOW // S) + 1  # the most pages that a row may hold behind the window after a decode step
PARAMS = np.int32(0)
forward = decoder.forward_with(WINDOWS)
hybrid_config = functools.partial(decoder.config, num_pages=41, windows=WINDOWS, window_pages=21)


def rows(*values) -> jax.Array:
    return jnp.array(values, jnp.int32)


def jitted(name):
    return jax.jit(getattr(PageTables, name))


reserve, fork, permute, truncate = map(jitted, ("reserve", "fork", "permute", "truncate"))
slide, release, publish, attach, drop = map(jitted, ("slide", "release", "publish", "attach", "drop"))
drop_pages, handles_to = map(jitted, ("drop_pages", "handles_to"))


def create() -> PageTables:
    """Tables of one size, for which each transition compiles once; 13 and 8 pages can be used."""
    return PageTables.create(hybrid_config(num_pages=14, window_pages=9, max_pages_per_sequence=8))


def leave(tables: PageTables, group: int, num_pages: int) -> tuple[PageTables, list[tuple]]:
    """Take pages away from one group until so many are free; also which pages of each group are held then."""
    groups, held = list(tables.groups), [np.zeros(0, np.int32) for _ in tables.groups]
    table = groups[group]
    held[group] = np.asarray(table.free_stack)[num_pages : int(table.num_free)]
    refcounts = table.refcounts.at[held[group]].set(1)
    groups[group] = dataclasses.replace(table, refcounts=refcounts, num_free=jnp.int32(num_pages))
    return dataclasses.replace(tables, groups=tuple(groups)), [tuple(held)]


def contents(tables: PageTables) -> list[list]:
    """All that a refused transition must leave as it was."""
    return [
        [np.asarray(x).tolist() for x in (t.refcounts, t.free_stack, t.num_free, t.pages, t.lengths, t.first_column)]
        for t in tables.groups
    ]


def check_all(tables: PageTables, handles=(), granted=None) -> None:
    """The invariants of every table; equal lengths; every row holds what its next token sees."""
    everything, local = tables.groups
    for table, held in zip(tables.groups, zip(*handles, strict=True) if handles else ((), ()), strict=True):
        check(table, held, granted)
    assert np.array_equal(everything.lengths, local.lengths) and not np.any(everything.first_column)
    assert np.all(local.first_column <= local.first_seen(local.lengths, WINDOW))


def num_mapped(tables: PageTables) -> np.ndarray:
    """Pages that each row maps in each group; [G, B]."""
    return np.stack([np.sum(np.asarray(table.pages) > 0, axis=1) for table in tables.groups])


# ---- the tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [150, pytest.param(2000, marks=pytest.mark.long)])
def test_a_random_history_keeps_every_group_sound_and_in_step(num_steps):
    random = np.random.default_rng(0)
    tables, handles = create(), []
    refused = np.zeros(2, int)
    for _ in range(num_steps):
        kind = random.choice("reserve reserve fork permute truncate release publish attach drop".split())
        granted = None
        if kind == "reserve":
            tables = slide(tables)
            assert np.all(num_mapped(tables)[1] <= HELD)
            before, new_tokens = tables, random.integers(0, 7, B).astype(np.int32)
            tables, reservation = reserve(tables, new_tokens)
            granted = jnp.where(reservation.granted, new_tokens, 0)
            refused += [int(t.fault) & Fault.OUT_OF_PAGES for t in tables.groups]
            for old, new in zip(before.groups, tables.groups, strict=True):
                same = ~np.asarray(reservation.granted)
                assert np.array_equal(np.asarray(old.pages)[same], np.asarray(new.pages)[same])
                assert np.array_equal(new.lengths, old.lengths + granted)
            tables = tables.clear_fault()
        elif kind == "fork":
            tables, _ = fork(tables, rows(random.integers(B)), rows(random.integers(B)))
        elif kind == "permute":
            tables = permute(tables, random.integers(0, B, B).astype(np.int32))
        elif kind == "truncate":
            lengths, back = np.asarray(tables.lengths), random.integers(0, 9, B).astype(np.int32)
            tables = truncate(tables, np.maximum(lengths - back, 0))
        elif kind == "release":
            tables = release(tables, np.arange(B) == random.integers(B))
        elif kind == "publish":
            row = random.integers(B)
            tables, new = publish(tables, rows(row)[0], rows(random.integers(0, tables.lengths[row] + 1))[0])
            handles.append(new)
        elif kind == "attach" and handles:
            tables, _ = attach(tables, rows(random.integers(B))[0], handles[random.integers(len(handles))])
        elif kind == "drop" and handles:
            tables = drop(tables, handles.pop(random.integers(len(handles))))
        check_all(tables, handles, granted)
    assert np.all(refused > 0), "both groups ran short"
    for handle in handles:
        tables = drop(tables, handle)
    assert release(tables, np.ones(B, bool)).num_free.tolist() == [13, 8]


@pytest.mark.parametrize("short", [0, 1])
def test_a_row_that_one_group_refuses_is_refused_by_all(short):
    tables, held = leave(create(), short, 5)
    tables, _ = reserve(tables, rows(7, 8, 0, 0))
    before = contents(tables)
    refused, reservation = reserve(tables, rows(0, 8, 1, 0))
    assert reservation.granted.tolist() == [True, False, False, True]
    assert contents(refused) == before
    assert [int(t.fault) for t in refused.groups] == [Fault.OUT_OF_PAGES * (group == short) for group in range(2)]
    granted, reservation = reserve(refused, rows(1, 4, 1, 0))
    assert reservation.granted.tolist() == [True, True, False, True], "one page is left: the first that needs one"
    check_all(granted, held, rows(1, 4, 0, 0))


def test_a_row_refused_by_one_group_leaves_its_shared_page_to_the_other_owner():
    """Alone, the last of all owners keeps a page. Where it is refused elsewhere, the first must still get its copy."""
    tables, held = leave(create(), 1, 3)
    tables, _ = reserve(tables, rows(6, 0, 0, 0))
    tables, _ = fork(tables, rows(0), rows(1))
    made, reservation = reserve(tables, rows(1, 7, 0, 0))
    assert reservation.granted.tolist() == [True, False, True, True]
    assert all(int(group.copy_target[0]) > 0 for group in reservation.groups)
    check_all(made, held, rows(1, 0, 0, 0))


def test_a_row_is_cut_and_published_only_where_its_next_token_sees_everything():
    tables, _ = reserve(create(), rows(20, 0, 0, 0))
    tables, _ = reserve(slide(tables), rows(3, 0, 0, 0))  # the window of token 20 begins in page 3
    back = truncate(tables, rows(20, 0, 0, 0))
    assert back.lengths[0] == 20 and not int(back.fault), "the last step can be taken back"
    before = contents(tables)
    for length in (13, 16):
        cut = truncate(tables, rows(length, 0, 0, 0))
        assert contents(cut) == before and int(cut.fault) == Fault.BAD_ARGUMENT
        published, handles = publish(tables, rows(0)[0], rows(length)[0])
        assert contents(published) == before and [int(handle.num_tokens) for handle in handles] == [0, 0]
    tables, handles = publish(tables, rows(0)[0], rows(18)[0])
    assert [np.flatnonzero(handle.pages).tolist() for handle in handles] == [[0, 1, 2, 3, 4], [3, 4]]
    tables, ok = attach(tables, rows(2)[0], handles)
    assert ok and tables.lengths[2] == 18
    check_all(tables, [handles])


def test_references_without_a_handle_are_shared_and_dropped_page_by_page():
    tables, _ = reserve(create(), rows(10, 0, 0, 0))
    tables, handles = publish(tables, rows(0)[0], rows(9)[0])
    tables, again = publish(tables, rows(0)[0], rows(9)[0])
    tables = release(tables, np.arange(B) == 0)
    pages = jnp.stack([handle.pages for handle in handles])
    made = handles_to(tables, pages, jnp.stack([handle.first_column for handle in handles]), rows(9)[0])
    assert [x.tolist() for x in jax.tree.leaves(made)[:3]] == [x.tolist() for x in jax.tree.leaves(handles)[:3]]
    tables, ok = attach(tables, rows(2)[0], made)
    assert ok and tables.lengths[2] == 9
    check_all(tables, [handles, again])
    both = jnp.concatenate([pages, pages], axis=1)
    tables = drop_pages(tables, both)
    check_all(tables)
    before = contents(tables)
    refused = drop_pages(tables, both)  # the row owns one reference to each, not two
    assert contents(refused) == before and int(refused.fault) == Fault.BAD_ARGUMENT
    assert int(drop_pages(tables, jnp.full_like(both, 99)).fault) == Fault.BAD_ARGUMENT
    assert release(tables, np.ones(B, bool)).num_free.tolist() == [13, 8]


def test_one_group_is_one_page_table():
    tables, table = PageTables.create(decoder.config(64)), PageTable.create(decoder.config(64))
    new_tokens = rows(5, 0, 9, 1)
    tables, reservations = jax.jit(lambda t, n: t.slide().reserve(n))(tables, new_tokens)
    table, reservation = jax.jit(PageTable.reserve)(table, new_tokens)
    for ours, alone in ((tables.groups, (table,)), (reservations.groups, (reservation,))):
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, alone))
    text = str(jax.make_jaxpr(lambda t, n: t.slide().reserve(n))(tables, new_tokens))
    alone = str(jax.make_jaxpr(lambda t, n: t.reserve(n))(table, new_tokens))
    assert text.count("\n") <= alone.count("\n") + 3, "one group costs more than its table"


# ---- decoding ------------------------------------------------------------------------------------------------

T = 64


def prompts(*lengths) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, decoder.VOCAB, n).tolist() for n in lengths]


def greedy(text, num_tokens) -> list[int]:
    return decoder.dense_greedy(text, num_tokens, WINDOWS)


@functools.partial(jax.jit, donate_argnums=0)
def step(cache, tokens, query_lens):
    """The greedy tokens after the new tokens of each row, and how many pages each group copied."""
    tables, made = cache.tables.slide().reserve(query_lens)
    metadata = AttentionMetadata.ragged(tables, query_lens, T, active=made.granted)
    logits, pool = forward(PARAMS, tokens, cache.pool.copy(made), metadata)
    copies = jnp.stack([jnp.count_nonzero(group.copy_target) for group in made.groups])
    return KVCache(tables, pool), made.granted, jnp.argmax(logits, axis=-1).astype(jnp.int32), copies


def compute(cache: KVCache, pieces: list[list[int]]) -> tuple[KVCache, list[int], list[int]]:
    flat = [token for piece in pieces for token in piece]
    packed = np.array(flat + [0] * (T - len(flat)), np.int32)
    cache, granted, tokens, copies = step(cache, packed, np.array([len(piece) for piece in pieces], np.int32))
    assert np.all(granted)
    return cache, tokens.tolist(), copies.tolist()


def test_after_every_step_local_layers_hold_the_pages_of_their_window_and_tokens_are_those_of_a_dense_forward():
    texts = prompts(3, 9, 30, 17)
    cache, tokens, _ = compute(KVCache.create(hybrid_config()), texts)
    drawn = [[token] for token in tokens]
    for _ in range(23):
        cache, tokens, _ = compute(cache, [[token] for token in tokens])
        for row, token in zip(drawn, tokens, strict=True):
            row.append(token)
        check_all(cache.tables)
        everything, local = num_mapped(cache.tables)
        assert np.all(local <= HELD) and np.array_equal(everything, -(-np.asarray(cache.tables.lengths) // S))
    assert drawn == [greedy(text, 24) for text in texts]


def test_a_prompt_in_chunks_holds_a_window_and_a_chunk():
    config = hybrid_config()
    (text,) = prompts(60)
    cache = KVCache.create(config)
    for at in range(0, 60, 8):
        cache, tokens, _ = compute(cache, [text[at : at + 8], [], [], []])
        assert num_mapped(cache.tables)[1, 0] <= config.pages_mapped(WINDOW, 60, 8) == 4
    assert num_mapped(cache.tables)[0, 0] == 15
    assert tokens[:1] == greedy(text, 1)


@pytest.mark.parametrize("prompt_length", [8, 22])
def test_forks_copy_on_write_in_every_group(prompt_length):
    (text,) = prompts(prompt_length)
    cache, _, _ = compute(KVCache.create(hybrid_config()), [text, [], [], []])
    tables, ok = fork(cache.tables, rows(0, 0, 0), rows(1, 2, 3))
    assert np.all(ok)
    feed = [7, 19, 32, 50]  # what each row continues the prompt with
    cache, tokens, copies = compute(KVCache(tables, cache.pool), [[token] for token in feed])
    assert copies == ([3, 3] if prompt_length % S else [0, 0])
    _, after, _ = compute(cache, [[token] for token in tokens])
    assert [list(pair) for pair in zip(tokens, after, strict=True)] == [greedy([*text, token], 2) for token in feed]


def test_the_pools_of_all_groups_are_updated_in_place():
    config = hybrid_config(num_pages=40_000, window_pages=10_000)
    cache = jax.eval_shape(lambda: KVCache.create(config))
    shapes = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (T, B))
    memory = step.lower(cache, *shapes).compile().memory_analysis()
    assert memory is not None and cache.pool.num_bytes == config.pool_bytes
    assert memory.alias_size_in_bytes >= config.pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < 0.02 * config.pool_bytes, "the pool is copied"


# ---- the engine ----------------------------------------------------------------------------------------------


@pytest.mark.long  # other engines of hybrids stand in tests/engine/test_hybrids.py
def test_an_engine_gives_the_tokens_of_a_dense_forward_and_compiles_once():
    texts = prompts(5, 41, 3, 26, 18, 9)
    params = [SamplingParams(max_new_tokens=20, num_samples=1 + i % 2) for i in range(6)]
    traces = []

    def counted(*arguments):
        traces.append(1)
        return forward(*arguments)

    config = hybrid_config(window_pages=1 + 9)
    engine = Engine(counted, PARAMS, config, token_counts=(4, 16), visit_steps=4, prefix_cache=False)
    completions = engine.generate(texts, params)
    for text, samples in zip(texts, completions, strict=True):
        assert all(list(sample.tokens) == greedy(text, 20) for sample in samples)
    assert engine.tables.num_free.tolist() == [40, 9]
    compiled = len(traces)
    assert engine.generate(texts[:3], params[:3]) == completions[:3]
    assert len(traces) == compiled


def test_what_cannot_be_served_is_refused_with_its_name():
    engine = Engine(forward, PARAMS, hybrid_config(window_pages=4), token_counts=(4, 16))
    with pytest.raises(ValueError, match="needs 6 pages of layers with a window, but the pool has 3 .*_pages to 7"):
        engine.add_request([1] * 40, SamplingParams(max_new_tokens=4))


def test_a_layer_may_not_see_what_its_cache_gives_up():
    config = toy.config(windows=WINDOWS)
    metadata = AttentionMetadata.decode(PageTables.create(config), jnp.ones(B, bool))
    pool, params = jax.eval_shape(lambda: PagePool.create(config)), toy.init_params()

    def trace(**options):
        jax.eval_shape(lambda pool: toy.forward(params, jnp.zeros(B, jnp.int32), pool, metadata, **options), pool)

    trace(windows=WINDOWS)
    trace(windows=(5, None))
    with pytest.raises(ValueError, match="this layer sees everything, but its cache .* before a window of 6"):
        trace()
    with pytest.raises(ValueError, match="this layer sees 7 tokens, but its cache gives up pages"):
        trace(windows=(7, None))


def test_one_table_does_not_serve_layers_with_windows():
    with pytest.raises(ValueError, match="some layers of the config have windows, .* use PageTables"):
        PageTable.create(hybrid_config())
