"""What a user asks for: how the tokens of one request are chosen, and when they end."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


class _Checked:
    """Rules that say, in one sentence, which field has which value and what it must be."""

    def _wrong(self, name: str, rule: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}({name}={getattr(self, name)!r}): {name} must be {rule}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a frozen dataclass is still being made

    def _whole(self, name: str, low: int, high: int, rule: str) -> None:
        value = getattr(self, name)
        if not _is_whole(value):
            self._wrong(name, f"a whole number, {rule}")
        if not low <= value <= high:
            self._wrong(name, rule if value < low or high != MAX_INT32 else f"below 2**31, and {rule}")
        self._set(name, int(value))

    def _real(self, name: str, low: float, high: float, rule: str, open_low: bool = False) -> None:
        value = getattr(self, name)
        if not _is_real(value):
            self._wrong(name, f"a number, {rule}")
        if not low <= value <= high or (open_low and value == low):  # false for NaN, too
            self._wrong(name, rule)
        self._set(name, float(value))

    def _tokens(self, name: str) -> None:
        value = getattr(self, name)
        if _is_whole(value):
            self._wrong(name, f"a sequence of token ids: write ({value},) for this one token")
        if isinstance(value, str | bytes):
            self._wrong(name, "a sequence of token ids, not text: encode it, or use stop_strings")
        if not isinstance(value, Iterable):
            self._wrong(name, "a sequence of token ids")
        tokens = tuple(value)
        self._set(name, tokens)  # what the message shows, also where a generator was given
        if not all(_is_token(token) for token in tokens):
            self._wrong(name, "token ids: whole numbers, at least 0 and below 2**31")
        self._set(name, tuple(dict.fromkeys(int(token) for token in tokens)))


@dataclasses.dataclass(frozen=True)
class SamplingParams(_Checked):
    """How the tokens of one request are chosen and when they end; hashable, and checked when it is made.

    The order in which the fields act on the logits is that of `paged_jax.sampling.draw`.

    Args:
        max_new_tokens: most tokens a sample may have, its stop token included.
        min_new_tokens: stop tokens cannot be drawn before a sample has this many tokens.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: then keep the smallest set of most likely tokens whose probability reaches p (nucleus sampling,
            Holtzman et al. 2020); 1 keeps all.
        min_p: then keep the tokens that are at least this fraction as likely as the most likely one
            (Nguyen et al. 2024); 0 keeps all.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of every token that the
            prompt or the sample holds (CTRL, Keskar et al. 2019); 1 changes nothing.
        presence_penalty: subtracted from the logit of every token that the sample holds.
        frequency_penalty: subtracted from the logit of a token once for each time that the sample holds it.
        logit_bias: added to the logits of some tokens: a mapping from token to bias, or pairs of the two. It is
            stored as a tuple of pairs in the order of the tokens.
        forbidden_tokens: are never drawn. They may include stop tokens, which then end nothing.
        stop_tokens: a sample ends with the first of these.
        stop_strings: a sample ends with the token that completes the first of these. A single string will do, too.
        seed: sample i of a request draws from the random stream (seed, i), whatever runs beside it. So equal prompts
            with equal seeds draw equal samples: for others give each request a seed of its own, or ask for several
            samples (`num_samples`).
        num_samples: continuations of the prompt; they share the prompt's pages.

    Raises:
        ValueError: a field has a value that it cannot have; the message names the field, the value and the rule.

    Examples:
        >>> SamplingParams(temperature=0.7, top_p=0.9, stop_strings="end").stop_strings
        ('end',)
        >>> SamplingParams(temperature=-1)
        Traceback (most recent call last):
            ...
        ValueError: SamplingParams(temperature=-1): temperature must be finite and at least 0; 0 means greedy
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()  # this and the next three end up as tuples
    forbidden_tokens: Sequence[int] = ()
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    seed: int = 0
    num_samples: int = 1

    def __post_init__(self):
        self._whole("max_new_tokens", 1, MAX_INT32, "at least 1")
        self._whole("min_new_tokens", 0, MAX_INT32, "at least 0; 0 lets the first token be a stop token")
        self._whole("top_k", 0, MAX_INT32, "at least 0; 0 keeps every token")
        self._whole("seed", 0, 2**32 - 1, "in [0, 2**32)")
        self._whole("num_samples", 1, MAX_INT32, "at least 1")
        self._real("temperature", 0.0, MAX_FLOAT32, "finite and at least 0; 0 means greedy")
        self._real("top_p", 0.0, 1.0, "in (0, 1]; 1 keeps every token", open_low=True)
        self._real("min_p", 0.0, 1.0, "in [0, 1]; 0 keeps every token")
        self._real("repetition_penalty", 0.01, 100.0, "in [0.01, 100]; 1 changes nothing")
        self._real("presence_penalty", -2.0, 2.0, "in [-2, 2]; 0 changes nothing")
        self._real("frequency_penalty", -2.0, 2.0, "in [-2, 2]; 0 changes nothing")
        self._tokens("stop_tokens")
        self._tokens("forbidden_tokens")
        self._strings("stop_strings")
        self._bias("logit_bias")
        if self.min_new_tokens > self.max_new_tokens:
            self._wrong("min_new_tokens", f"at most max_new_tokens={self.max_new_tokens}: lower it or raise the other")

    def check(self, vocab_size: int) -> None:
        """Check the token ids against a vocabulary.

        Args:
            vocab_size: number of token ids (V).

        Raises:
            ValueError: a token id is not in the vocabulary, or no token may be drawn.
        """
        for name in ("stop_tokens", "forbidden_tokens", "logit_bias"):
            given = getattr(self, name)
            outside = [token for token in (dict(given) if name == "logit_bias" else given) if token >= vocab_size]
            if outside:
                self._wrong(name, f"tokens of the vocabulary, below {vocab_size}: leave out {outside}")
        withheld = {*self.forbidden_tokens, *(self.stop_tokens if self.min_new_tokens else ())}
        if len(withheld) == vocab_size:
            stops = f", and stop_tokens before min_new_tokens={self.min_new_tokens}," if self.min_new_tokens else ""
            raise ValueError(
                f"forbidden_tokens{stops} rule out all {vocab_size} tokens of the vocabulary: leave one to draw"
            )

    # ---- the rules -------------------------------------------------------------------------------------------

    def _strings(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str | Iterable) or isinstance(value, bytes):
            self._wrong(name, "a string or a sequence of strings")
        strings = (value,) if isinstance(value, str) else tuple(value)
        self._set(name, strings)
        if not all(isinstance(string, str) and string for string in strings):
            self._wrong(name, "non-empty strings")

    def _bias(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, Mapping | Iterable) or isinstance(value, str | bytes):
            self._wrong(name, "a mapping from tokens to biases, such as {5: -1.0}, or pairs of the two")
        pairs = tuple(value.items()) if isinstance(value, Mapping) else tuple(value)
        self._set(name, pairs)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 and _is_token(pair[0]) for pair in pairs):
            self._wrong(name, "pairs of a token id (a whole number, at least 0 and below 2**31) and a bias")
        if not all(_is_real(bias) and abs(bias) <= MAX_FLOAT32 for _, bias in pairs):
            self._wrong(name, "finite biases: name a token in forbidden_tokens to forbid it")
        biases = {int(token): float(bias) for token, bias in pairs}
        if len(biases) < len(pairs):
            self._wrong(name, "one bias for each token: add up those of a token that is named twice")
        both = sorted(biases.keys() & set(self.forbidden_tokens))
        if both:
            self._wrong(name, f"for tokens that may be drawn, but forbidden_tokens holds {both}: leave them out of one")
        self._set(name, tuple(sorted(biases.items())))


