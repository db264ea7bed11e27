"""Rollouts: a queue of prompts through a few rows in one program, whatever runs short."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hash_decoder as decoder
import toy
from paged_jax import (
    AttentionMetadata,
    Finish,
    KVCache,
    PageTables,
    Rollout,
    SamplingParams,
    SamplingState,
    Stepper,
    beam_search,
    rollout,
)
from paged_jax.cache.invariants import check

PLAIN, HYBRID = (None, None), (None, 6)
WINDOWS = pytest.mark.parametrize(
    "windows", [pytest.param(PLAIN, id="plain", marks=pytest.mark.long), pytest.param(HYBRID, id="hybrid")]
)
GREEDY = SamplingParams(max_new_tokens=24)


def queue(num_prompts: int, longest: int, width: int, seed: int = 0):
    """Random prompts [Q, width] of 1 to `longest` tokens; what follows a prompt is noise."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(1, longest + 1, num_prompts).astype(np.int32)
    return rng.integers(0, decoder.VOCAB, (num_prompts, width)).astype(np.int32), lens


Q, N, WIDTH, NEW = 16, 5, 40, 24  # prompts, samples of each, and the most tokens of both: one program for most tests
TRACES = {PLAIN: 0, HYBRID: 0}


NO_PREFIX = np.zeros(18, np.int32)


@functools.cache
def stepper_of(windows) -> Stepper:
    def forward(*arguments):
        TRACES[windows] += 1
        return decoder.forward(*arguments, windows=windows)

    return Stepper(forward, (4, 16))


@functools.cache
def program(windows):
    """The rollout of most tests; a prefix of no tokens is none."""

    def run(cache, prompts, lens, sampling, limits, prefix):
        return rollout(
            stepper_of(windows), jnp.int32(0), prompts, lens, cache,
            max_new_tokens=NEW, num_samples=N, sampling=sampling, limits=limits, prefix=prefix,
        )  # fmt: skip

    return jax.jit(run)


@functools.cache
def holder(windows):
    """Publish so many tokens of each row of an empty cache; those of row 0 are computed."""

    def hold(cache, tokens, lens):
        cache, granted = cache.reserve(lens)
        computed = jnp.where(jnp.arange(len(lens)) == 0, jnp.minimum(lens, len(tokens)), 0)
        metadata = AttentionMetadata.ragged(cache.tables, computed, len(tokens))
        _, pool = decoder.forward(jnp.int32(0), tokens, cache.pool, metadata, windows)
        tables, handles = cache.tables, []
        for row in range(len(lens)):
            tables, handle = tables.publish(row, lens[row])
            handles.append(handle)
        return KVCache(tables.release(jnp.ones(len(lens), bool)), pool), handles, granted

    return jax.jit(hold)


@jax.jit
def drop_all(tables, handles):
    return functools.reduce(lambda tables, handle: tables.drop(handle), handles, tables)


nothing = jax.jit(lambda tables: tables.publish(0, 0)[1])  # handles to no tokens


@functools.cache
def empty_cache(windows) -> KVCache:
    return jax.jit(KVCache.create, static_argnums=0)(decoder.config(1 + 56, windows=windows))


def sampling_of(num_prompts: int, params: SamplingParams = GREEDY) -> SamplingState:
    return SamplingState.of([(params, 0)] * num_prompts)


def run(prompts, lens, *, windows=HYBRID, sampling=None, limits=None, held=(0, 0, 0, 0), prefix=NO_PREFIX) -> Rollout:
    """A rollout while handles hold the pages of so many tokens; those of the first are the prefix, if they are 18."""
    sampling = sampling_of(len(lens)) if sampling is None else sampling
    limits = np.full(len(lens), NEW, np.int32) if limits is None else limits
    cache, handles, granted = holder(windows)(empty_cache(windows), prefix, np.array(held, np.int32))
    assert np.all(granted)
    before = int(cache.tables.groups[0].num_free)
    prefix_handle = handles[0] if held[0] == 18 else nothing(cache.tables)
    result, cache = program(windows)(cache, prompts, lens, sampling, limits, prefix_handle)
    assert int(cache.tables.groups[0].num_free) == before
    assert is_empty(drop_all(cache.tables, handles))
    return jax.device_get(result)


