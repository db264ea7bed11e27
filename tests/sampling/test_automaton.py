"""What a trie allows is what plain Python finds in the sequences, in masks and in all drivers."""

import dataclasses
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

import hash_decoder as decoder
from paged_jax import (
    Automaton,
    Engine,
    Finish,
    KVCache,
    SamplingParams,
    SamplingState,
    Stepper,
    beam_search,
    models,
    rollout,
)
from paged_jax.sampling.automaton import FREE, NO_BITMAP

V, END = decoder.VOCAB, 0
SEQUENCES = [(5,), (5, 8), (5, 8, 9, 10), (7, 7, 7), (7, 7), (3, 96), *[(40, t) for t in range(1, 60)]]
CONFIG = dict(num_pages=1 + 64, max_sequences=8)


@functools.cache
def random_sequences():
    """Enough below some nodes that they have bitmaps, and others that have none; some twice."""
    rng = np.random.default_rng(0)
    drawn = [tuple(rng.integers(1, rng.integers(2, V), rng.integers(1, 6)).tolist()) for _ in range(500)]
    return [*drawn, *drawn[:50], *SEQUENCES]


def allowed_after(sequences, drawn: tuple[int, ...]) -> set[int]:
    """The tokens that may follow, by looking at every sequence."""
    if END in drawn:
        return {END}
    begun = [s for s in sequences if s[: len(drawn)] == drawn]
    return {s[len(drawn)] if len(s) > len(drawn) else END for s in begun}


@jax.jit
def mask(automaton: Automaton, state, logits):
    return automaton.process(state, logits, None, None)


@jax.jit
def follow(automaton: Automaton, state, drawn, drew):
    return automaton.advance(state, drawn, drew)


def test_masks_along_random_walks_are_those_of_plain_python():
    sequences, num_rows, rng = random_sequences(), 64, np.random.default_rng(1)
    trie = Automaton.of_sequences(sequences, END, V)
    num_mapped = int(np.sum(np.asarray(trie.bitmap) != NO_BITMAP))
    assert 2 < num_mapped < len(trie.bitmap) / 2
    state, drawn = trie.start(num_rows), [()] * num_rows
    for _ in range(8):
        logits = jnp.asarray(rng.normal(size=(num_rows, V)), jnp.float32)
        masked = np.asarray(mask(trie, state, logits))
        tokens = []
        for row in range(num_rows):
            allowed = allowed_after(sequences, drawn[row])
            assert set(np.flatnonzero(masked[row] > -np.inf).tolist()) == allowed
            assert all(masked[row, t] == logits[row, t] for t in allowed)
            tokens.append(rng.choice(sorted(allowed)))
        drew = rng.random(num_rows) < 0.8
        state = follow(trie, state, jnp.array(tokens, jnp.int32), jnp.asarray(drew))
        drawn = [
            (*before, int(token)) if moves else before for before, token, moves in zip(drawn, tokens, drew, strict=True)
        ]
    ends = [row for row in range(num_rows) if END in drawn[row]]
    assert len(ends) > num_rows / 2 and all(allowed_after(sequences, drawn[row]) == {END} for row in ends)


def test_rows_without_a_constraint_stand_beside_rows_with_one():
    trie = Automaton.of_sequences(SEQUENCES, END, V)
    logits = jnp.ones((3, V), jnp.float32)
    state = jnp.array([FREE, 0, FREE], jnp.int32)
    masked = mask(trie, state, logits)
    assert np.array_equal(masked[::2], logits[::2]) and np.sum(np.asarray(masked[1]) == 1) == 4
    after = follow(trie, state, jnp.array([5, 5, 5], jnp.int32), jnp.array([True, True, True]))
    assert after[0] == after[2] == FREE and after[1] > 0
    assert follow(trie, after, jnp.array([5, 96, 5], jnp.int32), jnp.ones(3, bool))[1] == after[1], "no such edge"


