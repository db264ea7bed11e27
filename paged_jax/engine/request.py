"""What is asked of the engine, and what comes back."""

import collections
import dataclasses
import operator
import time
from collections.abc import Iterable, Sequence

from paged_jax.engine.output import Output
from paged_jax.sampling import BeamParams, SamplingParams

WAITING = -1  # the row of a sample that has none


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The next tokens of one sample, and their text, as `Engine.stream` gives them.

    Args:
        request: its number.
        sample: of the request.
        tokens: new token ids; often several, and none where only the end or held-back text comes.
        text: what is certain to be part of the text now; empty without a tokenizer.
        logprobs: of these tokens, the model's own.
        top_logprobs: for each token the most likely ones in its place, as pairs of token id and log-probability.
        finish_reason: None while more will come, then "stop", "length" or "error".
        error: what went wrong, where the reason is "error".
        score: of the sequence, where a beam search found it: its log-probability / length ** length_penalty.
    """

    request: int
    sample: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished sample, as `Engine.generate` returns it.

    Args:
        tokens: all token ids that were drawn, the stop token included.
        text: the text of these tokens, without the stop string that ended it; empty without a tokenizer.
        logprobs: of each token, the model's own; of drawn tokens none with `num_logprobs=None`.
        top_logprobs: for each token the most likely ones in its place, as pairs of token id and log-probability.
        finish_reason: "stop", "length", "error", or "abort" where the request was aborted.
        error: what went wrong, where the reason is "error".
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: str
    error: str | None = None
    score: float | None = None  # of a sequence that a beam search found

    @classmethod
    def join(cls, pieces: Iterable[Piece]) -> "Completion":
        """From the pieces of one sample, in their order."""
        pieces = list(pieces)
        return cls(
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            text="".join(piece.text for piece in pieces),
            logprobs=tuple(value for piece in pieces for value in piece.logprobs),
            top_logprobs=tuple(top for piece in pieces for top in piece.top_logprobs),
            finish_reason=(pieces[-1].finish_reason if pieces else None) or "abort",
            error=pieces[-1].error if pieces else None,
            score=pieces[-1].score if pieces else None,
        )


@dataclasses.dataclass(eq=False)
class Sample:
    """One continuation of a request's prompt, waiting or in a row; or all beams of a search, in a group of rows.

    `drawn` are the tokens that were handed out. With them, the prompt and the parameters, the sample can be started
    again at any time, because draws depend only on seed, sample number and position.
    """

    request: "Request"
    number: int
    order: int  # among all samples: first come, first served
    output: Output
    num_rows: int = 1  # those of a search stand side by side, in a group of the batch
    drawn: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of these
    held: dict[int, Piece] = dataclasses.field(default_factory=dict)  # until all have ended: pieces by their first
    # token, or the sequences of a search, the best first
    num_told: int = 0  # of these tokens, how many `output` has seen
    finish_reason: str | None = None
    was_admitted: bool = False
    stop_at: int = 0  # tokens after which it leaves its row once, so that others find them; 0: it just goes on
    # While it is in a row, as the host last read:
    row: int = WAITING
    num_cached: int = 0  # tokens whose pages the row holds
    steps_ahead: int = 0  # steps on their way whose tokens were not read yet

    @property
    def rank(self) -> tuple[int, int]:
        """The lowest is served first."""
        return self.request.priority, self.order

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_known(self) -> int:
        """Tokens of the prompt and drawn ones."""
        return len(self.request.prompt) + len(self.drawn)

    @property
    def width(self) -> int:
        """Beams of a search; 1 for a sample that is drawn."""
        return 1 if self.request.beams is None else self.request.beams.width

    def rows_from(self, first: int) -> range:
        """Its rows, if this is the first of them."""
        return range(first, first + self.num_rows)

    @property
    def longest(self) -> int:
        """The most tokens that it will cache: all but the last one drawn."""
        return self.num_prompt + self.request.params.max_new_tokens - 1

    @property
    def tokens(self) -> list[int]:
        """Prompt and drawn tokens."""
        return [*self.request.prompt, *self.drawn]


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, what is wanted of it, and the pieces that nobody has taken yet.

    Args:
        number: which request.
        prompt: token ids.
        params: how they are continued.
        priority: requests with a lower number are served first.
        salt: only requests with the same salt find its pages.
        adapter: only requests with the same adapter find its pages.
        best_of: draw this many samples and hand out the best; None: hand out all, as they come.
        beams: a search with these parameters, instead of drawn samples.
        echo: the text that comes before that of the samples.
        pieces: where its pieces go.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    salt: str = ""
    adapter: str = ""
    best_of: int | None = None
    beams: BeamParams | None = None
    echo: str = ""
    pieces: collections.deque[Piece] = dataclasses.field(default_factory=collections.deque)
    samples: Sequence[Sample] = ()
    is_aborted: bool = False
    seconds: float = dataclasses.field(default_factory=time.monotonic)  # when it came

    @property
    def num_wanted(self) -> int:
        """Samples that are handed out."""
        return self.params.num_samples

    @property
    def num_drawn(self) -> int:
        """Samples that are drawn; one for all beams."""
        return 1 if self.beams is not None else self.best_of or self.params.num_samples

    @property
    def is_held(self) -> bool:
        """Whether it is known only at the end what is handed out."""
        return self.best_of is not None or self.beams is not None

    def chosen(self) -> list[Piece]:
        """The pieces of the best samples or beams as one piece each, the best as sample 0, once all have ended."""
        if not self.is_finished:
            return []
        if self.beams is not None:
            return [piece for sample in self.samples for piece in sample.held.values()]
        means = [(sum(s.logprobs) / max(1, len(s.logprobs)), -s.number, s) for s in self.samples]
        best = [sample for *_, sample in sorted(means, key=operator.itemgetter(0, 1), reverse=True)]
        joined = [Completion.join(sample.held.values()) for sample in best[: self.num_wanted]]
        return [Piece(self.number, rank, **vars(completion)) for rank, completion in enumerate(joined)]

    @property
    def is_finished(self) -> bool:
        """No piece will come but those in `pieces`."""
        return self.is_aborted or all(sample.finish_reason is not None for sample in self.samples)
