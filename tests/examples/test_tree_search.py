"""The tree search finds the likeliest texts, and computes what its nodes share once."""

import numpy as np

import hash_decoder as decoder
from engine_cases import Numbers
from examples.tree_search import search
from paged_jax.engine import Engine


def test_the_best_of_a_beam_survive_and_share_their_beginning():
    config = decoder.config(64)
    engine = Engine(decoder.forward, np.int32(0), config, Numbers(), token_counts=(8, 32), visit_steps=4)
    beam = search(engine, "3 14 15", depth=2, width=2, num_branches=3)
    assert [node.value for node in beam] == sorted((node.value for node in beam), reverse=True) and len(beam) == 2
    for node in beam:
        tokens = node.session.tokens
        assert tokens[:3] == (3, 14, 15) and len(tokens) == 3 + 2 * 24
        logprobs = decoder.dense_logprobs([3, 14, 15], list(tokens[3:]))
        assert np.isclose(node.logprob, sum(logprobs), atol=1e-3)
    statistics = engine.stats()
    drawn = (1 + 2) * 3 * 23  # each sample computes all but its last token
    assert statistics.computed_tokens <= drawn + 3 + 2 * 3 * 2, "nothing is computed twice but last tokens"
