"""What is static about a step: the decoder, the sizes of its passes, and how rows are planned, drafted and drawn."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int32

from paged_jax.decoding.draft import MOST_DRAFTS, Drafter
from paged_jax.decoding.plan import Plan, first_come_first_served
from paged_jax.forward import Forward
from paged_jax.sampling import Processor

TOKEN_COUNTS = (8, 16, 32, 64, 256)
# Few tokens of each row take less of a kernel, and less of the compiler: on a CPU, a pass that can prefill compiles for
# nearly twice as long as one that cannot.
SHORT = 8


@dataclasses.dataclass(frozen=True)
class Stepper:
    """A decoder, and everything else about a step that is static. Hashable, so it may be a static argument.

    Args:
        forward: the decoder.
        token_counts: the sizes T of the forward passes that are compiled, in ascending order; `token_counts_for` gives
            some. A step in which no row computes more than `SHORT` tokens runs the smallest pass that holds what it
            computes. Any other step, such as one that prefills, runs the smallest that holds it among the
            `prefill_passes` largest. The largest is the budget of a step, and must hold a token of every row.
        plan: a function that says how many tokens each row computes; see `first_come_first_served`.
        drafter: proposes tokens that a step verifies, such as `Lookup`; it changes the speed, never what is drawn.
            Drafts fill the largest pass that cannot prefill, or the smallest, if all can.
        processor: changes the logits of every row before they are drawn from; see `paged_jax.sampling.Processor`.
        num_logprobs: for how many of the most likely tokens the log-probabilities are kept, beside that of the drawn
            token; None computes none at all.
        sharing: whether attention reads pages that rows share once for all of them (`find_sharing`). It changes the
            speed, and how sums round. None: on a CPU, in passes of many rows that cannot prefill.
        processed_logprobs: whether log-probabilities are those after all processors and the temperature, instead of the
            model's own.
        prefill_passes: how many of the largest passes can prefill; give `token_counts_for` the same number. With more
            of them a short prompt is answered sooner, since it runs a smaller pass, where every token of a pass costs
            time, as on a CPU. Each takes longer to compile than a pass that cannot prefill.

    Raises:
        ValueError: `forward` is no function, the token counts do not ascend, `prefill_passes` is not from 1 to their
            number, `num_logprobs` is negative, or the drafter or processor is none.

    Examples:
        Steps of a batch of 16 rows compute at most 64 tokens, in passes of three sizes:

        >>> stepper = Stepper(forward, token_counts=token_counts_for(num_rows=16, budget=64))
        >>> stepper.token_counts
        (8, 16, 64)
    """

    forward: Forward
    token_counts: tuple[int, ...] = TOKEN_COUNTS
    plan: Plan = first_come_first_served
    drafter: Drafter | None = None
    processor: Processor | None = None
    num_logprobs: int | None = 0
    processed_logprobs: bool = False
    sharing: bool | None = None
    prefill_passes: int = 1

    def __post_init__(self):
        if not callable(self.forward):
            advice = "pass its `forward`" if hasattr(self.forward, "forward") else "see paged_jax.Forward"
            raise ValueError(
                f"forward must be a function (params, tokens, pool, metadata) -> (logits, pool), got a "
                f"{type(self.forward).__name__}: {advice}"
            )
        counts = tuple(self.token_counts) if isinstance(self.token_counts, Iterable) else ()
        if not counts or any(count < 1 for count in counts) or list(counts) != sorted(set(counts)):
            raise ValueError(
                "token_counts must be a tuple of numbers of at least 1 in ascending order, such as (8, 64), got "
                f"{self.token_counts}"
            )
        object.__setattr__(self, "token_counts", counts)  # a list is not hashable
        passes = self.prefill_passes
        if not isinstance(passes, int) or isinstance(passes, bool) or not 1 <= passes <= len(counts):
            raise ValueError(f"prefill_passes={passes!r} of token_counts={counts}: it must be from 1 to {len(counts)}")
        if self.num_logprobs is not None and self.num_logprobs < 0:
            raise ValueError(f"num_logprobs must be None or at least 0, got {self.num_logprobs}")
        if isinstance(self.processor, type):
            raise ValueError(f"processor={self.processor.__name__} is a class: pass an object of it")
        if isinstance(self.drafter, type) or not (self.drafter is None or isinstance(self.drafter, Drafter)):
            raise ValueError(f"drafter={self.drafter!r} is no drafter: give one, such as Lookup()")
        if self.drafter is not None and not (isinstance(self.num_drafts, int) and 1 <= self.num_drafts <= MOST_DRAFTS):
            raise ValueError(f"num_drafts of the drafter must be from 1 to {MOST_DRAFTS}, got {self.num_drafts!r}")

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Kept, since every call of a compiled program asks for it, and a decoder's takes up to milliseconds."""
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash, which is another in each process."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def num_drafts(self) -> int:
        """D, the most drafts of a row in a step."""
        return 0 if self.drafter is None else self.drafter.num_drafts

    def verifies(self, num_tokens: int) -> bool:
        """Whether the pass of this many tokens may have drafts in it."""
        return self.drafter is not None and num_tokens <= self.most_verified

    @property
    def most_verified(self) -> int:
        """The tokens of the largest pass that may have drafts in it: one that cannot prefill, or else the smallest."""
        return self.token_counts[max(self._first_prefill - 1, 0)]

    def prefills(self, num_tokens: int) -> bool:
        """Whether rows of the pass of this many tokens may compute more than `SHORT` of them."""
        return num_tokens >= self.token_counts[self._first_prefill]

    @property
    def _first_prefill(self) -> int:
        return len(self.token_counts) - self.prefill_passes

    def choose_pass(self, counts: Int32[Array, " B"]) -> Int32[Array, ""]:
        """The index in `token_counts` of the pass for a step in which the rows compute so many tokens."""
        sizes = jnp.array(self.token_counts, jnp.int32)
        smallest = jnp.sum(sizes < jnp.sum(counts, dtype=jnp.int32), dtype=jnp.int32)
        first = jnp.where(jnp.max(counts) <= SHORT, 0, self._first_prefill)
        return jnp.maximum(smallest, first).astype(jnp.int32)

    def check_rows(self, num_rows: int) -> None:
        """Refuse token counts that are too small for a batch; raises ValueError."""
        counts = self.token_counts
        if counts[-1] < num_rows:
            raise ValueError(
                f"token_counts={counts} for a batch of {num_rows} rows: the largest must hold one token of each"
            )
        if self.drafter is not None and self.most_verified <= num_rows:
            raise ValueError(
                f"token_counts={counts} for a batch of {num_rows} rows with drafts: the largest that may have drafts, "
                f"{self.most_verified}, must hold more than one token of each; token_counts_for({num_rows}, "
                f"num_drafts={self.num_drafts}) gives some that do, with prefill_passes=1"
            )


