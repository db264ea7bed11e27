"""What the rows of a batch know: their tokens, of which the page tables cache the first ones."""

import dataclasses
from enum import IntEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.mesh import everywhere
from paged_jax.cache.page_tables import PageTables
from paged_jax.sampling import SamplingState

NO_ROW = -1
NO_TOKEN = -1
FIRST_TRUST = 2.0  # drafts that a row asks for when it starts


class Finish(IntEnum):
    """Why a row stopped; UNFINISHED rows go on.

    Examples:
        >>> [Finish(number).name for number in (1, 2, 3)]  # as in `Rollout.finish`
        ['STOP_TOKEN', 'MAX_TOKENS', 'TOO_LONG']
    """

    UNFINISHED = 0
    STOP_TOKEN = 1
    MAX_TOKENS = 2
    TOO_LONG = 3  # it could never fit: its prompt and one more token need more pages than a row or the pool has


def prompt_arrays(
    tokens: Any, counts: Any, names: tuple[str, str] = ("prompts", "prompt_lens")
) -> tuple[Int32[Array, "n C"], Int32[Array, " n"]]:
    """Token ids and how many of them each line has, as JAX's arrays, also where NumPy's were given.

    Raises:
        ValueError: they are no whole numbers, or of other shapes.
    """
    tokens, counts = jnp.asarray(tokens), jnp.asarray(counts)
    is_whole = all(jnp.issubdtype(x.dtype, jnp.integer) for x in (tokens, counts))
    if not is_whole or tokens.ndim != 2 or counts.shape != tokens.shape[:1]:
        given = [f"{name} of {x.dtype}{list(x.shape)}" for name, x in zip(names, (tokens, counts), strict=True)]
        raise ValueError(
            f"got {given[0]} and {given[1]}: give token ids, a line for each of the {names[0]}, padded at its end to "
            "the longest, and as many numbers that say how many tokens each line has"
        )
    return tokens.astype(jnp.int32), counts.astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B sequences in flight. Row b knows `num_known[b]` tokens, of which the page tables cache `lengths[b]`.

    A step computes tokens that a row knows and that are not cached yet. When all of them are cached, the row draws its
    next token, or several if it has drafts. So a row that prefills is far behind, one that decodes is one token behind,
    and one that gave up its pages is far behind again. Between `ask` and `commit`, drafts stand in `tokens` after what
    a row knows, and the tables count those that are computed.
    """

    tokens: Int32[Array, "B C"]  # the prompt, then what was drawn
    logprobs: Float[Array, "B C"]  # of the drawn tokens, each at its token's place
    top_tokens: Int32[Array, "B C k"]  # the most likely tokens at the place of each drawn one; k is often 0
    top_logprobs: Float[Array, "B C k"]
    num_prompt: Int32[Array, " B"]
    num_known: Int32[Array, " B"]
    limit: Int32[Array, " B"]  # the number of known tokens at which the row ends
    age: Int32[Array, " B"]  # the lowest is the oldest and is served first; distinct among active rows
    active: Bool[Array, " B"]
    keeps: Bool[Array, " B"]  # when it ends, its pages stay until somebody needs them
    source: Int32[Array, " B"]  # the row that computes this row's prompt, and is forked then; NO_ROW: it does so itself
    finish: Int32[Array, " B"]  # of Finish
    hints: Int32[Array, "B hints"]  # texts that it may repeat, NO_TOKEN between and after them; often of no tokens
    trust: Float[Array, " B"]  # how many drafts the row asks for
    sampling: SamplingState

    @classmethod
    def create(
        cls, num_rows: int, capacity: int, sampling: SamplingState, num_logprobs: int = 0, num_hints: int = 0
    ) -> "Rows":
        """Empty rows.

        Args:
            num_rows: B.
            capacity: C, tokens that a row can know.
            sampling: of these rows.
            num_logprobs: k, the most likely tokens that a row keeps beside each drawn one.
            num_hints: tokens of the texts that a row may repeat.
        """

        def zeros(*shape: int, dtype=jnp.int32) -> Array:  # distinct buffers: each is donated
            return jnp.zeros(shape, dtype)

        return cls(
            tokens=zeros(num_rows, capacity),
            logprobs=zeros(num_rows, capacity, dtype=jnp.float32),
            top_tokens=zeros(num_rows, capacity, num_logprobs),
            top_logprobs=zeros(num_rows, capacity, num_logprobs, dtype=jnp.float32),
            num_prompt=zeros(num_rows),
            num_known=zeros(num_rows),
            limit=zeros(num_rows),
            age=zeros(num_rows),
            active=zeros(num_rows, dtype=jnp.bool_),
            keeps=zeros(num_rows, dtype=jnp.bool_),
            source=zeros(num_rows) + NO_ROW,
            finish=zeros(num_rows),
            hints=zeros(num_rows, num_hints) + NO_TOKEN,
            trust=zeros(num_rows, dtype=jnp.float32) + FIRST_TRUST,
            sampling=sampling,
        )

    def where(self, mask: Bool[Array, " B"], others: "Rows") -> "Rows":
        """These rows where the mask holds, others elsewhere."""
        return jax.tree.map(lambda a, b: jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - 1)), a, b), self, others)


class Counters(NamedTuple):
    """What the steps so far did."""

    steps: Int32[Array, " X"]  # of each token count
    computed_tokens: Int32[Array, ""]
    drawn_tokens: Int32[Array, ""]
    preemptions: Int32[Array, ""]  # times that a row gave up its pages
    recomputed_tokens: Int32[Array, ""]  # cached tokens that were given up so
    drafted_tokens: Int32[Array, ""]  # drafts that were computed
    accepted_tokens: Int32[Array, ""]  # those of them that were drawn

    @classmethod
    def create(cls, num_token_counts: int) -> "Counters":
        zero = [jnp.zeros((), jnp.int32) for _ in cls._fields[1:]]
        return cls(jnp.zeros(num_token_counts, jnp.int32), *zero)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch in flight. The cache owns the memory: donate the state, and nothing is copied."""

    cache: KVCache
    rows: Rows
    counters: Counters
    drafter: Any = None  # the state of the stepper's drafter
    groups: Any = None  # of rows that hold the beams of a prompt, see `paged_jax.decoding.groups`; None: there are none

    @classmethod
    def create(
        cls,
        config: CacheConfig,
        capacity: int,
        token_counts: tuple[int, ...],
        sampling: SamplingState | None = None,
        mesh: Mesh | None = None,
        num_logprobs: int = 0,
        drafter: Any = None,
        groups: Any = None,
    ) -> "DecodeState":
        """An empty batch.

        Args:
            config: sizes of the cache; `config.max_sequences` rows.
            capacity: C, tokens that a row can know, its last one, which is never cached, included.
            token_counts: those of the steps; see `Stepper`.
            sampling: that of all rows, whose sizes are those of the rows to come; None: greedy.
            mesh: splits the pool as in `PagePool.create`; each device holds all else.
            num_logprobs: that of the steps; see `Stepper`.
            drafter: the state of the stepper's drafter, if it has one.
            groups: of beams, if there are any.
        """
        num_rows = config.max_sequences
        rows = Rows.create(num_rows, capacity, sampling or SamplingState.create(num_rows), num_logprobs)
        return cls(KVCache.create(config, mesh), rows, Counters.create(len(token_counts)), drafter, groups).settle()

    @property
    def behind(self) -> Int32[Array, " B"]:
        """Known tokens that are not cached; 0 for rows that are not active or wait for another row's prompt."""
        takes_part = self.rows.active & (self.rows.source == NO_ROW)
        return jnp.where(takes_part, self.rows.num_known - self.cache.tables.lengths, 0)

    @property
    def longest_row(self) -> int:
        """The most tokens that a row can cache when it has the whole pool for itself."""
        tables = self.cache.tables
        pairs = zip(tables.groups, tables.layout, strict=True)
        usable = [(table.num_pages - 1) * table.page_size for table, group in pairs if group.window is None]
        return min([tables.max_length, *usable])

    def with_tables(self, tables: PageTables, **changes: Any) -> "DecodeState":
        """The same batch with other page tables, and perhaps other changes."""
        return dataclasses.replace(self, cache=KVCache(tables, self.cache.pool), **changes)

    def settle(self) -> "DecodeState":
        """All but the pool and the drafter on every device of the pool's mesh, whatever the decoder split."""
        pool = self.cache.pool
        parts = self.cache.tables, self.rows, self.counters, self.groups
        tables, rows, counters, groups = everywhere(parts, pool)
        return DecodeState(KVCache(tables, pool), rows, counters, self.drafter, groups)
