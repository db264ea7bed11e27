"""The tokens that a checkpoint names or adds beside tokenizer.json, in whichever file it does so."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from paged_jax.models.safetensors_file import read_json

CONFIG, NAMES, LEGACY_IDS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class SpecialTokens:
    """What tokenizer_config.json says of tokens, or the files that older checkpoints have instead.

    Args:
        named: a name, such as `bos_token`, to the token's text.
        added: tokens that the tokenizer must know, in the order of their ids.
        ids: the ids that the files give to some of them, by their text.
        path: the file that says so, for errors.
    """

    named: dict[str, str]
    added: tuple[tokenizers.AddedToken, ...]
    ids: dict[str, int]
    path: Path

    @classmethod
    def load(cls, folder: str | Path) -> "SpecialTokens":
        """Reads tokenizer_config.json and, where that lists no added tokens, the two files that it replaced.

        Args:
            folder: the checkpoint folder.

        Raises:
            ValueError: a file is not what Hugging Face writes.
        """
        folder = Path(folder)
        path, values = folder / CONFIG, _read(folder / CONFIG)
        if "added_tokens_decoder" in values:
            by_id = _entries(path, "added_tokens_decoder", values["added_tokens_decoder"])
            tokens = {_token_id(path, key): _token(path, "added_tokens_decoder", entry) for key, entry in by_id}
        else:
            if (folder / NAMES).exists():
                path, values = folder / NAMES, values | _read(folder / NAMES)
            special = {token.content for token in _specials(path, values)}
            tokens = _legacy_tokens(folder / LEGACY_IDS, special)
            path = folder / LEGACY_IDS if tokens else path
        added = {tokens[number].content: tokens[number] for number in sorted(tokens)}
        for token in _specials(path, values):
            added.setdefault(token.content, token)
        named = {name: token.content for name, token in _named_tokens(path, values).items()}
        ids = {token.content: number for number, token in tokens.items()}
        return cls(named, tuple(added.values()), ids, path)

    def add_to(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Teaches the tokenizer what it does not know yet.

        Raises:
            ValueError: a token has another id in the tokenizer than the files say.
        """
        known = {token.content: token.__getstate__() for token in tokenizer.get_added_tokens_decoder().values()}
        new = [
            token
            for token in self.added
            if token.content not in known
            or (token.content in self.ids and known[token.content] != token.__getstate__())
        ]
        tokenizer.add_tokens(new)
        for text, number in self.ids.items():
            if (found := tokenizer.token_to_id(text)) != number:
                raise ValueError(
                    f"{self.path} gives {text!r} the id {number}, but for tokenizer.json beside it the id is {found}: "
                    "the two files belong to different tokenizers. Download both again."
                )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _legacy_tokens(path: Path, special: set[str]) -> dict[int, tokenizers.AddedToken]:
    """The tokens of added_tokens.json, which gives ids to texts; those that have a name elsewhere are special."""
    return {
        _token_id(path, number): tokenizers.AddedToken(text, normalized=text not in special, special=text in special)
        for text, number in _read(path).items()
    }


def _named_tokens(path: Path, values: dict[str, Any]) -> dict[str, tokenizers.AddedToken]:
    named = {name: value for name, value in values.items() if name.endswith("_token") and _is_token(value)}
    extra = values.get("extra_special_tokens")
    if isinstance(extra, dict):
        named |= extra
    return {name: _token(path, name, value) for name, value in named.items()}


def _specials(path: Path, values: dict[str, Any]) -> Iterator[tokenizers.AddedToken]:
    """Every token that has a name or stands in a list of further special tokens."""
    yield from _named_tokens(path, values).values()
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = values.get(key) or []
        if isinstance(listed, dict):
            continue
        if not isinstance(listed, list):
            _fail(path, key, listed, "it must be a list of tokens")
        yield from (_token(path, key, value) for value in listed)


def _is_token(value: Any) -> bool:
    return isinstance(value, (str, dict)) and bool(value)  # "add_prefix_token": true has such a name, and is none


def _token(path: Path, key: str, value: Any) -> tokenizers.AddedToken:
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        _fail(path, key, value, "a token must be a text, or an object with a text as its 'content'")
    flags = {name: bool(value[name]) for name in FLAGS if name in value}
    return tokenizers.AddedToken(value["content"], **({"special": True} | flags))


def _token_id(path: Path, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        _fail(path, "a token's id", value, "it must be a whole number")


def _entries(path: Path, key: str, value: Any):
    if not isinstance(value, dict):
        _fail(path, key, value, "it must be an object of token ids and tokens")
    return value.items()


def _fail(path: Path, key: str, value: Any, rule: str) -> NoReturn:
    raise ValueError(f"{path} has {key}={value!r}: {rule}. Download it again.")