def token_counts_for(
    num_rows: int, budget: int = TOKEN_COUNTS[-1], *, num_drafts: int = 0, prefill_passes: int = 1
) -> tuple[int, ...]:
    """Token counts for a `Stepper`: a few sizes of a step that are worth compiling.

    They are for a few rows that decode, for all of them, and for a step that prefills; with drafts, also for all rows
    and half of their drafts. Compiling a pass takes as long as compiling a small decoder, so there are not many.

    Args:
        num_rows: B, rows of the batch.
        budget: the most tokens that a step computes; at least B.
        num_drafts: D, the most drafts of a row.
        prefill_passes: how many sizes there are for steps that prefill: the budget, half of it, and so on. The
            `Stepper` must be given the same number.

    Raises:
        ValueError: the budget, or the least of its parts, does not hold one token of each row, with half of its drafts.

    Examples:
        >>> token_counts_for(64), token_counts_for(64, num_drafts=4), token_counts_for(8, prefill_passes=3)
        ((8, 32, 64, 256), (8, 32, 64, 192, 256), (8, 64, 128, 256))
    """
    if budget < num_rows:
        raise ValueError(f"a budget of {budget} tokens a step does not hold one of each of {num_rows} rows: raise it")
    if num_drafts < 0:
        raise ValueError(f"num_drafts={num_drafts} must be at least 0")
    if not isinstance(prefill_passes, int) or prefill_passes < 1:
        raise ValueError(f"prefill_passes={prefill_passes!r} must be an integer of at least 1")
    few = [count for count in (8, 32, 128, 512) if 2 * count <= num_rows]
    drafting = num_rows + -(-num_rows * num_drafts // 2)
    if num_drafts and drafting >= budget:
        raise ValueError(
            f"a budget of {budget} tokens a step is too small for {num_rows} rows with {num_drafts} drafts each: raise "
            f"it to {2 * drafting}"
        )
    drafts = {max(drafting, 16)} if num_drafts else set()
    decoding = {*few, *drafts, min(max(num_rows, 8), budget)}
    halves = {budget >> i for i in range(1, prefill_passes)}
    if halves and min(halves) <= max(decoding):
        raise ValueError(
            f"prefill_passes={prefill_passes} halve a budget of {budget} tokens down to {min(halves)}, but steps that "
            f"do not prefill take up to {max(decoding)}: lower prefill_passes, or raise the budget to "
            f"{(max(decoding) + 1) << (prefill_passes - 1)} (of an Engine, by token_counts)"
        )
    return tuple(sorted({*decoding, *halves, budget}))
