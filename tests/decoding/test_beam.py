"""Beam search over pages finds what plain Python finds, whatever runs short, and holds each page once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
import plain_beams
from paged_jax import Beams, Finish, KVCache, Stepper, beam_search
from paged_jax.cache.invariants import check
from paged_jax.decoding.beam import _within
from paged_jax.decoding.hypotheses import Hypotheses, Rules

PLAIN, HYBRID = (None,), (None, 6)
Q, LONGEST, W, NEW = 6, 20, 4, 10  # prompts, and two groups of rows for them: one program for most tests
STOPS, NO_STOPS = np.array([5, 9, 60, 61, 62, 63], np.int32), np.full(6, -1, np.int32)
WIDTHS, LIMITS = np.array([4, 1, 3, 2, 4, 4], np.int32), np.array([10, 10, 5, 10, 10, 1], np.int32)
EARLY = (False, True, "never", False, True, "never")  # of each prompt
TRACES = {PLAIN: 0, HYBRID: 0}


def queue(seed: int):
    rng = np.random.default_rng(seed)
    lens = rng.integers(1, LONGEST + 1, Q).astype(np.int32)
    return rng.integers(0, decoder.VOCAB, (Q, LONGEST)).astype(np.int32), lens


@functools.cache
def program(windows):
    def forward(*arguments):
        TRACES[windows] += 1
        return decoder.forward(*arguments, windows=windows)

    def search(cache, prompts, lens, stops, widths, limits, penalty):
        return beam_search(
            Stepper(forward, (16,)), jnp.int32(0), prompts, lens, cache, width=W, max_new_tokens=NEW,
            stop_tokens=stops, widths=widths, limits=limits, length_penalty=penalty, early_stopping=EARLY,
        )  # fmt: skip

    return jax.jit(search)


@functools.cache
def empty_cache(windows) -> KVCache:
    config = decoder.config(1 + 56, 2 * W + 1, windows=windows)  # the last row is of no group
    return jax.jit(KVCache.create, static_argnums=0)(config)


@jax.jit
def hold(cache: KVCache, lens) -> tuple[KVCache, list]:
    """Publish so many tokens of each row, which keeps their pages from whoever comes."""
    cache, _ = cache.reserve(lens)
    tables, handles = cache.tables, []
    for row in range(4):
        tables, handle = tables.publish(row, lens[row])
        handles.append(handle)
    return KVCache(tables.release(lens > 0), cache.pool), handles


@jax.jit
def drop(tables, handles):
    return functools.reduce(lambda tables, handle: tables.drop(handle), handles, tables)


def run(
    prompts, lens, *, windows=PLAIN, stops=STOPS, widths=WIDTHS, limits=LIMITS, penalty: Any = 1.0, held=()
) -> Beams:
    """A search while handles hold the pages of so many tokens."""
    holding = np.zeros(2 * W + 1, np.int32)
    holding[: len(held)] = held
    cache, handles = hold(empty_cache(windows), holding)
    penalty = np.broadcast_to(np.float32(penalty), Q)
    result, cache = program(windows)(cache, prompts, lens, stops, widths, limits, penalty)
    tables = drop(cache.tables, handles)
    for table in tables.groups:
        check(table)
        assert table.num_free == table.num_pages - 1 and not np.any(table.lengths) and table.fault & ~1 == 0
    return jax.device_get(result)


def plain(prompt, windows=PLAIN, **options):
    """The sequences of one prompt."""

    def logprobs_after(drawn):
        logits = decoder.dense_logits([*prompt.tolist(), *drawn], windows).astype(np.float64)
        return logits - np.log(np.sum(np.exp(logits)))

    return plain_beams.search(logprobs_after, **options)


def check_prompt(found: Beams, q: int, expected: list[plain_beams.Sequence], stops=STOPS):
    for i in range(W):
        length = found.lengths[q, i]
        if i >= len(expected):
            assert found.scores[q, i] == -np.inf and length == 0 and found.finish[q, i] == Finish.UNFINISHED
            continue
        assert tuple(found.tokens[q, i, :length].tolist()) == expected[i].tokens, f"sequence {i} of prompt {q}"
        assert not np.any(found.tokens[q, i, length:]) and not np.any(found.logprobs[q, i, length:])
        assert np.isclose(found.scores[q, i], expected[i].score, atol=1e-5, rtol=1e-5)
        assert np.isclose(np.sum(found.logprobs[q, i]), expected[i].total, atol=1e-5, rtol=1e-5)
        stopped = expected[i].tokens[-1] in stops
        assert found.finish[q, i] == (Finish.STOP_TOKEN if stopped else Finish.MAX_TOKENS)


@pytest.mark.parametrize(
    "windows",
    # With windows it is another program; in the short run a checkpoint that has some is compared with transformers.
    [pytest.param(PLAIN, id="plain"), pytest.param(HYBRID, id="hybrid", marks=pytest.mark.long)],
)
def test_every_prompt_finds_what_plain_python_finds_with_plenty_of_pages_and_with_few(windows):
    prompts, lens = queue(0)
    several = [0.5, 1.0, 2.0, 0.0, -1.0, 0.5]  # one for each prompt
    for penalty, held in ((1.0, ()), (0.5, (64, 64, 40)), (several, (64, 64, 44))):  # the largest tree has 13 pages
        found = run(prompts, lens, windows=windows, penalty=penalty, held=held)
        for q in range(Q):
            options = dict(width=int(WIDTHS[q]), limit=int(LIMITS[q]), stop=tuple(STOPS.tolist()), early=EARLY[q])
            options["penalty"] = np.broadcast_to(penalty, Q)[q]
            check_prompt(found, q, plain(prompts[q, : lens[q]], windows, **options))
        assert found.peak_pages[0] <= 56 - sum(held) // 4
        if not held:
            plenty = found.counters
    assert plenty.preemptions == 0 < found.counters.preemptions and found.counters.recomputed_tokens > 0


def test_a_prompt_whose_beams_are_in_the_way_of_older_ones_begins_again_and_finds_the_same():
    prompts, lens = queue(0)
    lens[:] = LONGEST  # five pages that all beams of a prompt share, so that none of them gives them up
    options: dict[str, Any] = dict(stops=NO_STOPS, widths=np.full(Q, W, np.int32), limits=np.full(Q, 8, np.int32))
    plenty = run(prompts, lens, **options)
    short = run(prompts, lens, **options, held=(64, 64, 40))
    computed = short.counters.computed_tokens - short.counters.recomputed_tokens
    assert computed >= plenty.counters.computed_tokens + LONGEST, "a prompt was computed again"
    assert np.array_equal(short.tokens, plenty.tokens) and np.array_equal(short.scores, plenty.scores)
    for q in range(Q):
        check_prompt(short, q, plain(prompts[q], width=W, limit=8), NO_STOPS)


def test_a_prompt_is_computed_once_for_all_its_beams():
    prompts, lens = queue(1)
    found = run(prompts, lens, stops=NO_STOPS)
    assert found.counters.computed_tokens == np.sum(lens) + np.sum(WIDTHS * (LIMITS - 1))
    assert found.counters.drawn_tokens == Q + np.sum(WIDTHS * (LIMITS - 1))


class PageTree:
    """The most distinct pages that the beams of a prompt have at once: those that begin alike share them."""

    def __init__(self, prompt: list[int]):
        self.prompt, self.most = tuple(prompt), 0

    def see(self, beams: list[plain_beams.Sequence]) -> None:
        size, sequences = decoder.PAGE_SIZE, [self.prompt + beam.tokens for beam in beams]
        pages = {s[: min(start + size, len(s))] for s in sequences for start in range(0, len(s), size)}
        self.most = max(self.most, len(pages))


def test_beams_hold_a_page_once_for_all_that_begin_alike_and_no_other_page():
    prompts, lens = queue(2)
    limits = np.ones(Q, np.int32)
    limits[0] = NEW
    found = run(prompts, lens, stops=NO_STOPS, limits=limits, widths=np.full(Q, W, np.int32))
    tree = PageTree(prompts[0, : lens[0]].tolist())
    plain(prompts[0, : lens[0]], width=W, limit=NEW, see=tree.see)
    # While the first prompt's tree grows, the other group holds at most a prompt.
    others, dense = (-(-int(n) // decoder.PAGE_SIZE) for n in (np.max(lens[1:]), lens[0] + NEW - 1))
    assert tree.most <= found.peak_pages[0] <= tree.most + others < W * dense
    limits[1:] = 0  # clipped to 1
    alone = run(prompts, np.where(np.arange(Q) == 0, lens, 0).astype(np.int32), stops=NO_STOPS, limits=limits)
    assert alone.peak_pages[0] == tree.most
    assert np.all(alone.finish[1:] == Finish.TOO_LONG) and np.all(alone.lengths[1:] == 0)


def test_a_prompt_whose_beams_need_more_pages_than_there_are_ends_with_what_it_has_and_the_others_are_served():
    prompts, lens = queue(3)
    lens[2], limits = 20, np.full(Q, 3, np.int32)
    limits[2] = NEW
    found = run(prompts, lens, limits=limits, stops=NO_STOPS, widths=np.full(Q, W, np.int32), held=(64, 64, 60))
    for q in set(range(Q)) - {2}:  # 9 pages are free
        check_prompt(found, q, plain(prompts[q, : lens[q]], width=W, limit=3), NO_STOPS)
    assert np.all(found.finish[2] == Finish.TOO_LONG) and np.all(found.scores[2] == -np.inf)


@pytest.mark.long  # the program of the short tests, with everything drawn at random
@pytest.mark.parametrize("windows", [PLAIN, HYBRID], ids=["plain", "hybrid"])
def test_random_searches_with_few_pages_find_what_plain_python_finds(windows):
    """Every third of them has as many pages as the largest tree, and prompts of several pages that beams share."""
    num_cut = num_preempted = 0
    for seed in range(400):
        (prompts, lens), rng = queue(seed), np.random.default_rng(seed)
        widths, limits = (rng.integers(1, most + 1, Q).astype(np.int32) for most in (W, NEW))
        stops, penalty = (STOPS, NO_STOPS)[rng.integers(2)], float(rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]))
        if fits := seed % 3 == 0:
            lens = rng.integers(12, LONGEST + 1, Q).astype(np.int32)
        trees = [PageTree(prompts[q, : lens[q]].tolist()) for q in range(Q)]
        expected = [
            plain(
                prompts[q, : lens[q]], windows, width=int(widths[q]), limit=int(limits[q]), penalty=penalty,
                stop=tuple(stops.tolist()), see=trees[q].see, early=EARLY[q],
            )
            for q in range(Q)
        ]  # fmt: skip
        free = max(tree.most for tree in trees) if fits else int(rng.integers(6, 20))
        held = (64, 64, *((64, (8 - free) * 4) if free < 8 else ((24 - free) * 4,)))
        found = run(
            prompts, lens, windows=windows, stops=stops, widths=widths, limits=limits, penalty=penalty, held=held
        )
        num_preempted += found.counters.preemptions > 0
        for q in range(Q):
            if not np.any(found.finish[q] == Finish.TOO_LONG):
                check_prompt(found, q, expected[q], stops)
            else:
                num_cut += 1
                assert windows == HYBRID or trees[q].most > free, f"{seed}: a search is cut though its tree would fit"
    assert num_cut > 50 and num_preempted > 100


def test_one_compilation_served_all_searches_without_a_host_callback():
    prompts, lens = queue(4)
    run(prompts, lens)
    run(prompts, lens, penalty=0.5, widths=np.full(Q, 2, np.int32))
    assert TRACES[PLAIN] == 1
    options = STOPS, WIDTHS, LIMITS, np.ones(Q, np.float32)
    text = program(PLAIN).lower(empty_cache(PLAIN), prompts, lens, *options).as_text()
    assert "callback" not in text and "infeed" not in text


def test_a_search_is_over_by_its_rule():
    """Two finished sequences of two beams, the worse of -2.0; the best running beam has -3.0 after 2 of 6 tokens."""
    scores = np.array([[-1.0, -2.0, -np.inf]], np.float32)
    full = Hypotheses.create(1, 3, 6)._replace(scores=scores)
    are_over = jax.jit(Rules.are_over)

    def is_over(early, penalty, best=-3.0, width=2) -> bool:
        widths, lengths, limits = (np.array([n], np.int32) for n in (width, 2, 6))
        return bool(are_over(Rules.of(1, penalty, early), full, widths, np.array([best], np.float32), lengths, limits))

    assert is_over(True, 1.0) and is_over(True, 0.0)
    assert not is_over(False, 1.0), "-3.0 / 2 is better than -2.0"
    assert is_over(False, 0.5) and is_over(False, 0.0), "-3.0 / 2 ** 0.5 is not"
    assert not is_over("never", 0.5), "-3.0 / 6 ** 0.5 would be"
    assert is_over("never", 0.0) and is_over("never", -1.0) and is_over("never", 1.0, best=-12.0)
    for early in (True, False, "never"):
        assert not is_over(early, 0.0, width=3), "a third is missing"
        assert is_over(early, 1.0, best=-np.inf, width=3), "no beam is left"


def test_sizes_that_do_not_fit_together_are_named():
    prompts, lens = queue(5)

    def start(stepper=None, width=W, num_return=None):
        search = functools.partial(beam_search, stepper or Stepper(decoder.forward, (16,)), jnp.int32(0), prompts, lens)
        jax.eval_shape(
            functools.partial(search, width=width, max_new_tokens=4, num_return=num_return), empty_cache(PLAIN)
        )

    with pytest.raises(
        ValueError, match="width=10 beams need a row each, but the cache has 9: raise max_sequences to 10"
    ):
        start(width=10)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        start(width=0)
    with pytest.raises(ValueError, match="num_return=5 sequences of width=4 beams: ask for at most 4"):
        start(num_return=5)
    with pytest.raises(ValueError, match=r"token_counts=\(4,\) for a batch of 9 rows: the largest must hold one token"):
        start(Stepper(decoder.forward, (4,)))
    with pytest.raises(ValueError, match="num_logprobs and processed_logprobs of the stepper are for tokens that are"):
        start(Stepper(decoder.forward, (16,), num_logprobs=1))
    with pytest.raises(ValueError, match="early_stopping='soon' must be True, False or \"never\""):
        Rules.of(1, early_stopping="soon")
    with pytest.raises(ValueError, match=r"widths=\[4, 5\] must be from 1 to 4"):
        _within([4, 5], 2, 4, "widths")
    with pytest.raises(ValueError, match=r"early_stopping has \(3,\) values: give one, or one for each of 2 prompts"):
        Rules.of(2, early_stopping=(True, False, "never"))
