"""Text and conversations to token ids and back, from a checkpoint's tokenizer.json."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from paged_jax.models.chat_template import ChatTemplate


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        tokenizer: what tokenizer.json holds.
        folder: where it came from, and where a chat template is looked for.
    """

    tokenizer: tokenizers.Tokenizer
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json.

        Args:
            folder: the checkpoint folder.

        Raises:
            ValueError: the file is missing or not readable.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise ValueError(
                f"{path} does not exist: text needs a tokenizer. Copy tokenizer.json into the checkpoint folder."
            )
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), Path(folder))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a readable tokenizer ({error}). Download it again.") from error

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

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation, for a model that was trained to answer.

        Special tokens that stand in a message count as such, as they do in transformers: take them out of texts that
        you do not trust.

        Args:
            messages: what was said, such as `{"role": "user", "content": "Hello"}`.
            add_generation_prompt: end with the beginning of the model's next message.
            variables: other names that the chat template reads, such as `tools`.

        Raises:
            ValueError: there is no chat template, or it refuses the conversation.
        """
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, special_tokens=False)  # the template wrote them

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The template beside the tokenizer.

        Raises:
            ValueError: there is none.
        """
        return ChatTemplate.load(self.folder)

    def decode(self, tokens: Sequence[int], *, special_tokens: bool = False) -> str:
        """The text of token ids.

        Args:
            tokens: token ids.
            special_tokens: keep special tokens in the text.
        """
        return self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=not special_tokens)