def test_an_automaton_of_the_same_sizes_compiles_nothing():
    traces = []

    @jax.jit
    def count(automaton, logits):
        traces.append(1)
        return automaton.process(automaton.start(1), logits, None, None)

    logits = jnp.zeros((1, V), jnp.float32)
    for token in (3, 4):
        masked = np.asarray(count(Automaton.of_sequences([[token, 1]], END, V), logits))[0]
        assert np.flatnonzero(masked > -np.inf).tolist() == [token]
    assert len(traces) == 1


def test_an_automaton_of_edges_may_have_circles():
    # Any number of 1s, then 2, for ever.
    circle = Automaton.of_edges(np.array([0, 1, 0]), np.array([2, 2, 1]), np.array([1, 1, 0]), V)
    state = circle.start(1)
    for drawn, allowed in ((1, {1, 2}), (1, {1, 2}), (2, {2}), (2, {2})):
        state = follow(circle, state, jnp.array([drawn], jnp.int32), jnp.ones(1, bool))
        masked = np.asarray(mask(circle, state, jnp.zeros((1, V), jnp.float32)))[0]
        assert set(np.flatnonzero(masked > -np.inf).tolist()) == allowed


def test_samples_of_a_rollout_are_sequences_of_the_trie():
    sequences, num_prompts = random_sequences(), 6
    trie = Automaton.of_sequences(sequences, END, V)
    prompts = jnp.asarray(np.random.default_rng(2).integers(0, V, (num_prompts, 5)), jnp.int32)
    one = SamplingState.of(
        [(SamplingParams(temperature=1.0, seed=s, stop_tokens=(END,)), 0) for s in range(num_prompts)]
    )

    @jax.jit
    def sample(trie, cache):
        state = SamplingState(**vars(one) | {"processor": trie.start(num_prompts)})
        stepper = Stepper(decoder.forward, (8,), processor=trie, num_logprobs=None)
        lens = jnp.full(num_prompts, 5, jnp.int32)
        return rollout(stepper, jnp.int32(0), prompts, lens, cache, max_new_tokens=8, num_samples=20, sampling=state)[0]

    drawn = jax.device_get(sample(trie, KVCache.create(decoder.config(**CONFIG))))
    found = {tuple(drawn.tokens[q, i, : drawn.lengths[q, i]].tolist()) for q in range(num_prompts) for i in range(20)}
    assert found <= {(*sequence, END) for sequence in sequences} and len(found) > 30


def test_beams_find_the_likeliest_sequences_of_the_trie_and_no_more_than_there_are():
    sequences = SEQUENCES[:6]
    trie = Automaton.of_sequences(sequences, END, V)
    prompt = [11, 12, 13]

    @jax.jit
    def search(trie, cache):
        prompts, lens = jnp.array([prompt], jnp.int32), jnp.array([3], jnp.int32)
        stepper = Stepper(decoder.forward, (8,), processor=trie)
        return beam_search(
            stepper, jnp.int32(0), prompts, lens, cache, width=8, max_new_tokens=6, stop_tokens=(END,),
            length_penalty=0.0, processor_state=trie.start(1), early_stopping="never",
        )[0]  # fmt: skip

    found = jax.device_get(search(trie, KVCache.create(decoder.config(**CONFIG))))
    scores = {s: float(np.sum(decoder.dense_logprobs(prompt, [*s, END]))) for s in sequences}
    best = sorted(sequences, key=lambda s: -scores[s])
    tokens = [tuple(found.tokens[0, i, : found.lengths[0, i]].tolist()) for i in range(8)]
    assert tokens == [(*s, END) for s in best] + [(), ()]
    assert np.allclose(found.scores[0, :6], [scores[s] for s in best], atol=1e-5) and np.all(
        found.scores[0, 6:] < -1e30
    )


CHARACTERS = (b"", *(bytes([byte]) for byte in range(32, 127)), b"tru")  # token 0 is END
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"enum": ["small", "large"]},
        "good": {"type": "boolean"},
        "counts": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "good", "counts"],
}


