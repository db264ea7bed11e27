"""Text to token ids and back, from a checkpoint's tokenizer.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The tokenizer of a checkpoint."""

    tokenizer: tokenizers.Tokenizer

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
            return cls(tokenizers.Tokenizer.from_file(str(path)))
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

    def decode(self, tokens: Sequence[int], *, special_tokens: bool = False) -> str:
        """The text of token ids.

        Args:
            tokens: token ids.
            special_tokens: keep special tokens in the text.
        """
        return self.tokenizer.decode(list(map(int, tokens)), skip_special_tokens=not special_tokens)