def is_empty(tables: PageTables) -> bool:
    for table in tables.groups:
        check(table)
    return all(int(t.num_free) == t.num_pages - 1 for t in tables.groups) and not np.any(tables.lengths)


@WINDOWS
def test_every_sample_is_the_one_drawn_alone_with_plenty_of_pages_and_with_a_quarter(windows):
    prompts, lens = queue(Q, WIDTH, WIDTH)
    limits = np.random.default_rng(1).integers(1, NEW + 1, Q).astype(np.int32)
    limits[3] = 0
    sampling = SamplingState.of(
        [(SamplingParams(temperature=float(q % 2), seed=q, stop_tokens=(5, 9)), 0) for q in range(Q)]
    )
    options = {"windows": windows, "sampling": sampling, "limits": limits}
    plenty, short = (run(prompts, lens, **options, held=held) for held in ((0, 0, 0, 0), (64, 64, 32, 0)))
    assert plenty.counters.preemptions == plenty.counters.recomputed_tokens == 0
    assert short.counters.preemptions > 10 and short.counters.recomputed_tokens > 0
    for name in ("tokens", "lengths", "finish"):
        assert np.array_equal(getattr(plenty, name), getattr(short, name)), name
    assert np.array_equal(plenty.logprobs, short.logprobs), "not a bit differs after a preemption"
    for q in range(Q):
        prompt = prompts[q, : lens[q]].tolist()
        for sample in range(N):
            length = plenty.lengths[q, sample]
            drawn = plenty.tokens[q, sample, :length].tolist()
            assert not np.any(plenty.tokens[q, sample, length:])
            expected = decoder.dense_logprobs(prompt, drawn, windows)
            assert np.allclose(plenty.logprobs[q, sample, :length], expected, atol=1e-5, rtol=0)
            if q % 2 == 0:
                assert drawn == decoder.dense_greedy(prompt, int(limits[q]), windows, (5, 9))
            stopped = length > 0 and drawn[-1] in (5, 9)
            assert plenty.finish[q, sample] == (Finish.STOP_TOKEN if stopped else Finish.MAX_TOKENS)
            assert stopped or length == limits[q]
        texts = {tuple(x) for x in plenty.tokens[q].tolist()}
        assert len(texts) == (N if q % 2 and limits[q] > 4 else len(texts)), "sampled ones differ"


def test_each_prompt_is_computed_once_for_all_its_samples_also_when_they_do_not_fit_in_the_rows_at_once():
    prompts, lens = queue(Q, WIDTH, WIDTH, seed=2)
    result = run(prompts, lens)
    # Each sample computes all tokens that it draws but its last one, and all but the first the prompt's last token.
    drawn = int(np.sum(result.lengths))
    assert result.counters.drawn_tokens == drawn
    assert result.counters.computed_tokens == int(np.sum(lens)) + Q * (N - 1) + drawn - Q * N


def shuffled_queue():
    """A queue, and the same in another order."""
    prompts, lens = queue(Q, 30, WIDTH, seed=3)
    sampling = SamplingState.of([(SamplingParams(temperature=1.0, seed=q), 0) for q in range(Q)])
    order = np.random.default_rng(0).permutation(Q)
    return order, (prompts, lens, sampling), jax.tree.map(lambda x: np.asarray(x)[order], (prompts, lens, sampling))


def test_samples_do_not_depend_on_the_order_of_the_queue():
    order, (prompts, lens, sampling), (*shuffled, other) = shuffled_queue()
    one, other = run(prompts, lens, sampling=sampling), run(*shuffled, sampling=other)
    assert np.array_equal(other.tokens, one.tokens[order]) and np.array_equal(other.logprobs, one.logprobs[order])


