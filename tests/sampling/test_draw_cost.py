"""What is not used costs nothing: neither in the compiled program nor while it runs."""

import functools
import time

import jax
import jax.numpy as jnp

from paged_jax import sampling
from paged_jax.sampling import SamplingParams, SamplingState

DEAR = {"exp", "log", "scatter", "scatter-add", "threefry2x32", "while", "scan", "top_k", "sort", "gather"}


def arguments(rows=2, vocab=16, **sizes):
    state = SamplingState.create(rows, **sizes)
    zeros = jnp.zeros(rows, jnp.int32)
    return jnp.zeros((rows, vocab), jnp.float32), state, jnp.zeros((rows, 4), jnp.int32), zeros, zeros


def primitives(jaxpr, inside_cond: bool) -> list[str]:
    """Names of the primitives, with or without those that run only in some branch of a `cond`."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        if equation.primitive.name != "cond" or inside_cond:
            for inner in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(inner, "jaxpr", inner)  # a closed one holds a plain one
                names += primitives(inner, inside_cond) if hasattr(inner, "eqns") else []
    return names


def traced(inside_cond, options, **sizes):
    return primitives(
        jax.make_jaxpr(functools.partial(sampling.draw, **options))(*arguments(**sizes)).jaxpr, inside_cond
    )


def test_outside_of_conds_a_draw_is_an_argmax_and_tests():
    always = set(traced(False, {}))
    assert always & DEAR == set()
    inside = set(traced(True, {}))
    assert {"threefry2x32", "scatter-add", "scan", "argmax", "exp", "log"} <= inside, "the reader looks into branches"


def test_log_probabilities_are_computed_only_where_they_are_asked_for():
    assert {"exp", "log"} <= set(traced(False, {"num_logprobs": 0}))
    assert "top_k" not in traced(True, {"num_logprobs": 0})
    assert "top_k" in traced(False, {"num_logprobs": 1})


def test_no_biased_tokens_and_no_stop_tokens_leave_no_scatter_for_them():
    count = [
        traced(True, {}, max_stop_tokens=x, max_bias_tokens=z).count("scatter-add")
        for x, z in ((0, 0), (0, 3), (3, 0), (3, 3))
    ]
    penalties = count[0]
    assert count == [penalties, penalties + 1, penalties + 1, penalties + 1] and penalties == 2


def test_new_parameters_do_not_compile_again():
    traces = []

    @jax.jit
    def counted(*given):
        traces.append(1)
        return sampling.draw(*given).tokens

    x, _, *rows = arguments(rows=1)
    for params in (
        None,
        SamplingParams(),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(seed=9, top_p=0.5, stop_tokens=(3,), min_new_tokens=2),
        SamplingParams(logit_bias={2: 1.0}, forbidden_tokens=(1,), repetition_penalty=2.0, min_p=0.5),
    ):
        counted(x, SamplingState.of([params and (params, 3)], max_bias_tokens=4), *rows)
    assert len(traces) == 1


def test_a_plain_greedy_batch_takes_a_fraction_of_the_time():
    """All run the same compiled program, in turns; what is asked for is at least 1.5 times as slow as an argmax."""
    x, plain, *rows = arguments(rows=8, vocab=30_000)
    wishes = {"temperature": SamplingParams(temperature=1.0), "top_p": SamplingParams(temperature=1.0, top_p=0.9)}
    states = {name: SamplingState.of([(wish, 0)] * 8) for name, wish in wishes.items()}
    run = jax.jit(lambda x, state, active, *rows: sampling.draw(x, state, *rows, active=active).tokens)
    every, nobody = jnp.ones(8, bool), jnp.zeros(8, bool)

    def seconds(state, active):
        start = time.process_time()
        run(x, state, active, *rows).block_until_ready()
        return time.process_time() - start

    cases = {"plain": (plain, every), "rests": (states["top_p"], nobody)}
    cases |= {name: (state, every) for name, state in states.items()}
    best = {name: min(seconds(*case) for _ in range(4)) for name, case in cases.items()}
    for cheap in ("plain", "rests"):
        assert best["temperature"] > 1.5 * best[cheap] and best["top_p"] > 5 * best[cheap], best
