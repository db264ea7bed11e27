"""Constraints as data: which tokens may follow, read from arrays on the device."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

ROOT = 0
FREE = -1  # the state of a row that may draw anything
NO_BITMAP = -1
CHUNK = 1024  # edges that are written to a mask at once


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["first", "tokens", "targets", "bitmap", "bitmaps"],
    meta_fields=["vocab_size"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """A `Processor` that allows the tokens on the edges of a row's node, and follows the edge of the drawn one.

    All edges lie in one list, sorted by node and token (compressed sparse rows): node n has the edges `first[n]` to
    `first[n + 1] - 1`. A node with more than V / 32 edges, such as the root of a large trie, also has a bitmap of the
    vocabulary, which takes no more memory than its edges do. So the cost of a mask is one pass over the logits, and
    what grows with the number of allowed tokens.

    The state of a row is its node, or `FREE` where it may draw anything. So rows with and without a constraint run side
    by side, and beams take their nodes along.

    An automaton is a pytree: pass it to your jitted function as an argument, and make the `Stepper` in there. Then
    another automaton of the same sizes compiles nothing. Where a processor must be static, as in `Engine`, it is
    hashed by identity, and its arrays are constants of the program.

        trie = Automaton.of_sequences([[5, 6, 7], [5, 8]], end_token=2, vocab_size=32000)

        @jax.jit
        def sample(params, cache, trie, prompts, lengths):
            stepper = Stepper(forward, processor=trie)
            start = trie.start(len(prompts))
            return beam_search(stepper, params, prompts, lengths, cache, processor_state=start, stop_tokens=(2,), ...)

    Args:
        first: where the edges of each node begin.
        tokens: the token of each edge.
        targets: the node to which each edge leads.
        bitmap: the number of each node's bitmap, or NO_BITMAP.
        bitmaps: D bitmaps, at least one. Bit v % 32 of word v // 32 says whether token v is allowed.
        vocab_size: V; static.

    Examples:
        After token 5 comes 6 or 8, after 5 and 6 comes 7, and token 2 ends both.

        >>> trie = Automaton.of_sequences([[5, 6, 7], [5, 8]], end_token=2, vocab_size=9)
        >>> logits, known = jnp.zeros((1, 9)), jnp.zeros((1, 4), jnp.int32)
        >>> state = trie.advance(trie.start(1), drawn=jnp.array([5]), drew=jnp.array([True]))
        >>> masked = trie.process(state, logits, known, jnp.array([1]))
        >>> jnp.flatnonzero(masked[0] == 0).tolist()
        [6, 8]
    """

    first: Int32[Array, " N+1"]
    tokens: Int32[Array, " E"]
    targets: Int32[Array, " E"]
    bitmap: Int32[Array, " N"]
    bitmaps: UInt32[Array, "D V/32"]
    vocab_size: int

    @classmethod
    def of_sequences(
        cls, sequences: Iterable[Sequence[int]] | np.ndarray, end_token: int, vocab_size: int
    ) -> "Automaton":
        """The trie of some sequences: a row draws one of them, and then the end token.

        Where a sequence ends, the end token is allowed, and so are the next tokens of longer sequences. After the end
        token, nothing but the end token is allowed. So make it a stop token; a row that goes on draws it for ever.

        Built on the host: 100,000 sequences of 4 tokens take about a quarter of a second.

        Args:
            sequences: lists of at least one token each, or an array [n, length].
            end_token: the token that follows a sequence; none of the sequences may hold it.
            vocab_size: V.

        Raises:
            ValueError: there are no sequences, one is empty, or holds a token that it cannot hold.
        """
        table = _table(sequences, end_token, vocab_size)
        num, depth = table.shape
        # Neighbours in the sorted table share the nodes up to the first column in which they differ.
        differs = np.ones((num, depth), bool)
        differs[1:] = np.logical_or.accumulate(table[1:] != table[:-1], axis=1)
        is_edge = differs & (table != _PADDING)
        # Nodes are numbered depth by depth, and in each depth in the order of the table; the root is 0.
        start = 1 + np.concatenate([[0], np.cumsum(is_edge.sum(axis=0))])
        leads_to = np.cumsum(is_edge, axis=0) - 1 + start[:-1]
        comes_from = np.concatenate([np.zeros((num, 1), np.int64), leads_to[:, :-1]], axis=1)
        return cls._ended(comes_from[is_edge], table[is_edge], leads_to[is_edge], end_token, int(start[-1]), vocab_size)

    @classmethod
    def of_edges(cls, sources: np.ndarray, tokens: np.ndarray, targets: np.ndarray, vocab_size: int) -> "Automaton":
        """Any deterministic automaton, from its E edges in any order. Rows start at node 0.

        Raises:
            ValueError: a node has two edges with one token, or none though an edge leads to it; a token is not in the
                vocabulary.
        """
        sources, tokens, targets = (_whole_numbers(x, "edges") for x in (sources, tokens, targets))
        if not len(sources) or len({len(sources), len(tokens), len(targets)}) > 1:
            raise ValueError(
                f"{len(sources)} sources, {len(tokens)} tokens and {len(targets)} targets: an automaton needs edges, "
                "and each has one of each"
            )
        if sources.min() < 0 or targets.min() < 0:
            raise ValueError(f"an edge has node {min(sources.min(), targets.min())}: nodes are numbered from 0")
        order = np.lexsort((tokens, sources))
        sources, tokens, targets = (x[order] for x in (sources, tokens, targets))
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(
                f"an edge has token {tokens.max() if tokens.min() >= 0 else tokens.min()}: tokens must be in "
                f"[0, {vocab_size})"
            )
        same = np.flatnonzero((sources[1:] == sources[:-1]) & (tokens[1:] == tokens[:-1]))
        if len(same):
            raise ValueError(
                f"node {sources[same[0]]} has two edges with token {tokens[same[0]]}: a row could not tell which to "
                "follow, leave one"
            )
        num_nodes = 1 + int(max(sources.max(), targets.max()))
        degrees = np.bincount(sources, minlength=num_nodes)
        reached = np.append(targets, ROOT)
        stuck = np.flatnonzero(degrees[reached] == 0)
        if len(stuck):
            raise ValueError(
                f"node {reached[stuck[0]]} has no edge, so that no token could follow: give it one to itself, with a "
                "stop token"
            )
        bitmap, bitmaps = _bitmaps(sources, tokens, degrees, vocab_size)
        first = np.concatenate([[0], np.cumsum(degrees)])

        def array(x: np.ndarray) -> Array:
            return jnp.asarray(x.astype(np.int32))

        return cls(array(first), array(tokens), array(targets), array(bitmap), jnp.asarray(bitmaps), vocab_size)

    @classmethod
    def of_regex(cls, pattern: str, token_bytes: Sequence[bytes], end_token: int) -> "Automaton":
        """The texts that a regular expression matches as a whole, each followed by the end token.

        The library outlines-core (extra `constraints`) computes on the host which tokens of the vocabulary may follow
        in each state of the expression's automaton (Willard and Louf 2023, "Efficient guided generation").

            automaton = Automaton.of_regex(r"(yes|no)[.!]", model.tokenizer.token_bytes, end_token)

        Args:
            pattern: in the syntax of Rust's regex, which is nearly Python's.
            token_bytes: what each token adds to a text, [V]; empty for those that are never drawn.
            end_token: allowed where the text may end, and the only one after it.

        Raises:
            ImportError: outlines-core is not installed.
            ValueError: the pattern is no regular expression, or the tokens cannot write any text that matches.
        """
        outlines = _outlines()
        numbers: dict[bytes, list[int]] = {}
        for number, text in enumerate(token_bytes):
            if text and number != end_token:
                numbers.setdefault(text, []).append(number)
        try:
            index = outlines.Index(pattern, outlines.Vocabulary(end_token, numbers))
        except ValueError as error:
            raise ValueError(f"no automaton for the pattern {pattern[:80]!r}: {error}") from error
        edges = [
            (source, token, target) for source, out in index.get_transitions().items() for token, target in out.items()
        ]
        sources, tokens, targets = np.array(edges, np.int64).T
        # The library numbers states as it likes; here they are counted, the first as 0.
        states = np.unique(np.concatenate([sources, targets]))
        first = np.searchsorted(states, index.get_initial_state())
        number = np.arange(len(states))
        number[[0, first]] = number[[first, 0]]
        sources, targets = (number[np.searchsorted(states, x)] for x in (sources, targets))
        # The library's end token leads back to where the text may also go on; here nothing follows it.
        return cls._ended(sources, tokens, targets, end_token, len(states), len(token_bytes))

    @classmethod
    def of_json_schema(cls, schema: Mapping[str, Any], token_bytes: Sequence[bytes], end_token: int) -> "Automaton":
        """The JSON texts that a schema allows, with at most one space between their parts; see `of_regex`.

        The schema becomes a regular expression, so it must be finite in depth. What a regular expression cannot say,
        such as the bounds of numbers, outlines-core ignores: validate the answers where these matter. A string, number
        or array without a greatest length may become so long that `max_new_tokens` cuts it.

        Raises:
            ImportError: outlines-core is not installed.
            ValueError: outlines-core does not know what the schema uses, or the tokens cannot write it.
        """
        text = json.dumps(schema)
        try:
            pattern = _outlines().json_schema.build_regex_from_schema(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"no regular expression for the schema {text[:80]}: {error}") from error
        return cls.of_regex(pattern, token_bytes, end_token)

    def start(self, num_rows: int) -> Int32[Array, " R"]:
        """The state of rows that have drawn nothing, for `SamplingState.processor`."""
        return jnp.full(num_rows, ROOT, jnp.int32)

    def process(
        self, state: Int32[Array, " R"] | None, logits: Float32[Array, "R V"], tokens: Any, num_known: Any
    ) -> Float32[Array, "R V"]:
        """The logits, with -inf for all tokens that are not on an edge of the row's node.

        Raises:
            ValueError: the state is missing, or the logits have another vocabulary.
        """
        if state is None:
            raise ValueError(
                "an Automaton needs its state: give automaton.start(num_rows) to an Engine or beam_search as "
                "processor_state, or to SamplingState.of as processor"
            )
        if logits.shape[1] != self.vocab_size:
            raise ValueError(
                f"logits of {logits.shape[1]} tokens, but an automaton with vocab_size={self.vocab_size}: make it with "
                "that of the decoder"
            )
        node = jnp.maximum(state, 0)
        bitmap = self.bitmap[node]
        has_bitmap, is_free = (state != FREE) & (bitmap != NO_BITMAP), state == FREE
        masked = self._keep_listed(logits, node, ~has_bitmap & ~is_free)

        def keep_mapped(masked: Array) -> Array:
            words = self.bitmaps[jnp.maximum(bitmap, 0)]
            bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :] & jnp.uint32(1)
            is_allowed = bits.reshape(len(words), -1)[:, : self.vocab_size] == 1
            return jnp.where(has_bitmap[:, None], jnp.where(is_allowed, logits, -jnp.inf), masked)

        masked = lax.cond(jnp.any(has_bitmap), keep_mapped, lambda masked: masked, masked)
        return lax.cond(
            jnp.any(is_free), lambda masked: jnp.where(is_free[:, None], logits, masked), lambda masked: masked, masked
        )

    def advance(self, state: Int32[Array, " R"], drawn: Int32[Array, " R"], drew: Bool[Array, " R"]) -> Array:
        """The node after the drawn token."""
        node = jnp.maximum(state, 0)
        stop = self.first[node + 1]

        def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            middle = (low + high) // 2
            is_before = (low < high) & (self.tokens.at[middle].get(mode="clip") < drawn)
            return jnp.where(is_before, middle + 1, low), jnp.where(is_before, high, middle)

        edge, _ = lax.fori_loop(0, self.tokens.size.bit_length(), halve, (self.first[node], stop))
        follows = drew & (state != FREE) & (edge < stop) & (self.tokens.at[edge].get(mode="clip") == drawn)
        return jnp.where(follows, self.targets.at[edge].get(mode="clip"), state)

    @classmethod
    def _ended(
        cls, sources: np.ndarray, tokens: np.ndarray, targets: np.ndarray, end_token: int, end: int, vocab_size: int
    ) -> "Automaton":
        """An automaton of these edges, whose end tokens all lead to a new node `end`, which allows nothing else."""
        targets = np.where(tokens == end_token, end, targets)
        last = (end, end_token, end)
        sources, tokens, targets = (np.append(x, y) for x, y in zip((sources, tokens, targets), last, strict=True))
        return cls.of_edges(sources, tokens, targets, vocab_size)

    def _keep_listed(self, logits: Array, node: Int32[Array, " R"], rows: Bool[Array, " R"]) -> Array:
        """-inf, but for the tokens on the edges of some rows' nodes: those of all rows in one list, in chunks."""
        degree = jnp.where(rows, self.first[node + 1] - self.first[node], 0)
        ends = jnp.cumsum(degree, dtype=jnp.int32)
        offset = self.first[node] - (ends - degree)

        def write(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            start, masked = carry
            place = start + jnp.arange(CHUNK, dtype=jnp.int32)
            row = jnp.searchsorted(ends, place, side="right").astype(jnp.int32)
            edge = place + offset.at[row].get(mode="clip")
            at = row, self.tokens.at[edge].get(mode="clip")  # past the last edge, the row is out of range
            kept = logits.at[at].get(mode="fill", fill_value=-jnp.inf)
            return start + CHUNK, masked.at[at].set(kept, mode="drop")

        carry = jnp.int32(0), jnp.full_like(logits, -jnp.inf)
        return lax.while_loop(lambda carry: carry[0] < ends[-1], write, carry)[1]


_PADDING = -1


def _outlines() -> Any:
    try:
        import outlines_core  # pyright: ignore[reportMissingImports]  an extra
        import outlines_core.json_schema  # pyright: ignore[reportMissingImports]  likewise
    except ImportError as error:
        raise ImportError(
            "regular expressions and schemas are read by outlines-core: pip install 'paged_jax[constraints]'"
        ) from error
    return outlines_core


def _whole_numbers(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} of {array.dtype}{list(array.shape)}: give a list of whole numbers")
    return array.astype(np.int64)


def _table(sequences: Iterable[Sequence[int]] | np.ndarray, end_token: int, vocab_size: int) -> np.ndarray:
    """The sequences [n, length + 1], each followed by the end token and padding, sorted."""
    rows = sequences if isinstance(sequences, np.ndarray) else list(sequences)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if len(rows) == 0 or lengths.min() == 0:
        what = "there are no sequences" if len(rows) == 0 else f"sequence {int(np.argmin(lengths))} is empty"
        raise ValueError(f"{what}: a trie needs at least one, and each at least one token")
    parts = [rows.reshape(-1)] if isinstance(rows, np.ndarray) else [np.asarray(row) for row in rows]
    flat = _whole_numbers(np.concatenate(parts), "sequences")
    wrong = np.flatnonzero((flat < 0) | (flat >= vocab_size) | (flat == end_token))
    if len(wrong):
        number = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
        raise ValueError(
            f"sequence {number} holds {flat[wrong[0]]}: tokens must be in [0, {vocab_size}), and other than "
            f"end_token={end_token}, which follows each sequence by itself"
        )
    column = np.arange(int(lengths.max()) + 1)
    table = np.full((len(rows), len(column)), _PADDING, np.int64)
    table[column < lengths[:, None]] = flat
    table[np.arange(len(rows)), lengths] = end_token
    return table[np.lexsort(table.T[::-1])]


def _bitmaps(
    sources: np.ndarray, tokens: np.ndarray, degrees: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The bitmap of each node, and the bitmaps: for nodes with more edges than a bitmap has words."""
    num_words = -(-vocab_size // 32)
    mapped = np.flatnonzero(degrees > num_words)
    bitmap = np.full(len(degrees), NO_BITMAP)
    bitmap[mapped] = np.arange(len(mapped))
    is_allowed = np.zeros((max(len(mapped), 1), num_words * 32), bool)
    is_mapped = bitmap[sources] != NO_BITMAP
    is_allowed[bitmap[sources[is_mapped]], tokens[is_mapped]] = True
    return bitmap, np.packbits(is_allowed, axis=1, bitorder="little").view("<u4").astype(np.uint32)
