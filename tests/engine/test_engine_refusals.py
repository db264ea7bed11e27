"""What an engine refuses when it is made or asked, in a sentence, and that nothing of it is queued."""

from typing import Any

import numpy as np
import pytest

import hash_decoder as decoder
from engine_cases import Numbers
from paged_jax.engine import Engine
from paged_jax.sampling import SamplingParams


def engine(num_pages: int = 64, **options: Any) -> Engine:
    options = {"token_counts": (8, 32), "visit_steps": 4} | options
    return Engine(decoder.forward, np.int32(0), decoder.config(num_pages), Numbers(), **options)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(max_new_tokens=2), "the prompt has 0 tokens; it needs at least 1"),
        ([1] * 60, SamplingParams(max_new_tokens=6), "prompt of 60 tokens .* needs a row of 65 tokens, .* hold 64"),
        ([1] * 50, SamplingParams(max_new_tokens=10), "needs 15 pages, but the pool has 8 .* num_pages to 16"),
        (
            [1],
            SamplingParams(max_new_tokens=2, stop_tokens=tuple(range(9))),
            "9 tokens in stop_tokens, but max_stop_tokens=8: raise it to 9",
        ),
        ([3, -1], SamplingParams(max_new_tokens=2), r"the prompt holds -1: token ids are in \[0, 97\)"),
        ([3, 97], SamplingParams(max_new_tokens=2), r"the prompt holds 97: token ids are in \[0, 97\)"),
        ([3, 1.5], SamplingParams(max_new_tokens=2), "the prompt holds 1.5: token ids are whole numbers"),
        ([3, True], SamplingParams(max_new_tokens=2), "the prompt holds True: token ids are whole numbers"),
        (7, SamplingParams(max_new_tokens=2), "the prompt is 7: pass a text, token ids"),
        (b"text", SamplingParams(max_new_tokens=2), "the prompt is b'text': pass a text"),
        (
            [1],
            SamplingParams(max_new_tokens=2, stop_tokens=(97,)),
            "stop_tokens must be tokens of the vocabulary, below 97",
        ),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_at_once(prompt, params, message):
    g = engine(num_pages=9)
    with pytest.raises(ValueError, match=message):
        g.add_request(prompt, params)
    assert not g.has_work
    with pytest.raises(ValueError, match=message):
        g.generate([[1, 2], prompt], params)
    assert not g.has_work, "a batch with one bad request queues none of it"


def test_a_priority_that_is_no_number_is_refused_and_nothing_is_lost():
    g = engine()
    for priority in ("a", None, 2.5):
        with pytest.raises(ValueError, match="must be a whole number: the lowest is served first"):
            g.add_request([1, 2, 3], SamplingParams(max_new_tokens=2), priority=priority)
    assert not g.has_work


def test_without_a_tokenizer_text_is_refused():
    g = Engine(decoder.forward, np.int32(0), decoder.config(64))
    with pytest.raises(ValueError, match="the prompt is the text 'text': pass token ids, or a tokenizer"):
        g.add_request("text")
    with pytest.raises(ValueError, match="the prompt is a chat: pass token ids, or a tokenizer"):
        g.add_request([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match="stop_strings need to read the text: pass a tokenizer to the Engine"):
        g.add_request([1], SamplingParams(stop_strings="x"))


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"params is 7: pass SamplingParams\(...\)"):
        engine().add_request([1], 7)
    with pytest.raises(
        ValueError, match=r"token_counts=\(3,\) for a batch of 4 rows: the largest must hold one token of each"
    ):
        engine(token_counts=(3,))
    with pytest.raises(ValueError, match="visit_steps must be at least 1"):
        engine(visit_steps=0)
    with pytest.raises(ValueError, match="config must be a CacheConfig, got a dict"):
        Engine(decoder.forward, np.int32(0), {"num_pages": 9})  # pyright: ignore[reportArgumentType]  the mistake
    with pytest.raises(ValueError, match=r"stop_tokens must be a sequence of token ids: write \(5,\)"):
        engine(stop_tokens=5)
    with pytest.raises(ValueError, match="prompts is 5: pass a text, a list of token ids, or a list of such prompts"):
        engine().generate(5)  # pyright: ignore[reportArgumentType]  the mistake
    with pytest.raises(ValueError, match="2 prompts, but 1 params: give one, or one for each"):
        engine().generate([[1], [2]], [SamplingParams()])
    with pytest.raises(ValueError, match="best_of=2 samples, of which num_samples=3 are wanted"):
        engine().add_request([1], SamplingParams(num_samples=3), best_of=2)
