"""Rollouts: a queue of prompts, several samples of each, in one XLA program."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.cache.config import LayerGroup, pages_mapped
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.page_table import PageTable
from paged_jax.cache.page_tables import Handles, PageTables
from paged_jax.decoding.rows import NO_ROW, NO_TOKEN, Counters, DecodeState, Finish, Rows, prompt_arrays
from paged_jax.decoding.step import release, start, step
from paged_jax.decoding.stepper import Stepper
from paged_jax.sampling import SamplingParams, SamplingState

NO_PROMPT = -1


class Rollout(NamedTuple):
    """What `rollout` draws: Q prompts, n samples of each, at most X tokens a sample; k is `Stepper.num_logprobs`."""

    tokens: Int32[Array, "Q n X"]  # 0 past each sample's end
    logprobs: Float[Array, "Q n X"]  # of these tokens; 0 past the end
    top_tokens: Int32[Array, "Q n X k"]  # the most likely tokens at the place of each
    top_logprobs: Float[Array, "Q n X k"]
    lengths: Int32[Array, "Q n"]  # tokens drawn, a stop token included
    finish: Int32[Array, "Q n"]  # of Finish
    counters: Counters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Queue:
    """The prompts, and how far they have come. Sample i is the sample i % n of prompt i // n."""

    prompts: Int32[Array, "Q C"]
    prompt_lens: Int32[Array, " Q"]
    limits: Int32[Array, " Q"]  # tokens that a sample may draw
    sampling: SamplingState  # of Q rows
    hints: Int32[Array, "Q hints"]
    next: Int32[Array, ""]  # the next sample that gets a row
    sample: Int32[Array, " B"]  # the sample in each row; its total number where the row is free
    # The pages of the one prompt of which only some samples have rows: the others will share them.
    handles: Handles
    handles_of: Int32[Array, ""]  # that prompt, or NO_PROMPT
    prefix: Handles | None  # pages under all prompts


