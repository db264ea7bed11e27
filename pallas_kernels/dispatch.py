"""The public ops: check the arguments, choose an implementation, run it.

An implementation is one `Backend` in `BACKENDS`. Adding one is adding an entry (README.md shows how).
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import reference
from pallas_kernels.pages import Pages, stored
from pallas_kernels.platform import target_platform
from pallas_kernels.reference import AttentionResult


class Backend(NamedTuple):
    """Where an implementation lives and which platforms try it unasked.

    The module defines those of `paged_attention`, `write_pages` and `copy_pages` that it implements, with
    the signatures of reference.py, and `refusal(op, **arguments) -> str | None`: one sentence on why it
    cannot run `op` (a name) on these arguments (those of the op, by name), or None if it can.
    """

    module: str
    platforms: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)  # only when used: a CPU need not import Pallas


# In order of preference: dispatch takes the first that lists the platform and does not refuse.
BACKENDS: dict[str, Backend] = {
    "pallas_gpu": Backend("pallas_kernels.gpu"),  # by name only until it has run on a GPU
    "pallas_tpu": Backend("pallas_kernels.tpu", ("tpu",)),
    "xla": Backend("pallas_kernels.xla", ("cpu", "tpu", "gpu")),
    "reference": Backend("pallas_kernels.reference"),
}


def choose(op: str, implementation: str | None, arguments: dict[str, Any]) -> Any:
    """The function that runs `op` on these arguments.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: the one asked for refuses the arguments.
    """
    if implementation is None:
        platform = target_platform()
        for backend in BACKENDS.values():
            if platform in backend.platforms and _refusal(backend.load(), op, arguments) is None:
                return getattr(backend.load(), op)
        raise NotImplementedError(f'no implementation of {op} on {platform}: pass implementation="xla"')
    if implementation not in BACKENDS:
        raise ValueError(f"implementation must be None or one of {', '.join(BACKENDS)}, got {implementation!r}")
    module = BACKENDS[implementation].load()
    if reason := _refusal(module, op, arguments):
        raise NotImplementedError(f"{implementation} {op}: {reason}")
    return getattr(module, op)


def _refusal(module: ModuleType, op: str, arguments: dict[str, Any]) -> str | None:
    if not hasattr(module, op):
        return "it does not have this op."
    return module.refusal(op, **arguments)


def _padded(x: Array | None, pages: Pages) -> Array | None:
    """`[T, heads, H]` with the zeros that the pages have behind each head."""
    return x if x is None or not pages.padding else jnp.pad(x, ((0, 0), (0, 0), (0, pages.padding)))


def _like(pages: Pages, new: Pages) -> Pages:
    """New pages, as implementations see them, in the form of those that came in."""
    return dataclasses.replace(new, padding=pages.padding)


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"] | None,
    v: Float[Array, "T K H"] | None,
    pages: Pages,
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    shared_prefix: Int32[Array, ""] | None = None,
    max_query_len: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> AttentionResult:
    """Writes new keys and values to their pages and attends over each sequence's pages, causally.

    Sequence b owns the packed tokens `query_starts[b] : query_starts[b + 1]`; the last of them has position
    `lengths[b] - 1`. Its keys and values go to page `page_table[b, position // S]`, slot `position % S`; then
    each query sees the positions up to its own. A page id outside `1 .. P-1` is unmapped: its keys do not
    exist, and a write to it is dropped. A token with a negative position is inert, as is one behind
    `query_starts[B]`: it writes nothing and its output is 0. From PagedAttention (Kwon et al. 2023, arXiv
    2309.06180).

    Args:
        q: `[T, N, H]`, the queries of all sequences, packed.
        k: `[T, K, H]`, their keys, or None to attend without writing.
        v: `[T, K, H]`, their values, or None with `k`.
        pages: one layer's pages; donate them at the jit boundary, then the write is in place.
        page_table: int32 `[B, M]`, the pages of each sequence.
        lengths: int32 `[B]`, tokens in each sequence, the new ones included.
        query_starts: int32 `[B + 1]`, where each sequence's tokens start in `T`, and where the last ends.
        scale: of the scores; None: `H ** -0.5`.
        window: how many positions a query sees, its own included; None: all.
        soft_cap: c in `c * tanh(score / c)`; None: no cap.
        sinks: float `[N]`, for each query head a logit that takes part in the softmax and has no value.
        shared_prefix: int32 scalar, a promise that the first so many tokens (a multiple of S) of every
            sequence with a length above 0 lie in the same pages. It changes the speed only.
        max_query_len: a promise that no sequence has more tokens in `T`; None: T. 1: decoding.
        return_lse: also return the log of each softmax denominator, sinks included.
        implementation: None (by platform and arguments) or a name in `BACKENDS`, which never falls back.

    Returns:
        `out` `[T, N, H]` in q's dtype, the pages, and `lse` float32 `[T, N]` or None. Where a query sees no
        key the output is 0 and lse is -inf (the sink where there is one).

    Raises:
        ValueError: arguments that contradict each other.
        NotImplementedError: the named implementation cannot do this.
    """
    check_attention(q, k, v, pages, page_table, lengths, query_starts, window, soft_cap, sinks, max_query_len)
    arguments = dict(
        q=_padded(q, pages), k=_padded(k, pages), v=_padded(v, pages), pages=stored(pages),
        page_table=page_table, lengths=lengths, query_starts=query_starts,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, window=window, soft_cap=soft_cap, sinks=sinks,
        shared_prefix=shared_prefix, return_lse=return_lse,
        max_query_len=min(max_query_len or q.shape[0], q.shape[0]),
    )  # fmt: skip
    result = choose("paged_attention", implementation, arguments)(**arguments)
    return result._replace(out=result.out[..., : q.shape[-1]], pages=_like(pages, result.pages))


def write_pages(
    pages: Pages,
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    *,
    implementation: str | None = None,
) -> Pages:
    """Writes new keys and values to their pages, as `paged_attention` does before it attends.

    Args:
        pages: one layer's pages; donate them at the jit boundary, then the write is in place.
        k: `[T, K, H]`, the keys of all sequences, packed.
        v: `[T, K, H]`, the values.
        page_table: int32 `[B, M]`, the pages of each sequence.
        lengths: int32 `[B]`, tokens in each sequence, the new ones included.
        query_starts: int32 `[B + 1]`, where each sequence's tokens start in `T`, and where the last ends.
        implementation: as for `paged_attention`.

    Returns:
        The pages with the tokens in them.

    Raises:
        ValueError: arguments that contradict each other.
        NotImplementedError: the named implementation cannot do this.
    """
    check_tokens(k, v, pages, page_table, lengths, query_starts)
    new = dict(k=_padded(k, pages), v=_padded(v, pages))
    arguments = dict(pages=stored(pages), page_table=page_table, lengths=lengths, query_starts=query_starts, **new)
    return _like(pages, choose("write_pages", implementation, arguments)(**arguments))


def read_pages(pages: Pages, page_ids: Int32[Array, " n"]) -> tuple[Float[Array, "n S K H"], Float[Array, "n S K H"]]:
    """The keys and values in some pages, token by token.

    Args:
        pages: one layer's pages.
        page_ids: int32 `[n]`; an id outside `1 .. P-1` reads as zeros.

    Returns:
        Keys and values `[n, S, K, H]` in the pages' dtype, or float32 where they are quantised.
    """
    keys, values = reference.read_pages(stored(pages), page_ids)
    return keys[..., : pages.head_dim], values[..., : pages.head_dim]


def copy_pages(
    pages: Pages,
    source: Int32[Array, " C"],
    target: Int32[Array, " C"],
    *,
    implementation: str | None = None,
) -> Pages:
    """Copies whole pages; every page is read before any is written.

    Args:
        pages: one layer's pages; donate them at the jit boundary, then the copy is in place.
        source: int32 `[C]`, the pages to copy.
        target: int32 `[C]`, where to; a pair with an id outside `1 .. P-1` does nothing, and no page may be
            the target of two pairs.
        implementation: as for `paged_attention`.

    Returns:
        The pages after the copies.

    Raises:
        ValueError: `source` and `target` differ in length.
        NotImplementedError: the named implementation cannot do this.
    """
    if source.shape != target.shape:
        raise ValueError(f"source and target must pair up, got {source.shape} and {target.shape}")
    arguments = dict(pages=stored(pages), source=source, target=target)
    return _like(pages, choose("copy_pages", implementation, arguments)(**arguments))


def check_tokens(k, v, pages, page_table, lengths, query_starts) -> None:
    """Raises ValueError where new tokens, pages and their table do not fit together."""
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {k.shape} and {v.shape}")
    if k.shape[1:] != (pages.num_kv_heads, pages.head_dim):
        raise ValueError(
            f"k has (heads, head size) {k.shape[1:]}, the pages hold {(pages.num_kv_heads, pages.head_dim)}: "
            "give init_pages the model's num_kv_heads and head_dim"
        )
    check_table(page_table, lengths, query_starts)


def check_table(page_table, lengths, query_starts) -> None:
    """Raises ValueError where the arrays of a step differ in their number of sequences."""
    num_sequences = page_table.shape[0]
    if lengths.shape != (num_sequences,) or query_starts.shape != (num_sequences + 1,):
        raise ValueError(
            f"a page table of {num_sequences} rows needs lengths ({num_sequences},) and query_starts "
            f"({num_sequences + 1},), got {lengths.shape} and {query_starts.shape}"
        )


def check_attention(q, k, v, pages, page_table, lengths, query_starts, window, soft_cap, sinks, max_query_len) -> None:
    """Raises ValueError where the arguments of `paged_attention` contradict each other."""
    if (k is None) != (v is None):
        raise ValueError("k and v must both be arrays (write, then attend) or both None (attend only)")
    num_tokens, num_heads, head_dim = q.shape
    if k is None:
        check_table(page_table, lengths, query_starts)
    else:
        check_tokens(k, v, pages, page_table, lengths, query_starts)
        if k.shape[0] != num_tokens:
            raise ValueError(f"q has {num_tokens} tokens but k has {k.shape[0]}: pack both alike")
    if head_dim != pages.head_dim:
        raise ValueError(f"q has head size {head_dim}, the pages hold {pages.head_dim}")
    if num_heads % pages.num_kv_heads:
        raise ValueError(f"the {num_heads} query heads must be a multiple of the pages' {pages.num_kv_heads} KV heads")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks must hold one logit for each of {num_heads} query heads, got {sinks.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query sees itself) or None, got {window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be above 0 or None, got {soft_cap}")
    if max_query_len is not None and max_query_len < 1:
        raise ValueError(f"max_query_len must be at least 1 or None, got {max_query_len}")


def check_page_table(page_table: Array | np.ndarray, lengths: Array | np.ndarray, pages: Pages) -> None:
    """Checks a page table on the host, for debugging: the ops themselves mask what is wrong.

    A row's pages must be distinct ids in `1 .. P-1` that cover its length, apart from leading columns that
    are 0 where a window has passed; columns behind the length may hold anything.

    Args:
        page_table: int32 `[B, M]`.
        lengths: int32 `[B]`.
        pages: the pages that it speaks of.

    Raises:
        ValueError: naming the first row that breaks a rule, the rule and the value.
    """
    table, row_lengths = np.asarray(page_table), np.asarray(lengths)
    capacity = table.shape[1] * pages.page_size
    for row, length in enumerate(row_lengths):
        if not 0 <= length <= capacity:
            raise ValueError(f"row {row}: length {length} is outside 0 .. {capacity} (M * S)")
        used = table[row, : -(-length // pages.page_size)]
        wrong = used[(used < 0) | (used >= pages.num_pages)]
        if wrong.size:
            raise ValueError(f"row {row}: page {wrong[0]} is outside 0 .. {pages.num_pages - 1}")
        owned = np.trim_zeros(used, "f")
        if length and (owned.size == 0 or not owned.all()):
            raise ValueError(f"row {row}: length {length} needs {used.size} mapped pages, got {used.tolist()}")
        if len(set(owned.tolist())) < owned.size:
            raise ValueError(f"row {row}: a page stands twice in {owned.tolist()}")
