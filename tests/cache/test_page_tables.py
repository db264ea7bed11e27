"""Groups of layers: tables in step with each other, and hybrid decoders that draw the tokens of one table."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toy
from paged_jax import AttentionMetadata, DecodeState, Generator, PagePool, PageTable, PageTables, SamplingParams
from paged_jax import decode_loop as loop
from paged_jax import prefill as compute
from paged_jax.cache.invariants import check
from paged_jax.cache.page_table import Fault
from paged_jax.decoding import start, stop
from paged_jax.sampling import SamplingState

WINDOW, S, B = 6, 4, 4
WINDOWS = (WINDOW, None)
PARAMS = toy.init_params()
HELD = -(-WINDOW // S) + 1  # the most pages that a row may hold behind the window after a decode step
forward = functools.partial(toy.forward, windows=WINDOWS)
full_config = functools.partial(toy.config, max_sequences=B, page_size=S)
hybrid_config = functools.partial(full_config, num_pages=41, windows=WINDOWS, window_pages=21)


def rows(*values) -> jax.Array:
    return jnp.array(values, jnp.int32)


def jitted(name):
    return jax.jit(getattr(PageTables, name))


reserve, fork, permute, truncate = map(jitted, ("reserve", "fork", "permute", "truncate"))
slide, release, publish, attach, drop = map(jitted, ("slide", "release", "publish", "attach", "drop"))


def create(num_pages=24, window_pages=12) -> PageTables:
    return PageTables.create(hybrid_config(num_pages=num_pages, window_pages=window_pages, max_pages_per_sequence=8))


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
    tables, handles = create(14, 9), []
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
    tables = create(*((6, 12), (24, 6))[short])
    tables, _ = reserve(tables, rows(7, 8, 0, 0))
    before = contents(tables)
    refused, reservation = reserve(tables, rows(0, 8, 1, 0))
    assert reservation.granted.tolist() == [True, False, False, True]
    assert contents(refused) == before
    assert [int(t.fault) for t in refused.groups] == [Fault.OUT_OF_PAGES * (group == short) for group in range(2)]
    granted, reservation = reserve(refused, rows(1, 4, 1, 0))
    assert reservation.granted.tolist() == [True, True, False, True], "one page is left: the first that needs one"
    check_all(granted, (), rows(1, 4, 0, 0))


def test_a_row_refused_by_one_group_leaves_its_shared_page_to_the_other_owner():
    """Alone, the last of all owners keeps a page. Where it is refused elsewhere, the first must still get its copy."""
    tables, _ = reserve(create(24, 4), rows(6, 0, 0, 0))
    tables, _ = fork(tables, rows(0), rows(1))
    made, reservation = reserve(tables, rows(1, 7, 0, 0))
    assert reservation.granted.tolist() == [True, False, True, True]
    assert all(int(group.copy_target[0]) > 0 for group in reservation.groups)
    check_all(made, (), rows(1, 0, 0, 0))


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


def test_one_group_is_one_page_table():
    tables, table = PageTables.create(full_config()), PageTable.create(full_config())
    new_tokens = rows(5, 0, 9, 1)
    tables, reservations = tables.slide().reserve(new_tokens)
    table, reservation = table.reserve(new_tokens)
    for ours, alone in ((tables.groups, (table,)), (reservations.groups, (reservation,))):
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, alone))
    text = str(jax.make_jaxpr(lambda t, n: t.slide().reserve(n))(tables, new_tokens))
    alone = str(jax.make_jaxpr(lambda t, n: t.reserve(n))(table, new_tokens))
    assert text.count("\n") <= alone.count("\n") + 3, "one group costs more than its table"


# ---- decoding ------------------------------------------------------------------------------------------------

NUM_TOKENS, T = 24, 32
prefill = jax.jit(functools.partial(compute, forward), donate_argnums=1)
decode_loop = jax.jit(functools.partial(loop, forward), donate_argnums=1)
begin = jax.jit(start, donate_argnums=0)
end = jax.jit(stop, donate_argnums=0)


def prompts(*lengths) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, toy.VOCAB, n).tolist() for n in lengths]


TEXTS = prompts(3, 9, 30, 17)


def greedy(text, num_tokens=NUM_TOKENS) -> list[int]:
    return toy.dense_greedy(PARAMS, text, num_tokens, WINDOWS)


def compute_row(state: DecodeState, row: int, tokens: list[int]) -> DecodeState:
    packed, query_lens = np.zeros(T, np.int32), np.zeros(B, np.int32)
    packed[: len(tokens)], query_lens[row] = tokens, len(tokens)
    state, granted = prefill(PARAMS, state, packed, query_lens)
    assert granted[row]
    return state


def begin_all(state: DecodeState, feed) -> DecodeState:
    every = np.ones(B, bool)
    return begin(state, every, np.array(feed, np.int32), np.full(B, NUM_TOKENS, np.int32), SamplingState.create(B))


def begun() -> DecodeState:
    """A state in which row b is about to decode TEXTS[b]."""
    state = DecodeState.create(hybrid_config(), NUM_TOKENS)
    for row, text in enumerate(TEXTS):
        state = compute_row(state, row, text[:-1])
    return begin_all(state, [text[-1] for text in TEXTS])


def decode(state: DecodeState, max_steps: int = NUM_TOKENS) -> tuple[DecodeState, np.ndarray]:
    state, refused = decode_loop(PARAMS, state, jnp.int32(max_steps))
    return state, np.asarray(refused)


def drawn(state: DecodeState) -> list[list[int]]:
    return [np.asarray(state.tokens)[row, :n].tolist() for row, n in enumerate(state.num_tokens.tolist())]


@pytest.mark.long  # a hybrid decoder in tests/models shows it in every run
def test_after_every_step_local_layers_hold_the_pages_of_their_window_and_tokens_are_those_of_a_dense_forward():
    state = begun()
    while np.any(state.active):
        state, refused = decode(state, 1)
        assert not np.any(refused)
        check_all(state.tables)
        everything, local = num_mapped(state.tables)
        assert np.all(local <= HELD) and np.array_equal(everything, -(-np.asarray(state.tables.lengths) // S))
    assert drawn(state) == [greedy(text) for text in TEXTS]
    assert state.tables.num_free.tolist() == [40, 20]


def test_a_prompt_in_chunks_holds_a_window_and_a_chunk():
    config = hybrid_config()
    (text,) = prompts(60)
    state = DecodeState.create(config, NUM_TOKENS)
    for at in range(0, 60, 8):
        state = compute_row(state, 0, text[at : at + 8])
        assert num_mapped(state.tables)[1, 0] <= config.pages_mapped(WINDOW, 60, 8) == 4
    assert num_mapped(state.tables)[0, 0] == 15


@pytest.mark.parametrize("prompt_length", [9, 23])
def test_forks_copy_on_write_in_every_group(prompt_length):
    (text,) = prompts(prompt_length)
    state = compute_row(DecodeState.create(hybrid_config(), NUM_TOKENS), 0, text[:-1])
    tables, ok = fork(state.tables, rows(0, 0, 0), rows(1, 2, 3))
    assert np.all(ok)
    copies = [np.count_nonzero(group.copy_target) for group in reserve(tables, rows(1, 1, 1, 1))[1].groups]
    assert copies == ([3, 3] if (prompt_length - 1) % S else [0, 0])
    feed = [7, 19, 32, 50]  # what each row continues the prompt with
    state, refused = decode(begin_all(dataclasses.replace(state, tables=tables), feed))
    assert not np.any(refused)
    assert drawn(state) == [greedy([*text[:-1], token]) for token in feed]


@functools.partial(jax.jit, static_argnums=(1, 2))
def occupy(tables: PageTables, group: int, num_pages: int) -> PageTables:
    """Take pages away from one group: those of handles that nobody drops."""
    table, row = tables.groups[group], jnp.arange(B) == 3
    table, _ = table.reserve(jnp.where(row, num_pages * S, 0))
    table = table.publish(3, num_pages * S)[0].release(row)
    return dataclasses.replace(tables, groups=tuple(table if i == group else t for i, t in enumerate(tables.groups)))


@pytest.mark.parametrize(("group", "num_pages"), [(0, 12), (1, 11)])
def test_out_of_pages_in_one_group_returns_to_the_host_and_goes_on(group, num_pages):
    state = begun()
    tables = slide(release(state.tables, np.arange(B) == 3))
    state = dataclasses.replace(state, tables=occupy(tables, group, num_pages), active=jnp.arange(B) < 3)
    state = compute_row(state, 3, TEXTS[3][:-1])
    state, refused = decode(begin_all(state, [text[-1] for text in TEXTS]))
    faults = [int(table.fault) for table in state.tables.groups]
    assert np.any(refused) and faults == [Fault.OUT_OF_PAGES * (i == group) for i in range(2)]
    expected = [greedy(text) for text in TEXTS]
    while np.any(refused):
        assert all(tokens == whole[: len(tokens)] for tokens, whole in zip(drawn(state), expected, strict=True))
        state, refused = decode(end(state, np.arange(B) == np.flatnonzero(state.active)[-1]))
    assert drawn(state)[:2] == expected[:2]


def test_the_pools_of_all_groups_are_updated_in_place():
    config = hybrid_config(num_pages=40_000, window_pages=10_000, page_size=16)
    state = jax.eval_shape(lambda: DecodeState.create(config, capacity=16))
    memory = decode_loop.lower(PARAMS, state, jnp.int32(1)).compile().memory_analysis()
    assert memory is not None and state.pool.num_bytes == config.pool_bytes
    assert memory.alias_size_in_bytes >= config.pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < 0.02 * config.pool_bytes, "the pool is copied"


# ---- the generator -------------------------------------------------------------------------------------------


def test_a_generator_gives_the_tokens_of_a_dense_forward_and_compiles_once():
    texts = prompts(5, 41, 3, 26, 18, 9)
    params = [SamplingParams(max_new_tokens=20, num_samples=1 + i % 2) for i in range(6)]
    traces = []

    def counted(*step):
        traces.append(1)
        return forward(*step)

    generator = Generator(counted, PARAMS, hybrid_config(window_pages=1 + 9), prefill_tokens=16, steps_per_visit=4)
    completions = generator.run(texts, params)
    for text, samples in zip(texts, completions, strict=True):
        assert all(list(sample.tokens) == greedy(text, 20) for sample in samples)
    assert generator.state.tables.num_free.tolist() == [40, 9]
    compiled = len(traces)
    assert generator.run(texts[:3], params[:3]) == completions[:3]
    assert len(traces) == compiled


def test_what_cannot_be_served_is_refused_with_its_name():
    generator = Generator(forward, PARAMS, hybrid_config(window_pages=4), prefill_tokens=16)
    with pytest.raises(ValueError, match="needs 6 pages of layers with a window, but the pool has 3 .*_pages to 7"):
        generator.submit([1] * 40, SamplingParams(max_new_tokens=4))
    with pytest.raises(ValueError, match="prefix_cache=True, but some layers .* leave it out, or create .* windows="):
        Generator(forward, PARAMS, hybrid_config(), prefix_cache=True)


def test_a_layer_needs_the_metadata_of_its_group():
    config = hybrid_config()
    metadata = AttentionMetadata.decode(PageTables.create(config), jnp.ones(B, bool))
    pool, tokens = jax.eval_shape(lambda: PagePool.create(config)), jnp.zeros(B, jnp.int32)

    def trace(metadata: Any = metadata, **options):
        jax.eval_shape(lambda pool: toy.forward(PARAMS, tokens, pool, metadata, **options), pool)

    trace(windows=WINDOWS)
    trace(windows=(5, None))
    with pytest.raises(ValueError, match="this layer sees everything, but its cache .* behind a window of 6"):
        trace()
    with pytest.raises(ValueError, match="this layer sees 7 tokens, but its cache gives up pages"):
        trace(windows=(7, None))
    with pytest.raises(ValueError, match="the metadata is that of 2 groups of layers: give layer i its metadata.layer"):
        trace(_NoLayers(metadata), windows=WINDOWS)
    with pytest.raises(ValueError, match="there is no layer 2 in this cache of 2 layers"):
        metadata.layer(2)
    with pytest.raises(ValueError, match="some layers of the config have windows, .* use PageTables"):
        PageTable.create(config)


class _NoLayers:
    """Metadata that a decoder passes on as it is."""

    def __init__(self, metadata):
        self.metadata = metadata
        self.positions, self.last_tokens = metadata.positions, metadata.last_tokens

    def layer(self, index):
        return self.metadata
