"""Text to tokens and back, as checkpoint folders have it, and text that comes token by token."""

import functools
import json
import random
from pathlib import Path

import pytest
import small_tokenizers
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_jax.engine.stop_strings import StopStrings
from paged_jax.models.special_tokens import SpecialTokens
from paged_jax.models.tokenizer import Tokenizer

KINDS = sorted(small_tokenizers.KINDS)
TEXTS = ["the cat sat on a mat", "  it is  é, 你好 🙂 the end.", "\n\n a", "", "🙂", "a<|tool|>b"]


@functools.cache
def make(kind: str) -> Tokenizer:
    return Tokenizer(small_tokenizers.KINDS[kind](), Path("folder"))


def write(folder: Path, tokenizer: tokenizers.Tokenizer, **files) -> Path:
    """A folder with tokenizer.json and other files of JSON."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def whole(tokenizer: Tokenizer, tokens: list[int], special_tokens: bool = False) -> str:
    return tokenizer.tokenizer.decode(tokens, skip_special_tokens=not special_tokens)


def pieces_of(tokenizer: Tokenizer, tokens: list[int], prompt=(), sizes=None, special_tokens=False) -> list[str]:
    """The pieces of a stream that gets its tokens one by one, or in parts of these sizes."""
    stream, rest, pieces = tokenizer.stream(prompt, special_tokens=special_tokens), list(tokens), []
    sizes = iter(sizes or [])
    while rest:
        size = next(sizes, 1)
        pieces.append(stream.push(rest[:size]))
        rest = rest[size:]
    return [*pieces, stream.finish()]


def test_truncation_and_padding_of_tokenizer_json_are_switched_off(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    plain = tokenizer.encode(TEXTS[0]).ids
    assert len(plain) > 4
    tokenizer.enable_truncation(4)
    cut = Tokenizer.load(write(tmp_path / "cut", tokenizer))
    assert cut.encode(TEXTS[0]) == plain
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=40)
    assert Tokenizer.load(write(tmp_path / "padded", tokenizer)).encode(TEXTS[0]) == plain


def test_an_answer_keeps_the_space_before_its_first_word():
    tokenizer = make("sentencepiece")
    prompt, both = tokenizer.encode("the cat sat"), tokenizer.encode("the cat sat a mat")
    answer = both[len(prompt) :]
    assert both[: len(prompt)] == prompt
    assert tokenizer.decode(answer) == "a mat"
    assert tokenizer.decode(answer, prompt=prompt) == " a mat"
    assert "".join(pieces_of(tokenizer, answer, prompt)) == " a mat"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special_tokens", [False, True])
def test_pieces_join_to_the_whole_text_whatever_the_tokens(kind, special_tokens):
    tokenizer = make(kind)

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def check(data):
        token = st.integers(0, tokenizer.vocab_size + 1)  # and one that is none
        bytes_often = token if kind != "sentencepiece" else st.one_of(token, st.integers(1, 256))
        tokens = data.draw(st.lists(bytes_often, max_size=60))
        sizes = data.draw(st.lists(st.integers(1, 9), max_size=20))
        pieces = pieces_of(tokenizer, tokens, (), sizes, special_tokens)
        assert "".join(pieces) == whole(tokenizer, tokens, special_tokens)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_an_answer_is_what_it_adds_to_the_text_of_the_prompt(kind):
    tokenizer = make(kind)
    readable = [token for token in range(tokenizer.vocab_size) if "\ufffd" not in whole(tokenizer, [token])]
    for seed in range(100):
        rng = random.Random(seed)
        tokens = rng.choices(readable, k=rng.randrange(1, 40))
        cut = rng.randrange(len(tokens))
        before, text = whole(tokenizer, tokens[:cut]), whole(tokenizer, tokens)
        if text.startswith(before):
            assert before + tokenizer.decode(tokens[cut:], prompt=tokens[:cut]) == text
            assert before + "".join(pieces_of(tokenizer, tokens[cut:], tokens[:cut])) == text


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "sentencepiece_unstripped"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_piece_never_ends_within_a_character(kind, text):
    tokenizer = make(kind)
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == whole(tokenizer, tokenizer.encode(text))


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = make("byte_level")
    tokens = tokenizer.encode("the cat 🙂 sat")
    stream, shown = tokenizer.stream(), ""
    for count, token in enumerate(tokens, 1):
        shown += stream.push([token])
        text = whole(tokenizer, tokens[:count])
        assert shown == text.removesuffix("\ufffd")


def test_a_character_that_a_prompt_began_belongs_to_the_answer():
    tokenizer = make("byte_level")
    tokens = tokenizer.encode("the 🙂!")
    cut = next(i for i in range(len(tokens)) if whole(tokenizer, tokens[: i + 1]).endswith("\ufffd")) + 1
    assert tokenizer.decode(tokens[cut:], prompt=tokens[:cut]) == "🙂!"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", ["text", "one token", "bytes"])
def test_the_cost_of_a_stream_is_linear(kind, tokens):
    """Counted in tokens that are decoded, for answers of 500 tokens after prompts of 500 and of 10,000."""
    tokenizer = make(kind)
    repeated = {
        "text": tokenizer.encode("the cat sat a") * 200,
        "one token": [tokenizer.vocab_size - 4] * 500,
        "bytes": [tokenizer.tokenizer.token_to_id("<0xE4>") or 5] * 500,
    }[tokens][:500]

    class Counting:
        def __init__(self):
            self.count = 0
            self.id_to_token = tokenizer.tokenizer.id_to_token
            self.get_added_tokens_decoder = tokenizer.tokenizer.get_added_tokens_decoder

        def decode(self, ids, **options):
            self.count += len(ids)
            return tokenizer.tokenizer.decode(ids, **options)

    for prompt in (repeated, repeated * 20):
        counting = Counting()
        stream = Tokenizer(counting, Path()).stream(prompt)  # pyright: ignore[reportArgumentType]  quacks like one
        for token in repeated:
            stream.push([token])
        stream.finish()
        assert counting.count < 30 * len(repeated) + 3 * (len(prompt) if tokens == "bytes" else 0)


BOS = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def test_special_tokens_are_found_wherever_they_stand(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    for name, files in {
        "text": {"tokenizer_config": {"bos_token": "<s>"}},
        "object": {"tokenizer_config": {"bos_token": {"__type": "AddedToken", **BOS}, "add_bos_token": True}},
        "map": {"tokenizer_config": {"bos_token": "other"}, "special_tokens_map": {"bos_token": BOS}},
        "extra": {"tokenizer_config": {"extra_special_tokens": {"bos_token": "<s>"}}},
    }.items():
        folder = write(tmp_path / name, tokenizer, **files)
        assert SpecialTokens.load(folder).named == {"bos_token": "<s>"}, name
        assert Tokenizer.load(folder).encode("<s>", special_tokens=False) == [tokenizer.token_to_id("<s>")]


def test_tokens_that_only_other_files_add_are_one_token(tmp_path):
    tokenizer = small_tokenizers.byte_level()
    size = tokenizer.get_vocab_size()
    added = {str(size): BOS | {"content": "<|new|>"}, str(size + 1): BOS | {"content": "<|call|>", "special": False}}
    for name, files in {
        "decoder": {"tokenizer_config": {"added_tokens_decoder": added}},
        "legacy": {
            "added_tokens": {"<|new|>": size, "<|call|>": size + 1},
            "special_tokens_map": {"eos_token": "<|new|>"},
        },
    }.items():
        loaded = Tokenizer.load(write(tmp_path / name, tokenizer, **files))
        tokens = loaded.encode("a<|new|><|call|>", special_tokens=False)
        assert tokens[-2:] == [size, size + 1], name
        assert loaded.decode(tokens) == "a<|call|>"
        assert loaded.decode(tokens, special_tokens=True) == "a<|new|><|call|>"
    listed = {"tokenizer_config": {"additional_special_tokens": ["<s>", "<|new|>"], "pad_token": None}}
    assert Tokenizer.load(write(tmp_path / "listed", tokenizer, **listed)).encode("<|new|>")[-1] == size


def test_a_folder_may_ask_to_split_special_tokens(tmp_path):
    folder = write(tmp_path / "a", small_tokenizers.byte_level(), tokenizer_config={"split_special_tokens": True})
    assert len(Tokenizer.load(folder).encode("<s>")) > 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {"3": BOS}}},
            r"tokenizer_config.json gives '<s>' the id 3, but for ",
        ),
        (
            {"added_tokens": {"<|new|>": 7}},
            r"added_tokens.json gives '<\|new\|>' the id 7, but for tokenizer.json .* is \d+",
        ),
        ({"added_tokens": {"<|new|>": "x"}}, r"added_tokens.json has a token's id='x': it must be a whole number"),
        (
            {"tokenizer_config": {"added_tokens_decoder": [1]}},
            r"has added_tokens_decoder=\[1\]: it must be an object of",
        ),
        ({"tokenizer_config": {"bos_token": {"text": "x"}}}, r"has bos_token=.*: a token must be a text, or an object"),
        (
            {"tokenizer_config": {"additional_special_tokens": "x"}},
            r"additional_special_tokens='x': it must be a list of",
        ),
        ({"special_tokens_map": [1]}, r"special_tokens_map.json holds list instead of a JSON object"),
    ],
)
def test_files_that_contradict_the_tokenizer_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(write(tmp_path / "folder", small_tokenizers.byte_level(), **files))


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc", max_size=4), max_size=8))
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(strings, pieces):
    text = "".join(pieces)
    ends = sorted((text.find(s) + len(s), -len(s), s) for s in strings if s in text)
    stops = StopStrings(strings)
    out = [stops.push(piece) for piece in pieces]
    for count in range(1, len(pieces) + 1):  # what went out never had to be taken back
        assert text.startswith("".join(out[:count]))
    if ends:
        end, _, string = ends[0]
        assert stops.found == string and "".join(out) == text[: end - len(string)]
    else:
        held = stops.finish()
        assert stops.found is None and "".join(out) + held == text
        assert held == "" or any(s.startswith(held) for s in strings)  # nothing is held without a reason


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty, so it would end every text"):
        StopStrings(["a", ""])


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_token_are_what_it_adds_to_a_text(kind):
    tokenizer = make(kind)
    if kind == "wordpiece":
        with pytest.raises(ValueError, match="tokens of this kind of tokenizer have no bytes of their own.*WordPiece"):
            _ = tokenizer.token_bytes
        return
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    prompt, num_parts = tokenizer.encode("a"), 0
    for token, written in enumerate(tokenizer.token_bytes):
        text = written.decode(errors="replace")
        if "\ufffd" in text:  # part of a character
            num_parts += 1
            continue
        assert tokenizer.decode([token], prompt=prompt) == text
        assert bool(written) != (token in tokenizer.hidden_tokens)
    assert num_parts >= 100 or kind == "metaspace"