@pytest.mark.long  # another program; tests/decoding/test_draft.py compares three rows with four
def test_samples_do_not_depend_on_the_number_of_rows():
    order, (prompts, lens, sampling), (*shuffled, other) = shuffled_queue()
    one = run(prompts, lens, sampling=sampling)
    cache = KVCache.create(decoder.config(1 + 64, max_sequences=7, windows=HYBRID))
    stepper = Stepper(decoder.forward_with(HYBRID), (16,))
    sample = jax.jit(functools.partial(rollout, stepper, max_new_tokens=NEW, num_samples=N))
    other, _ = sample(jnp.int32(0), *shuffled, cache, sampling=other)
    assert np.array_equal(other.tokens, one.tokens[order])
    # Another program may add up a softmax in another order.
    assert np.allclose(other.logprobs, one.logprobs[order], atol=1e-6, rtol=0)


def test_a_prompt_that_can_never_fit_ends_without_a_token_and_the_others_are_served():
    prompts, lens = queue(Q, 20, WIDTH, seed=4)
    lens[2], lens[5] = 37, 0
    result = run(prompts, lens, held=(64, 64, 60, 0))  # 9 pages are free
    assert np.all(result.finish[[2, 5]] == Finish.TOO_LONG) and not np.any(result.lengths[[2, 5]])
    for q in set(range(Q)) - {2, 5}:
        most = min(NEW, 36 + 1 - lens[q])  # the last token is never cached
        expected = decoder.dense_greedy(prompts[q, : lens[q]].tolist(), most, HYBRID)
        assert result.tokens[q, 0, :most].tolist() == expected
        assert np.all(result.lengths[q] == most) and np.all(result.finish[q] == Finish.MAX_TOKENS)


@WINDOWS
def test_prompts_continue_after_a_prefix_whose_pages_a_handle_keeps(windows):
    prompts, lens = queue(Q, 10, WIDTH, seed=5)
    prefix = np.random.default_rng(9).integers(0, decoder.VOCAB, 18).astype(np.int32)
    prompts = np.concatenate([np.broadcast_to(prefix, (Q, 18)), prompts], axis=1)[:, :WIDTH].astype(np.int32)
    cold = run(prompts, lens + 18, windows=windows)
    # 11 pages are free and 5 hold the prefix: a row that had to compute it again would never end.
    short = run(prompts, lens + 18, windows=windows, held=(18, 64, 64, 32), prefix=prefix)
    assert np.array_equal(short.tokens, cold.tokens) and np.array_equal(short.logprobs, cold.logprobs)
    assert short.counters.preemptions > 0
    warm = run(prompts, lens + 18, windows=windows, held=(18, 0, 0, 0), prefix=prefix)
    assert np.array_equal(warm.tokens, cold.tokens) and np.array_equal(warm.logprobs, cold.logprobs)
    assert warm.counters.computed_tokens == cold.counters.computed_tokens - Q * 18


def test_a_prompt_as_long_as_the_prefix_ends_as_too_long_where_only_the_prefix_would_let_it_fit():
    prefix = np.arange(18, dtype=np.int32)
    prompts = np.broadcast_to(np.pad(prefix, (0, WIDTH - 18)), (Q, WIDTH)).astype(np.int32)
    lens = np.full(Q, 18, np.int32)
    lens[1::2] = 19
    result = run(prompts, lens, held=(18, 64, 64, 64), prefix=prefix)  # 3 pages are free
    assert np.all(result.finish[::2] == Finish.TOO_LONG)
    assert np.all(result.lengths[1::2] == 28 + 1 - 19)