def rollout(
    stepper: Stepper,
    params: Any,
    prompts: Int32[Array | np.ndarray, "Q C"],
    prompt_lens: Int32[Array | np.ndarray, " Q"],
    cache: KVCache,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    sampling: SamplingParams | SamplingState = SamplingParams(temperature=1.0),  # noqa: B008  frozen
    limits: Int32[Array, " Q"] | None = None,
    prefix: Handles | None = None,
    hints: "Int32[Array, 'Q hints'] | Rollout | None" = None,
    drafter_state: Any = None,
) -> tuple[Rollout, KVCache]:
    """Draw samples of many prompts, through a batch of fixed size, in one XLA program.

    It is a pure function: call it inside your own jit, beside the training step and with the same parameters. Inside a
    `shard_map` over a data axis, each device runs a queue of its own. Prompts are served first come, first served, and
    a row that ends is refilled in the next step. A prompt is computed once, and its samples share its pages. When pages
    run short, the youngest rows give theirs up, compute them again later, and draw the same tokens.

        cache = KVCache.create(config)
        stepper = Stepper(forward)

        @functools.partial(jax.jit, donate_argnums=1)
        def sample(params, cache, prompts, prompt_lens):
            return rollout(stepper, params, prompts, prompt_lens, cache, max_new_tokens=64, num_samples=8)

        result, cache = sample(params, cache, prompts, prompt_lens)

    Args:
        stepper: the decoder, and what is static about a step.
        params: the decoder's parameters.
        prompts: token ids, each prompt from the first column on; what follows a prompt is ignored.
        prompt_lens: tokens of each prompt, at least 1.
        cache: donate it at the jit boundary. Its rows must be empty; handles that you published keep their pages.
        max_new_tokens: X, the most tokens of a sample; static.
        num_samples: n, samples of each prompt; static.
        sampling: how all prompts are sampled: prompt q draws from the seed `sampling.seed + q`. Or a SamplingState of Q
            rows, whose seeds may be traced, such as `SamplingState.of(...)`. Sample i of a prompt draws from the stream
            (seed, i).
        limits: the most tokens of each prompt's samples, 0 to X; None: X for all.
        prefix: handles to the first tokens of all prompts, which were computed before; the prompts repeat these tokens.
        hints: for the stepper's drafter (`Lookup`), texts that each prompt's samples may repeat: an earlier `Rollout`
            of the same prompts, or token ids, -1 between two texts and after the last. They change the speed only.
        drafter_state: of the stepper's drafter, if it has one (`DraftModel`).

    Returns:
        What was drawn, and the cache, with all rows empty.

    Raises:
        ValueError: at trace time, for sizes that do not fit together. A prompt that does not fit in a row or in the
            pages that are free ends with `Finish.TOO_LONG`, without a token.

    Examples:
        Two prompts, two samples each, from the counting decoder in `Forward`'s example:

        >>> @functools.partial(jax.jit, donate_argnums=1)
        ... def sample(params, cache, prompts, prompt_lens):
        ...     stepper, sampling = Stepper(forward, token_counts=(8,)), SamplingParams(temperature=0.1)
        ...     return rollout(stepper, params, prompts, prompt_lens, cache, max_new_tokens=3, num_samples=2,
        ...                    sampling=sampling)
        >>> drawn, cache = sample(params, KVCache.create(config), jnp.array([[1, 2], [5, 0]]), jnp.array([2, 1]))
        >>> drawn.tokens.tolist()
        [[[3, 4, 5], [3, 4, 5]], [[6, 7, 0], [6, 7, 0]]]
    """
    prompts, prompt_lens = prompt_arrays(prompts, prompt_lens)
    num_prompts, width = prompts.shape
    _check_sizes(stepper, cache, num_samples, max_new_tokens, num_prompts)
    num_all = num_prompts * num_samples
    limits = jnp.full(num_prompts, max_new_tokens, jnp.int32) if limits is None else limits
    hints = hint_texts(stepper, hints, num_prompts)
    if drafter_state is not None and stepper.drafter is None:
        raise ValueError("drafter_state is that of a drafter: give the stepper one, or leave the state out")
    state = _idle_state(stepper, cache, width + max_new_tokens, _each_prompt(sampling, num_prompts), hints.shape[1])
    state = dataclasses.replace(state, drafter=drafter_state)
    tables, handles = cache.tables.publish(0, 0)  # of no tokens: only their shapes matter
    queue = _Queue(
        prompts=prompts,
        prompt_lens=prompt_lens,
        limits=limits,
        sampling=_each_prompt(sampling, num_prompts),
        hints=hints,
        next=jnp.int32(0),
        sample=jnp.full(tables.num_rows, num_all, jnp.int32),
        handles=handles,
        handles_of=jnp.int32(NO_PROMPT),
        prefix=prefix,
    )
    out = Rollout(
        tokens=jnp.zeros((num_all, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((num_all, max_new_tokens), jnp.float32),
        top_tokens=jnp.zeros((num_all, max_new_tokens, stepper.num_logprobs or 0), jnp.int32),
        top_logprobs=jnp.zeros((num_all, max_new_tokens, stepper.num_logprobs or 0), jnp.float32),
        lengths=jnp.zeros(num_all, jnp.int32),
        finish=jnp.zeros(num_all, jnp.int32),
        counters=state.counters,
    )
    reachable = _reachable_tokens(cache.tables, prefix, prompt_lens, stepper.token_counts[-1])

    def unfinished(carry: tuple[DecodeState, _Queue, Rollout]) -> Array:
        state, queue, _ = carry
        return jnp.any(state.rows.active) | (queue.next < num_all)

    def body(carry: tuple[DecodeState, _Queue, Rollout]) -> tuple[DecodeState, _Queue, Rollout]:
        state, queue, out = carry
        before = state.counters.computed_tokens
        state, queue = lax.cond(
            jnp.any(~state.rows.active) & (queue.next < num_all),
            lambda state, queue: _admit(state, queue, num_samples, reachable),
            lambda state, queue: (state, queue),
            state,
            queue,
        )
        state, ended = step(stepper, params, _attach_prefix(state, queue.prefix))
        ended |= (queue.sample < num_all) & ~state.rows.active
        state, queue = _keep_prompt(state, queue, num_samples)
        is_stuck = state.counters.computed_tokens == before
        state, queue = _drop_prompt(state, queue, is_stuck & ~jnp.any(ended))
        out = _collect(out, state.rows, queue.sample, ended)
        state = release(state, ended).settle()
        return state, dataclasses.replace(queue, sample=jnp.where(ended, num_all, queue.sample)), out

    state, queue, out = lax.while_loop(unfinished, body, (state, queue, out))
    shape = num_prompts, num_samples
    drawn = {name: x.reshape(*shape, *x.shape[1:]) for name, x in out._asdict().items() if name != "counters"}
    return Rollout(**drawn, counters=state.counters), state.cache


def _check_sizes(stepper: Stepper, cache: KVCache, num_samples: int, max_new_tokens: int, num_prompts: int) -> None:
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("prompts", num_prompts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    tables, budget = cache.tables, stepper.token_counts[-1]
    for table, group in zip(tables.groups, tables.layout, strict=True):
        need = 1 if group.window is None else _pages_of_window(table, group, budget)
        if need > table.num_pages - 1:
            raise ValueError(
                f"layers with a window of {group.window} have {table.num_pages - 1} pages, but a row that computes "
                f"{budget} tokens in a step needs {need}: raise window_pages to {need + 1}, or lower the largest of "
                f"token_counts={stepper.token_counts}"
            )


def hint_texts(stepper: Stepper, hints: Any, num_prompts: int) -> Int32[Array, "Q hints"]:
    """The `hints` of a rollout as token ids."""
    if hints is None:
        return jnp.zeros((num_prompts, 0), jnp.int32)
    if stepper.drafter is None:
        raise ValueError("hints are for a drafter: give the stepper one, such as Lookup(), or leave them out")
    if isinstance(hints, Rollout):
        index = jnp.arange(hints.tokens.shape[2] + 1, dtype=jnp.int32)[None, None, :]
        tokens = jnp.pad(hints.tokens, ((0, 0), (0, 0), (0, 1)))
        hints = jnp.where(index < hints.lengths[:, :, None], tokens, NO_TOKEN).reshape(len(tokens), -1)
    if hints.ndim != 2 or len(hints) != num_prompts or not jnp.issubdtype(hints.dtype, jnp.integer):
        raise ValueError(
            f"hints of {hints.dtype}{list(hints.shape)} for {num_prompts} prompts: give token ids of shape "
            f"[{num_prompts}, most tokens], or an earlier Rollout of these prompts"
        )
    return jnp.asarray(hints, jnp.int32)


def _each_prompt(sampling: SamplingParams | SamplingState, num_prompts: int) -> SamplingState:
    if isinstance(sampling, SamplingState):
        if len(sampling.seed) != num_prompts:
            raise ValueError(f"sampling is that of {len(sampling.seed)} prompts, but there are {num_prompts}")
        return sampling
    seeds = (np.arange(num_prompts, dtype=np.uint64) + sampling.seed).astype(np.uint32)
    sizes = len(sampling.stop_tokens), len(sampling.logit_bias) + len(sampling.forbidden_tokens)
    one = SamplingState.of([(sampling, 0)], max_stop_tokens=sizes[0], max_bias_tokens=sizes[1])
    every = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_prompts, *x.shape[1:])), one)
    return dataclasses.replace(every, seed=jnp.asarray(seeds))


