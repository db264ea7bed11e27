"""What a user may ask for, and the sentence that refuses the rest."""

import re
from typing import Any

import numpy as np
import pytest

from paged_jax.sampling import SamplingParams


def test_values_are_stored_in_one_form_and_hash():
    loose: dict[str, Any] = dict(
        max_new_tokens=np.int64(7),
        temperature=1,
        top_p=np.float32(0.5),
        logit_bias={9: 1, np.int32(2): -3.5},
        forbidden_tokens=[4, 4, 1],
        stop_tokens=np.array([3, 8]),
        stop_strings="\n\n",
        seed=np.uint32(5),
    )
    given = SamplingParams(**loose)
    same = SamplingParams(
        max_new_tokens=7,
        temperature=1.0,
        top_p=0.5,
        logit_bias=((2, -3.5), (9, 1.0)),
        forbidden_tokens=(4, 1),
        stop_tokens=(3, 8),
        stop_strings=("\n\n",),
        seed=5,
    )
    assert given == same and hash(given) == hash(same) and repr(given) == repr(same)
    loose["stop_tokens"] = (token for token in (3, 8))
    assert SamplingParams(**loose) == same
    assert type(given.max_new_tokens) is int and type(given.temperature) is float


def test_a_forbidden_token_may_be_a_stop_token():
    assert SamplingParams(forbidden_tokens=(2,), stop_tokens=(2, 3)).stop_tokens == (2, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "(max_new_tokens=0): max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2.0}, "(max_new_tokens=2.0): max_new_tokens must be a whole number, at least 1"),
        ({"max_new_tokens": 2**31}, "max_new_tokens must be below 2**31, and at least 1"),
        ({"min_new_tokens": -1}, "(min_new_tokens=-1): min_new_tokens must be at least 0; 0 lets the first token be"),
        (
            {"min_new_tokens": 9, "max_new_tokens": 8},
            "(min_new_tokens=9): min_new_tokens must be at most max_new_tokens=8: lower it or raise the other",
        ),
        ({"temperature": -1.0}, "(temperature=-1.0): temperature must be finite and at least 0; 0 means greedy"),
        ({"temperature": float("inf")}, "(temperature=inf): temperature must be finite"),
        ({"temperature": float("nan")}, "(temperature=nan): temperature must be a number, finite"),
        ({"temperature": "1"}, "(temperature='1'): temperature must be a number, finite"),
        ({"temperature": 1e39}, "(temperature=1e+39): temperature must be finite"),
        ({"temperature": True}, "(temperature=True): temperature must be a number"),
        ({"top_k": -1}, "top_k must be at least 0; 0 keeps every token"),
        ({"top_k": True}, "(top_k=True): top_k must be a whole number, at least 0"),
        ({"top_k": 2**31}, "top_k must be below 2**31, and at least 0"),
        ({"top_p": 0.0}, "(top_p=0.0): top_p must be in (0, 1]; 1 keeps every token"),
        ({"top_p": 1.1}, "(top_p=1.1): top_p must be in (0, 1]"),
        ({"min_p": -0.1}, "(min_p=-0.1): min_p must be in [0, 1]; 0 keeps every token"),
        ({"min_p": 2}, "(min_p=2): min_p must be in [0, 1]"),
        ({"repetition_penalty": 0}, "(repetition_penalty=0): repetition_penalty must be in [0.01, 100]; 1 changes"),
        ({"presence_penalty": 2.5}, "(presence_penalty=2.5): presence_penalty must be in [-2, 2]; 0 changes nothing"),
        ({"frequency_penalty": -3}, "(frequency_penalty=-3): frequency_penalty must be in [-2, 2]; 0 changes"),
        ({"seed": -1}, "(seed=-1): seed must be in [0, 2**32)"),
        ({"seed": 2**32}, "(seed=4294967296): seed must be in [0, 2**32)"),
        ({"seed": None}, "(seed=None): seed must be a whole number, in [0, 2**32)"),
        ({"num_samples": 0}, "(num_samples=0): num_samples must be at least 1"),
        ({"stop_tokens": 5}, "(stop_tokens=5): stop_tokens must be a sequence of token ids: write (5,) for this one"),
        (
            {"stop_tokens": "end"},
            "stop_tokens must be a sequence of token ids, not text: encode it, or use stop_strings",
        ),
        ({"stop_tokens": None}, "(stop_tokens=None): stop_tokens must be a sequence of token ids"),
        ({"stop_tokens": (-1,)}, "(stop_tokens=(-1,)): stop_tokens must be token ids: whole numbers, at least 0 and"),
        ({"stop_tokens": (2**31,)}, "stop_tokens must be token ids: whole numbers, at least 0 and below 2**31"),
        ({"stop_tokens": (True,)}, "(stop_tokens=(True,)): stop_tokens must be token ids"),
        ({"forbidden_tokens": 5}, "forbidden_tokens must be a sequence of token ids: write (5,) for this one token"),
        (
            {"forbidden_tokens": "a"},
            "(forbidden_tokens='a'): forbidden_tokens must be a sequence of token ids, not text",
        ),
        ({"forbidden_tokens": [0.5]}, "(forbidden_tokens=(0.5,)): forbidden_tokens must be token ids"),
        ({"stop_strings": ("",)}, "(stop_strings=('',)): stop_strings must be non-empty strings"),
        ({"stop_strings": (3,)}, "(stop_strings=(3,)): stop_strings must be non-empty strings"),
        ({"stop_strings": 3}, "(stop_strings=3): stop_strings must be a string or a sequence of strings"),
        (
            {"logit_bias": 3},
            "(logit_bias=3): logit_bias must be a mapping from tokens to biases, such as {5: -1.0}, or",
        ),
        ({"logit_bias": [3]}, "(logit_bias=(3,)): logit_bias must be pairs of a token id"),
        (
            {"logit_bias": {-3: 1.0}},
            "(logit_bias=((-3, 1.0),)): logit_bias must be pairs of a token id (a whole number",
        ),
        ({"logit_bias": {3: float("nan")}}, "logit_bias must be finite biases: name a token in forbidden_tokens to"),
        ({"logit_bias": {3: -float("inf")}}, "logit_bias must be finite biases: name a token in forbidden_tokens to"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias must be one bias for each token: add up those of a token"),
        (
            {"logit_bias": {3: 1.0, 4: 0.0}, "forbidden_tokens": (4, 5)},
            "logit_bias must be for tokens that may be drawn, but forbidden_tokens holds [4]: leave them out of one",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(wrong, message):
    with pytest.raises(ValueError, match=r"SamplingParams\(.*" + re.escape(message.removeprefix("("))):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"stop_tokens": (3, 8, 9)},
            "(stop_tokens=(3, 8, 9)): stop_tokens must be tokens of the vocabulary, below 8: ",
        ),
        ({"stop_tokens": (3, 8, 9)}, "leave out [8, 9]"),
        ({"forbidden_tokens": (8,)}, "forbidden_tokens must be tokens of the vocabulary, below 8: leave out [8]"),
        ({"logit_bias": {7: 1.0, 11: 1.0}}, "logit_bias must be tokens of the vocabulary, below 8: leave out [11]"),
        ({"forbidden_tokens": range(8)}, "forbidden_tokens rule out all 8 tokens of the vocabulary: leave one to draw"),
        (
            {"forbidden_tokens": range(7), "stop_tokens": (7,), "min_new_tokens": 2},
            "forbidden_tokens, and stop_tokens before min_new_tokens=2, rule out all 8 tokens of the vocabulary",
        ),
    ],
)
def test_tokens_outside_the_vocabulary_are_named_once_it_is_known(asked, message):
    params = SamplingParams(**asked)
    params.check(16)
    with pytest.raises(ValueError, match=re.escape(message)):
        params.check(8)


def test_what_leaves_a_token_to_draw_is_accepted():
    SamplingParams(forbidden_tokens=range(7), stop_tokens=(7,)).check(8)
    SamplingParams(forbidden_tokens=range(6), stop_tokens=(7,), min_new_tokens=2, logit_bias={6: 1.0}).check(8)