def test_one_compilation_served_all_queues_without_a_host_callback():
    prompts, lens = queue(Q, 9, WIDTH)
    run(prompts, lens)
    before = TRACES[HYBRID]
    run(prompts + 1, lens, sampling=sampling_of(Q, SamplingParams(temperature=1.0, seed=3)))
    assert TRACES[HYBRID] == before > 0
    cache, limits = empty_cache(HYBRID), np.full(Q, 9, np.int32)
    lowered = program(HYBRID).lower(cache, prompts, lens, sampling_of(Q), limits, nothing(cache.tables))
    assert "callback" not in lowered.as_text() and "infeed" not in lowered.as_text()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the compiler of jaxlib 0.11 crashes on this program")
def test_four_devices_of_a_data_axis_draw_the_tokens_of_one():
    prompts, lens = queue(4 * Q, 20, WIDTH, seed=6)
    params = [(SamplingParams(temperature=float(q % 2), seed=q), 0) for q in range(4 * Q)]
    sampling = jax.device_get(SamplingState.of(params))
    mesh, split = jax.sharding.Mesh(jax.devices()[:4], "data"), jax.sharding.PartitionSpec("data")
    stepper = Stepper(decoder.forward_with(HYBRID), (4, 16))

    def sample(prompts, lens, sampling):
        cache = KVCache.create(decoder.config(1 + 64, windows=HYBRID))
        result, _ = rollout(
            stepper, jnp.int32(0), prompts, lens, cache, max_new_tokens=NEW, num_samples=N, sampling=sampling
        )
        return result._replace(counters=jax.tree.map(lambda x: x[None], result.counters))

    each = jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    result = jax.device_get(each(prompts, lens, sampling))
    for device in range(4):
        mine = slice(device * Q, (device + 1) * Q)
        one = run(prompts[mine], lens[mine], sampling=jax.tree.map(lambda x, mine=mine: x[mine], sampling))
        assert np.array_equal(result.tokens[mine], one.tokens)
        assert np.array_equal(result.logprobs[mine], one.logprobs)
        assert result.counters.drawn_tokens[device] == one.counters.drawn_tokens


def test_a_real_decoder_draws_what_a_dense_forward_does_and_learns_from_it_in_the_same_program():
    """A policy gradient that rewards even tokens makes them likelier; its loss sees the parameters that drew."""
    params = toy.init_params(num_layers=1)
    prompts, lens = queue(5, 20, 20, seed=6)
    prompts %= toy.VOCAB
    stepper = Stepper(toy.forward, (16,))
    num_new, place = 12, np.arange(12, dtype=np.int32)

    @jax.jit
    def train(params, cache, sampling):
        result, cache = rollout(
            stepper, params, prompts, lens, cache, max_new_tokens=num_new, num_samples=2, sampling=sampling
        )
        drawn = result.tokens  # [Q, n, X]
        padded = jnp.broadcast_to(jnp.pad(prompts, ((0, 0), (0, num_new)))[:, None], (5, 2, 32))
        at = jnp.broadcast_to(jnp.asarray(lens)[:, None, None] + place[None, None, :], drawn.shape)
        whole = padded.at[np.arange(5)[:, None, None], np.arange(2)[None, :, None], at].set(drawn)
        reward = jnp.where(drawn % 2 == 0, 1.0, -1.0)

        def loss(params):
            logits = jax.vmap(lambda tokens: toy.dense_logits(params, tokens, (None,)))(whole.reshape(10, 32))
            logprobs = jax.nn.log_softmax(jnp.take_along_axis(logits.reshape(5, 2, 32, -1), at[..., None] - 1, axis=2))
            chosen = jnp.take_along_axis(logprobs, drawn[..., None], axis=3)[..., 0]
            return -jnp.mean(reward * chosen), chosen

        (value, chosen), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        better = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
        return result, cache, chosen, value, loss(better)[0], gradient

    cache = KVCache.create(dataclasses.replace(toy.config(num_pages=1 + 10), num_layers=1))
    result, cache, chosen, value, later, gradient = train(params, cache, sampling_of(5))
    assert result.counters.preemptions > 0
    for q in range(5):
        expected = toy.dense_greedy(params, prompts[q, : lens[q]].tolist(), num_new, (None,))
        assert result.tokens[q].tolist() == [expected, expected]
    result, _, chosen, value, later, gradient = train(
        params, cache, sampling_of(5, SamplingParams(temperature=1.0, seed=1))
    )
    assert np.allclose(result.logprobs, chosen, atol=1e-5, rtol=0), "the parameters of the loss are those that drew"
    norms = [np.linalg.norm(g) for g in jax.tree.leaves(gradient)]
    assert np.all(np.isfinite(norms)) and max(norms) > 0 and later < value