def _idle_state(
    stepper: Stepper, cache: KVCache, capacity: int, sampling: SamplingState, num_hints: int
) -> DecodeState:
    """A batch of empty rows, which can be sampled as the prompts are."""
    num_rows = cache.tables.num_rows
    idle = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (num_rows, *x.shape[1:])), sampling)
    rows = Rows.create(num_rows, capacity, idle, stepper.num_logprobs or 0, num_hints)
    return DecodeState(cache, rows, Counters.create(len(stepper.token_counts)))


def _reachable_tokens(
    tables: PageTables, prefix: Handles | None, prompt_lens: Int32[Array, " Q"], budget: int
) -> Int32[Array, " Q"]:
    """The most tokens that a row of each prompt can cache with all pages that are free now, and those of the prefix."""
    reachable = jnp.full_like(prompt_lens, tables.max_length)
    for g, (table, group) in enumerate(zip(tables.groups, tables.layout, strict=True)):
        free = jnp.broadcast_to(table.num_free, prompt_lens.shape)
        if group.window is not None:  # with the pages of one step a row goes on for ever
            free = jnp.where(free >= _pages_of_window(table, group, budget), table.pages.shape[1], free)
        elif prefix is not None:
            free += jnp.where(prompt_lens > prefix[g].num_tokens, prefix[g].num_tokens // table.page_size, 0)
        reachable = jnp.minimum(reachable, free * table.page_size)
    return reachable


def _pages_of_window(table: PageTable, group: LayerGroup, budget: int) -> int:
    """The most pages that a row maps at once in a group whose layers see a window."""
    return pages_mapped(group.window, table.pages.shape[1] * table.page_size, budget, table.page_size)


def _admit(
    state: DecodeState, queue: _Queue, num_samples: int, reachable: Int32[Array, " Q"]
) -> tuple[DecodeState, _Queue]:
    """Free rows take the next samples. The first sample of a prompt computes it, the others wait for it to do so."""
    num_prompts, width = queue.prompts.shape
    num_all, num_rows = num_prompts * num_samples, len(state.rows.active)
    free = queue.sample >= num_all
    candidate = queue.next + jnp.cumsum(free, dtype=jnp.int32) - 1
    takes = free & (candidate < num_all)
    sample = jnp.where(takes, candidate, queue.sample)
    prompt = jnp.minimum(jnp.where(takes, candidate // num_samples, 0), num_prompts - 1)
    sampling = jax.tree.map(lambda x: x[prompt], queue.sampling)
    num_prompt = queue.prompt_lens[prompt]
    fits = (num_prompt >= 1) & (num_prompt <= jnp.minimum(reachable[prompt], width))
    limit = jnp.clip(queue.limits[prompt], 0, state.rows.tokens.shape[1] - width)
    new = dataclasses.replace(
        state.rows,
        tokens=state.rows.tokens.at[:, :width].set(queue.prompts[prompt]),
        num_prompt=jnp.where(fits, num_prompt, state.longest_row + 1),  # so that `start` refuses it
        num_known=num_prompt,
        limit=jnp.minimum(num_prompt + limit, reachable[prompt] + 1),
        age=sample,
        active=jnp.ones(num_rows, bool),
        finish=jnp.zeros(num_rows, jnp.int32),
        source=_find_source(state, queue, sample, takes, num_samples),
        hints=queue.hints[prompt],
        sampling=dataclasses.replace(sampling, sample=sample % num_samples),
    )
    state = start(state, takes, new)
    num_taken = jnp.sum(takes, dtype=jnp.int32)
    queue = dataclasses.replace(queue, next=queue.next + num_taken, sample=sample)
    return _attach(state, queue, takes & state.rows.active, num_samples)


def _find_source(
    state: DecodeState, queue: _Queue, sample: Int32[Array, " B"], takes: Bool[Array, " B"], num_samples: int
) -> Int32[Array, " B"]:
    """The row that will compute the prompt of each row's new sample, or has computed it; NO_ROW: none but itself.

    That is the oldest row of the same prompt, if it holds no more than the prompt yet. Where the prompt's pages are
    held by handles, these are attached instead.
    """
    is_live = takes | state.rows.active
    prompt = jnp.where(is_live, sample // num_samples, NO_PROMPT)
    can_lead = takes | (state.rows.active & (state.rows.num_known == state.rows.num_prompt))
    same = (prompt[:, None] == prompt[None, :]) & can_lead[None, :] & (sample[None, :] < sample[:, None])
    oldest = jnp.min(jnp.where(same, sample[None, :], 2**31 - 1), axis=1)
    leader = jnp.argmax(same & (sample[None, :] == oldest[:, None]), axis=1).astype(jnp.int32)
    return jnp.where(jnp.any(same, axis=1) & (prompt != queue.handles_of), leader, NO_ROW)


def _attach(state: DecodeState, queue: _Queue, new: Bool[Array, " B"], num_samples: int) -> tuple[DecodeState, _Queue]:
    """New rows take the pages of their prompt, if handles hold them."""
    takes_handles = new & (queue.sample // num_samples == queue.handles_of)
    tables = state.cache.tables.attach_each(takes_handles, queue.handles)
    state = state.with_tables(tables)
    is_complete = queue.next >= (queue.handles_of + 1) * num_samples
    return _drop_prompt(state, queue, is_complete)


def _attach_prefix(state: DecodeState, prefix: Handles | None) -> DecodeState:
    """Rows that hold nothing take the pages of the prefix: new ones, and those that gave up all of theirs.

    A row that had to compute the prefix again might find no pages for it, since the handles keep the first ones.
    """
    if prefix is None:
        return state
    rows, tables = state.rows, state.cache.tables
    takes = rows.active & (rows.source == NO_ROW) & (tables.lengths == 0) & (rows.num_prompt > prefix[0].num_tokens)
    tables = tables.attach_each(takes, prefix)
    return state.with_tables(tables)


def _keep_prompt(state: DecodeState, queue: _Queue, num_samples: int) -> tuple[DecodeState, _Queue]:
    """Publish the pages of the prompt of which only some samples have rows, as soon as one of them has computed it."""
    prompt = (queue.next - 1) // num_samples
    is_partly_admitted = (queue.next % num_samples > 0) & (queue.handles_of == NO_PROMPT)
    is_computed = (state.cache.tables.lengths >= state.rows.num_prompt) & (state.rows.source == NO_ROW)
    has_it = (queue.sample // num_samples == prompt) & is_computed & (state.rows.num_prompt > 0)
    has_it &= state.cache.tables.lengths == state.rows.num_prompt
    row = jnp.argmax(has_it).astype(jnp.int32)

    def publish(state: DecodeState, queue: _Queue) -> tuple[DecodeState, _Queue]:
        tables, handles = state.cache.tables.publish(row, state.rows.num_prompt[row] - 1)
        state = state.with_tables(tables)
        return state, dataclasses.replace(queue, handles=handles, handles_of=prompt)

    return lax.cond(is_partly_admitted & jnp.any(has_it), publish, lambda state, queue: (state, queue), state, queue)


def _drop_prompt(state: DecodeState, queue: _Queue, condition: Bool[Array, ""]) -> tuple[DecodeState, _Queue]:
    """Give up the handles of the partly admitted prompt, if there are any and the condition holds."""

    def drop(state: DecodeState, queue: _Queue) -> tuple[DecodeState, _Queue]:
        tables = state.cache.tables.drop(queue.handles)
        state = state.with_tables(tables)
        return state, dataclasses.replace(queue, handles_of=jnp.int32(NO_PROMPT))

    return lax.cond(
        condition & (queue.handles_of != NO_PROMPT), drop, lambda state, queue: (state, queue), state, queue
    )


def _collect(out: Rollout, rows: Rows, sample: Int32[Array, " B"], ended: Bool[Array, " B"]) -> Rollout:
    """Copy what ended rows drew to their samples' places."""
    num_all, num_new = out.tokens.shape

    def collect(out: Rollout) -> Rollout:
        place = jnp.where(ended, sample, num_all)
        length = jnp.where(rows.finish == Finish.TOO_LONG, 0, rows.num_known - rows.num_prompt)
        index = jnp.arange(num_new, dtype=jnp.int32)[None, :]
        is_drawn = index < length[:, None]
        at = jnp.minimum(rows.num_prompt[:, None] + index, rows.tokens.shape[1] - 1)

        def add(collected: Array, known: Array) -> Array:
            axes = (*range(2, known.ndim),)
            taken = jnp.take_along_axis(known, jnp.expand_dims(at, axes), axis=1)
            return collected.at[place].set(jnp.where(jnp.expand_dims(is_drawn, axes), taken, 0), mode="drop")

        return out._replace(
            tokens=add(out.tokens, rows.tokens),
            logprobs=add(out.logprobs, rows.logprobs),
            top_tokens=add(out.top_tokens, rows.top_tokens),
            top_logprobs=add(out.top_logprobs, rows.top_logprobs),
            lengths=out.lengths.at[place].set(length, mode="drop"),
            finish=out.finish.at[place].set(rows.finish, mode="drop"),
        )

    return lax.cond(jnp.any(ended), collect, lambda out: out, out)