@dataclasses.dataclass(frozen=True)
class BeamParams(_Checked):
    """A beam search for one request: its likeliest sequences, the best first, instead of drawn samples.

    Args:
        width: beams: sequences that are followed at the same time.
        max_new_tokens: most tokens of a sequence, its stop token included.
        num_return: sequences that are handed out; None: `width`.
        length_penalty: the score of a sequence is its log-probability / length ** length_penalty.
        early_stopping: True, False or "never"; see `paged_jax.beam_search`.
        stop_tokens: a sequence ends with the first of these.

    Raises:
        ValueError: a field has a value that it cannot have; the message names the field, the value and the rule.

    Examples:
        >>> engine = Engine.from_pretrained(models.DEMO, max_sequences=8, max_length=64, token_counts=(8,), max_beams=4)
        >>> best, second = engine.generate("import os\\n", BeamParams(width=4, max_new_tokens=6, num_return=2))[0]
        >>> best.score > second.score
        True
    """

    width: int = 4
    max_new_tokens: int = 128
    num_return: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop_tokens: Sequence[int] = ()

    def __post_init__(self):
        self._whole("width", 1, MAX_INT32, "at least 1")
        self._whole("max_new_tokens", 1, MAX_INT32, "at least 1")
        self._real("length_penalty", -MAX_FLOAT32, MAX_FLOAT32, "finite")
        self._tokens("stop_tokens")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            self._wrong("early_stopping", 'True, False or "never"')
        if self.num_return is None:
            self._set("num_return", self.width)
        self._whole("num_return", 1, self.width, f"from 1 to width={self.width}")

    @property
    def sampling(self) -> SamplingParams:
        """What it has in common with samples."""
        return SamplingParams(
            self.max_new_tokens, stop_tokens=self.stop_tokens, num_samples=self.num_return or self.width
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_token(value: Any) -> bool:
    return _is_whole(value) and 0 <= int(value) <= MAX_INT32
