"""The text of one sample, while its tokens come, and where it ends."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from paged_jax.engine.stop_strings import StopStrings
from paged_jax.sampling import SamplingParams


@runtime_checkable
class TextStream(Protocol):
    """Text from tokens that come one by one; see `paged_jax.models.tokenizer.TextStream`."""

    def push(self, tokens: Sequence[int], /) -> str:
        """The text that is certain now and was not before."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What the engine asks of a tokenizer; `paged_jax.models.Tokenizer` is one."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        ...

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Text from the tokens of an answer."""
        ...

    hidden_tokens: Any  # the ids of special tokens, which a text does not show


class Output:
    """Turns the tokens of a sample into pieces of text, none of which is ever taken back.

    A stop string ends the sample with the token that completes it, and is not part of the text. Text that may still
    become a stop string is held back. A stop string that is the name of a special token ends the sample at that token.

    Args:
        tokenizer: of the tokens; None: there is no text.
        prompt: the tokens before those of the sample.
        params: of the request, which say what the stop strings are.
        echo: the text to begin with, such as that of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], params: SamplingParams, echo: str = ""):
        self._stream = tokenizer.stream(prompt) if tokenizer is not None else None
        special = {} if tokenizer is None else _special_tokens(tokenizer, params.stop_strings)
        self._stop_tokens = frozenset(special.values())
        self._stops = StopStrings(string for string in params.stop_strings if string not in special)
        self._watches = bool(params.stop_strings)
        self._echo = echo

    def push(self, tokens: Sequence[int], is_last: bool = False) -> "Text":
        """The text of the next tokens.

        Args:
            tokens: what was drawn.
            is_last: no more will come, so nothing is held back.
        """
        if not tokens and not is_last:
            return Text("", 0, False)
        text, self._echo = self._echo, ""
        if self._stream is None:
            return Text(text, len(tokens), False)
        if not self._watches:
            text += self._stream.push(tokens) + (self._stream.finish() if is_last else "")
            return Text(text, len(tokens), False)
        for count, token in enumerate(tokens, 1):
            if token in self._stop_tokens:
                return Text(text + self._stops.push(self._stream.finish()) + self._stops.finish(), count, True)
            text += self._stops.push(self._stream.push([token]))
            if self._stops.found is not None:
                return Text(text, count, True)
        if is_last:
            text += self._stops.push(self._stream.finish())
            if self._stops.found is None:
                text += self._stops.finish()
        return Text(text, len(tokens), self._stops.found is not None)


class Text(NamedTuple):
    """What `Output.push` made of some tokens."""

    text: str  # that is certain now
    num_tokens: int  # of the sample: those up to the end of a stop string
    is_stopped: bool  # by a stop string


def _special_tokens(tokenizer: Tokenizer, strings: Sequence[str]) -> dict[str, int]:
    """Those of the strings that are the names of special tokens, which no text shows."""
    encoded = {string: tokenizer.encode(string, special_tokens=False) for string in strings}
    hidden = tokenizer.hidden_tokens
    return {string: ids[0] for string, ids in encoded.items() if len(ids) == 1 and ids[0] in hidden}