@pytest.fixture
def outlines():
    """What reads expressions and schemas."""
    return pytest.importorskip("outlines_core", reason="the extra `constraints` is not installed")


def walk(automaton: Automaton, num_rows: int, num_steps: int, see=lambda *_: None) -> list[str]:
    """Texts that random walks write: at each node any of the allowed tokens; all of them end."""
    rng, state = np.random.default_rng(3), automaton.start(num_rows)
    texts, has_ended = [b""] * num_rows, np.zeros(num_rows, bool)
    for _ in range(num_steps):
        masked = np.asarray(mask(automaton, state, jnp.zeros((num_rows, V), jnp.float32)))
        see(texts, masked, has_ended)
        tokens = [rng.choice(np.flatnonzero(row > -np.inf)) for row in masked]
        texts = [text + CHARACTERS[token] for text, token in zip(texts, tokens, strict=True)]
        has_ended |= np.array(tokens) == END
        state = follow(automaton, state, jnp.array(tokens, jnp.int32), jnp.ones(num_rows, bool))
    assert np.all(has_ended)
    return [text.decode() for text in texts]


def test_walks_through_a_regular_expression_write_what_it_matches(outlines):
    pattern = r"(true|false|[a-c]{2,4}x)[.!]?"

    def see(texts, masked, has_ended):
        for text, row, ended in zip(texts, masked, has_ended, strict=True):
            assert (row[END] > -np.inf) == bool(re.fullmatch(pattern, text.decode())), text
            assert not ended or np.sum(row > -np.inf) == 1, "nothing follows an end"

    automaton = Automaton.of_regex(pattern, CHARACTERS, END)
    texts = walk(automaton, 64, 12, see)
    assert all(re.fullmatch(pattern, text) for text in texts) and len(set(texts)) > 20
    masked = mask(automaton, automaton.start(64), jnp.zeros((64, V), jnp.float32))
    assert masked[0, CHARACTERS.index(b"tru")] == 0, "a token of several characters"


def test_what_a_schema_allows_parses_and_validates(outlines):
    said = [json.loads(text) for text in walk(Automaton.of_json_schema(SCHEMA, CHARACTERS, END), 64, 250)]
    for value in said:
        jsonschema.validate(value, SCHEMA)
    assert len({value["name"] for value in said}) > 20 and {value["good"] for value in said} == {True, False}


@pytest.mark.long  # the same in a rollout of the demo model, which takes longer to compile
def test_fifty_samples_of_the_demo_model_are_what_a_schema_allows(outlines):
    model = models.load(models.DEMO)
    token_bytes, end = model.tokenizer.token_bytes, model.stop_tokens[0]
    one = SamplingState.of([(SamplingParams(temperature=1.0, seed=1, stop_tokens=(end,)), 0)])

    @jax.jit
    def sample(params, automaton, cache):
        stepper, state = Stepper(model.forward, (8,), processor=automaton), automaton.start(1)
        prompt, lens = jnp.array([[11, 12, 13]], jnp.int32), jnp.array([3], jnp.int32)
        sampling = dataclasses.replace(one, processor=state)
        return rollout(stepper, params, prompt, lens, cache, max_new_tokens=190, num_samples=50, sampling=sampling)[0]

    config = model.cache_config(num_pages=200, max_sequences=8, max_pages_per_sequence=24)
    drawn = sample(model.params, Automaton.of_json_schema(SCHEMA, token_bytes, end), KVCache.create(config))
    assert np.all(drawn.finish == Finish.STOP_TOKEN)
    said = set()
    for row, length in zip(drawn.tokens[0].tolist(), drawn.lengths[0].tolist(), strict=True):
        text = b"".join(token_bytes[token] for token in row[: length - 1])
        jsonschema.validate(json.loads(text), SCHEMA)
        said.add(text)
    assert len(said) > 40