def test_sizes_that_do_not_fit_together_are_named():
    prompts, lens = queue(3, 9, 9)
    hybrid = decoder.config(1 + 16, windows=HYBRID, window_pages=4)
    stepper = Stepper(decoder.forward_with(HYBRID), (4, 16))

    def start(stepper=stepper, config=hybrid, sampling: SamplingParams | SamplingState = GREEDY, num_samples=1):
        options = {"max_new_tokens": 4, "num_samples": num_samples, "sampling": sampling}
        jax.eval_shape(lambda: rollout(stepper, jnp.int32(0), prompts, lens, KVCache.create(config), **options))

    with pytest.raises(ValueError, match="window of 6 have 3 pages, but a row that computes 16 .* raise window_pages"):
        start()
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        start(num_samples=0)
    with pytest.raises(ValueError, match="sampling is that of 2 prompts, but there are 3"):
        start(Stepper(decoder.forward), decoder.config(17), sampling_of(2))
    with pytest.raises(ValueError, match=r"token_counts=\(2,\) for a batch of 4 rows: the largest must hold"):
        start(Stepper(decoder.forward, (2,)), decoder.config(17))
    with pytest.raises(ValueError, match=r"numbers of at least 1 in ascending order, such as .*, got \(8, 4\)"):
        Stepper(decoder.forward, (8, 4))
    unchecked: Any = getattr(Stepper.__post_init__, "__wrapped__", Stepper.__post_init__)
    for fields, message in [
        ({"token_counts": 8}, r"token_counts must be a tuple of numbers .*, such as \(8, 64\), got 8"),
        ({"forward": None}, "forward must be a function .* got a NoneType: see paged_jax.Forward"),
        ({"processor": Upwards}, "processor=Upwards is a class: pass an object of it"),
    ]:
        stepper = Stepper(decoder.forward)
        for name, value in fields.items():
            object.__setattr__(stepper, name, value)  # as where nobody checks the annotations
        with pytest.raises(ValueError, match=message):
            unchecked(stepper)


class Upwards:
    """A processor by name only."""


def test_prompts_of_numpy_are_taken_where_they_are_constants_of_the_program():
    cache = jax.eval_shape(lambda: KVCache.create(decoder.config(17)))
    stepper = Stepper(decoder.forward, (8,))
    prompts, lens = queue(3, 9, 9)
    for method, options in ((rollout, {}), (beam_search, {"width": 2})):
        draw = functools.partial(method, stepper, jnp.int32(0), max_new_tokens=2, **options)
        found, _ = jax.eval_shape(lambda cache, draw=draw: draw(prompts, lens, cache), cache)
        assert found.tokens.shape[::2] == (3, 2)
        unchecked = functools.partial(getattr(method, "__wrapped__", method), *draw.args, **draw.keywords)
        with pytest.raises(
            ValueError, match=r"got prompts of int32\[9\] and prompt_lens of int32\[3\]: give token ids"
        ):
            unchecked(prompts[0], lens, cache)
        with pytest.raises(ValueError, match="prompt_lens of float32.* as many numbers that say how many tokens each"):
            unchecked(prompts, lens.astype(np.float32), cache)
