"""Text that comes piece by piece, with the tokenizer of the demo model."""

import random

import pytest

from paged_jax import models
from paged_jax.engine.output import Output
from paged_jax.sampling import SamplingParams

TEXT = "def naïve(x):\n    return '日本 🙂'  # the end\n\n\nclass Ende:\n    pass\n"


@pytest.fixture(scope="module")
def tokenizer():
    return models.Tokenizer.load(models.DEMO)


def pieces_of(output: Output, tokens: list[int], rng: random.Random):
    """Push tokens a few at a time, as visits do; what came, and how many tokens were taken."""
    texts, count, at = [], 0, 0
    while at < len(tokens):
        some = tokens[at : at + rng.randint(1, 4)]
        at += len(some)
        text, taken, is_stopped = output.push(some, is_last=at == len(tokens))
        texts.append(text)
        count += taken
        if is_stopped:
            return texts, count, True
    return texts, count, False


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_whole_text_and_hold_no_half_characters(tokenizer, seed):
    prompt, tokens = tokenizer.encode("import os\n"), tokenizer.encode(TEXT, special_tokens=False)
    for params in (SamplingParams(), SamplingParams(stop_strings=("nowhere", "nor here"))):
        texts, count, is_stopped = pieces_of(Output(tokenizer, prompt, params), tokens, random.Random(seed))
        assert "".join(texts) == TEXT == tokenizer.decode(tokens, prompt=prompt)
        assert count == len(tokens) and not is_stopped
        assert not any("\ufffd" in text for text in texts)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stop", ["🙂", "\n\n\nclass", "e end\n", "return '日本 🙂'"])
def test_a_stop_string_is_held_back_and_left_out_wherever_its_tokens_part(tokenizer, stop, seed):
    tokens = tokenizer.encode(TEXT, special_tokens=False)
    output = Output(tokenizer, [], SamplingParams(stop_strings=("Ende", stop)))
    texts, count, is_stopped = pieces_of(output, tokens, random.Random(seed))
    assert "".join(texts) == TEXT[: TEXT.index(stop)] and is_stopped
    assert stop in tokenizer.decode(tokens[:count]) and stop not in tokenizer.decode(tokens[: count - 1])


def test_a_special_token_can_be_a_stop_string(tokenizer):
    (special,) = tokenizer.encode("<|endoftext|>", special_tokens=False)
    tokens = tokenizer.encode("pass\n", special_tokens=False)
    output = Output(tokenizer, [], SamplingParams(stop_strings=("<|endoftext|>", "\n#")))
    assert output.push([*tokens, special, 5]) == ("pass\n", len(tokens) + 1, True)


def test_without_a_tokenizer_there_is_no_text():
    assert Output(None, [1], SamplingParams(), echo="x").push([1, 2], is_last=True) == ("x", 2, False)
