"""Searches of trees: what nodes share is held and computed once; by UCT, a large tree gives all of it back."""

import numpy as np
import pytest

import hash_decoder as decoder
from engine_cases import Numbers
from examples import tree_search, uct_search
from paged_jax import CacheReport, Completion, Engine, SamplingParams

NUM_TOKENS = 8


def make_engine(num_pages: int) -> Engine:
    config = decoder.config(1 + num_pages, max_pages_per_sequence=num_pages)
    return Engine(
        decoder.forward, np.int32(0), config, Numbers(), token_counts=(16,), visit_steps=NUM_TOKENS,
        max_kept_pages=num_pages,
    )  # fmt: skip


def evenness(completion: Completion) -> float:
    """A value that a search can raise: the share of even tokens."""
    return sum(token % 2 == 0 for token in completion.tokens) / len(completion.tokens)


@pytest.mark.parametrize("num_nodes, num_pages", [(61, 160), pytest.param(1001, 2400, marks=pytest.mark.long)])
def test_a_tree_holds_its_distinct_tokens_and_finds_what_is_worth_more(num_nodes, num_pages):
    engine = make_engine(num_pages)
    tree = uct_search.search(
        engine, [3, 14, 15, 92], num_nodes, num_branches=4, num_tokens=NUM_TOKENS, value=evenness, exploration=0.2
    )
    assert len(tree.nodes) == num_nodes
    for node in tree.nodes:
        is_drawn = node.parent is not None
        assert node.visits == is_drawn + sum(child.visits for child in node.children)
    pages = CacheReport.measure(engine).groups[0].pages_in_use
    assert pages * decoder.PAGE_SIZE <= 1.2 * tree.num_unique_tokens()
    statistics = engine.stats()
    computed = statistics.computed_tokens - (len(tree.nodes) - 1) * (NUM_TOKENS - 1)
    assert computed <= 4 + 4 * len(tree.nodes), "of what was there before, samples compute the last page at most"
    best = [token % 2 == 0 for token in tree.best().tokens[4:]]
    assert np.mean(best) > 0.55, "more than chance finds"
    tree.close()
    longest = [1] * (num_pages * decoder.PAGE_SIZE - 1)  # which needs every page
    assert engine.generate([longest], SamplingParams(max_new_tokens=1))[0][0].finish_reason == "length"


def test_the_best_of_a_beam_survive_and_share_their_beginning():
    engine = make_engine(160)
    beam = tree_search.search(engine, "3 14 15", depth=2, width=2, num_branches=3)
    assert [node.value for node in beam] == sorted((node.value for node in beam), reverse=True) and len(beam) == 2
    for node in beam:
        tokens = node.session.tokens
        assert tokens[:3] == (3, 14, 15) and len(tokens) == 3 + 2 * 24
        logprobs = decoder.dense_logprobs([3, 14, 15], list(tokens[3:]))
        assert np.isclose(node.logprob, sum(logprobs), atol=1e-3)
    statistics = engine.stats()
    drawn = (1 + 2) * 3 * 23  # each sample computes all but its last token
    assert statistics.computed_tokens <= drawn + 3 + 2 * 3 * 2, "nothing is computed twice but last tokens"