@pytest.mark.long  # another program; how the engine treats a processor's state is tested beside it, too
def test_answers_of_the_engine_are_sequences_of_the_trie():
    trie = Automaton.of_sequences(SEQUENCES, END, V)
    config = decoder.config(**CONFIG)
    engine = Engine(
        decoder.forward, jnp.int32(0), config,
        token_counts=(8,), processor=trie, processor_state=trie.start(8), stop_tokens=(END,),
    )  # fmt: skip
    params = SamplingParams(max_new_tokens=8, temperature=1.0, num_samples=8)
    answers = {tuple(sample.tokens) for samples in engine.generate([[1, 2], [3]], params) for sample in samples}
    assert answers <= {(*sequence, END) for sequence in SEQUENCES} and len(answers) > 4


def test_patterns_and_schemas_that_cannot_be_followed_are_named(outlines):
    for pattern, message in (
        ("[", "no automaton for the pattern '\\['"),
        ("aé", "no automaton for the pattern 'aé': .*missing tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Automaton.of_regex(pattern, CHARACTERS, END)
    with pytest.raises(ValueError, match="no regular expression for the schema {.type.: .colour.}"):
        Automaton.of_json_schema({"type": "colour"}, CHARACTERS, END)


def test_the_extra_that_reads_patterns_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(ImportError, match=r"are read by outlines-core: pip install 'paged_jax\[constraints\]'"):
        Automaton.of_regex("a", CHARACTERS, END)


def test_what_no_automaton_can_be_made_of_is_named():
    for sequences, message in (
        ([], "there are no sequences: a trie needs at least one"),
        ([[1], []], "sequence 1 is empty: a trie needs at least one, and each at least one token"),
        ([[1], [2, 97]], r"sequence 1 holds 97: tokens must be in \[0, 97\), and other than end_token=0"),
        ([[1, 0]], r"sequence 0 holds 0: tokens must be in \[0, 97\), and other than end_token=0, which follows"),
    ):
        with pytest.raises(ValueError, match=message):
            Automaton.of_sequences(sequences, END, V)
    with pytest.raises(ValueError, match="node 0 has two edges with token 1: a row could not tell which to follow"):
        Automaton.of_edges(np.array([0, 0]), np.array([1, 1]), np.array([0, 0]), V)
    with pytest.raises(ValueError, match="node 3 has no edge, so that no token could follow: give it one to itself"):
        Automaton.of_edges(np.array([0]), np.array([1]), np.array([3]), V)
    with pytest.raises(ValueError, match=r"an edge has token -2: tokens must be in \[0, 97\)"):
        Automaton.of_edges(np.array([0]), np.array([-2]), np.array([0]), V)
    for edges, message in (
        (([], [], []), "0 sources, 0 tokens and 0 targets: an automaton needs edges"),
        (([0], [1, 2], [0]), "1 sources, 2 tokens and 1 targets"),
        (([0], [1], [-1]), "an edge has node -1: nodes are numbered from 0"),
        (([1], [1], [1]), "node 0 has no edge, so that no token could follow"),
        (([0], [1.5], [0]), r"edges of float64\[1\]: give a list of whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Automaton.of_edges(np.array(edges[0]), np.array(edges[1]), np.array(edges[2]), V)
    with pytest.raises(ValueError, match=r"sequences of float64\[2\]: give a list of whole numbers"):
        Automaton.of_sequences(np.array([[1.7, 2.2]]), END, V)
    trie = Automaton.of_sequences(SEQUENCES, END, V)
    with pytest.raises(ValueError, match="an Automaton needs its state: give automaton.start"):
        trie.process(None, jnp.zeros((1, 97)), None, None)
    with pytest.raises(ValueError, match="logits of 98 tokens, but an automaton with vocab_size=97: make it with that"):
        trie.process(trie.start(1), jnp.zeros((1, 98)), None, None)
