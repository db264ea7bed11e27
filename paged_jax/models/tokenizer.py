"""Text and conversations to token ids and back, from a checkpoint's tokenizer.json."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from paged_jax.models.chat_template import ChatTemplate, choose, load_templates
from paged_jax.models.safetensors_file import read_json
from paged_jax.models.special_tokens import CONFIG, SpecialTokens

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\u2581"  # stands for a space in SentencePiece vocabularies
# Byte-level vocabularies write a byte as the character of its number, or of 256 and up if that cannot be printed.
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(byte): byte for byte in PRINTED}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTED)}
CONTEXT = 4  # tokens that are decoded again with new ones: one to stand before them, and a character of four bytes


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        tokenizer: what tokenizer.json holds.
        folder: where it came from, and where a chat template is looked for.

    Examples:
        >>> tokenizer = models.Tokenizer.load(models.DEMO)
        >>> tokens = tokenizer.encode("import os")
        >>> tokens, tokenizer.decode(tokens)  # 0 begins a text
        ([0, 701, 664], 'import os')
    """

    tokenizer: tokenizers.Tokenizer
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, and the tokens that the files beside it add.

        Truncation and padding that were saved with it are switched off: they are settings of a training run.

        Args:
            folder: the checkpoint folder.

        Raises:
            ValueError: the file is missing or not readable, or the files beside it contradict it.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ValueError(
                f"{path} does not exist: text needs a tokenizer. Copy tokenizer.json into the checkpoint folder."
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a readable tokenizer ({error}). Download it again.") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        SpecialTokens.load(folder).add_to(tokenizer)
        config = folder / CONFIG
        tokenizer.encode_special_tokens = config.exists() and read_json(config).get("split_special_tokens") is True
        return cls(tokenizer, folder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            special_tokens: put the tokens around it that the tokenizer prescribes (begin of text, mostly).
        """
        return self.tokenizer.encode(text, add_special_tokens=special_tokens).ids

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation, for a model that was trained to answer.

        Special tokens that stand in a message count as such, as they do in transformers: take them out of texts that
        you do not trust.

        Args:
            messages: what was said, such as `{"role": "user", "content": "Hello"}`.
            options: as in `chat_text`.

        Raises:
            ValueError: as in `chat_text`.
        """
        return self.encode(self.chat_text(messages, **options), special_tokens=False)  # the template wrote them

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """A conversation as the checkpoint's chat template writes it down.

        Args:
            messages: what was said, such as `{"role": "user", "content": "Hello"}`.
            tools: what the model may call: JSON schemas, or functions with type hints and a docstring.
            chat_template: the name of one of several templates, or a template; None: `tool_use` for tools, `default`
                otherwise.
            add_generation_prompt: end with the beginning of the model's next message; None: unless the last message is
                continued.
            continue_final_message: leave the last message open, so that the model continues it; a name: this field of
                the message instead of its content.
            variables: other names that the template reads.

        Raises:
            ValueError: there is no chat template, it refuses the conversation, or the options contradict each other.
        """
        template = choose(self.chat_templates, self.folder, chat_template, tools)
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    @functools.cached_property
    def chat_templates(self) -> dict[str, ChatTemplate]:
        """The templates beside the tokenizer, by name; `default` is the usual one."""
        return load_templates(self.folder)

    def decode(self, tokens: Sequence[int], *, prompt: Sequence[int] = (), special_tokens: bool = False) -> str:
        """The text of token ids.

        Args:
            tokens: token ids.
            prompt: the tokens before them, where they are an answer: its text is what it adds to the text of the
                prompt, so it begins with a space where a word begins.
            special_tokens: keep special tokens in the text.
        """
        stream = self.stream(prompt, special_tokens=special_tokens)
        return stream.push(tokens) + stream.finish()

    def stream(self, prompt: Sequence[int] = (), *, special_tokens: bool = False) -> "TextStream":
        """Decodes an answer token by token.

        Args:
            prompt: the tokens before the answer.
            special_tokens: keep special tokens in the text.
        """
        return TextStream(self, prompt, special_tokens=special_tokens)

    @functools.cached_property
    def hidden_tokens(self) -> frozenset[int]:
        """The special tokens, which a text does not show."""
        decode, added = self.tokenizer.decode, self.tokenizer.get_added_tokens_decoder()
        shown = {number for number in added if decode([number], skip_special_tokens=True)}
        return frozenset(
            number for number in added if number not in shown and decode([number], skip_special_tokens=False)
        )

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """What each token adds to a text, in UTF-8 of which a token may be a part; nothing for special tokens.

        Raises:
            ValueError: the tokenizer's tokens are no pieces of text, as those of WordPiece, which depend on neighbours.
        """
        decoder = json.dumps(json.loads(self.tokenizer.to_str())["decoder"], ensure_ascii=False)
        is_byte_level, has_spaces = '"ByteLevel"' in decoder, SPACE in decoder
        if not is_byte_level and not has_spaces:
            raise ValueError(f"{self.folder}: tokens of this kind of tokenizer have no bytes of their own: {decoder}")
        added = self.tokenizer.get_added_tokens_decoder()

        def read(token: int) -> bytes:
            name = self.tokenizer.id_to_token(token)
            if name is None or token in self.hidden_tokens:
                return b""
            if token in added:
                return name.encode()
            if is_byte_level:
                return bytes(BYTE_OF[character] for character in name)
            if BYTE_TOKEN.fullmatch(name):
                return bytes.fromhex(name[3:5])
            return name.replace(SPACE, " ").encode()

        return tuple(read(token) for token in range(self.vocab_size))


class TextStream:
    """The text of an answer, token by token: the pieces join to what decoding everything at once gives.

    A piece never ends within a character. Tokens that are single bytes (`<0xE4>`, in SentencePiece vocabularies) wait
    for the first token that is none, because an invalid byte makes the whole run of them unreadable.

    Args:
        tokenizer: of the checkpoint.
        prompt: the tokens before the answer. They decide whether it begins with a space.
        special_tokens: keep special tokens in the text.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int] = (), *, special_tokens: bool = False):
        self._tokenizer, self._special_tokens = tokenizer.tokenizer, special_tokens
        self._hidden = frozenset() if special_tokens else tokenizer.hidden_tokens
        self._window: list[int] = []  # tokens whose text still matters
        self._num_open = 0  # of them, the single bytes at the end
        self._num_out = 0  # characters of their text that were given out
        self._append(self._tail(prompt))
        text = self._decode(self._window)
        self._num_out = len(text.rstrip(UNFINISHED))

    def push(self, tokens: Iterable[int]) -> str:
        """The text that is certain now and was not before.

        Args:
            tokens: the next token ids.
        """
        before = len(self._window) - self._num_open
        self._append(tokens)
        num_closed = len(self._window) - self._num_open
        if num_closed == before:
            return ""
        text = self._decode(self._window[:num_closed])
        num_certain = len(text) - text.endswith(UNFINISHED)
        piece = text[self._num_out : num_certain]
        self._num_out = max(self._num_out, num_certain)
        self._forget(num_closed, len(text) - self._num_out)
        return piece

    def finish(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD. The stream is empty after it."""
        piece = self._decode(self._window)[self._num_out :]
        self._window, self._num_open, self._num_out = [], 0, 0
        return piece

    def _append(self, tokens: Iterable[int]) -> None:
        for token in map(int, tokens):
            name = self._name(token)
            if name is None:
                continue
            self._window.append(token)
            self._num_open = self._num_open + 1 if BYTE_TOKEN.fullmatch(name) else 0

    def _forget(self, num_closed: int, num_held: int) -> None:
        """Drops the tokens that no longer decide about the text of those to come."""
        if num_closed <= 2 * CONTEXT:
            return
        context = self._window[num_closed - CONTEXT : num_closed]
        text = self._decode(context)
        if len(text) > num_held:
            self._window = self._window[num_closed - CONTEXT :]
            self._num_out = len(text) - num_held

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, so many that what stands before them does not matter."""
        start, num_seen = len(prompt), 0
        while start and num_seen < 2 * CONTEXT:
            start -= 1
            name = self._name(int(prompt[start]))
            num_seen += name is not None and not BYTE_TOKEN.fullmatch(name)
        return list(prompt[start:])

    def _name(self, token: int) -> str | None:
        """The vocabulary's name of a token; None for the tokens that a text does not show."""
        return None if token in self._hidden else self._tokenizer.id_to_token(token)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not self._special_tokens)
