"""The public ops: check the arguments, choose an implementation, run it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import reference
from pallas_kernels.checks import check_attention, check_tokens
from pallas_kernels.pages import Pages, stored
from pallas_kernels.reference import AttentionResult
from pallas_kernels.registry import choose
from pallas_kernels.sharing import Sharing


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
    sharing: Sharing | None = None,
    max_query_len: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> AttentionResult:
    """Writes new keys and values to their pages; then each query attends to its own sequence, causally.

    Sequence b owns the packed tokens `query_starts[b] : query_starts[b + 1]`; the last of them has position
    `lengths[b] - 1`. Its keys and values go to page `page_table[b, position // S]`, slot `position % S`; then
    each query sees the positions up to its own. A page id outside `1 .. P-1` is unmapped: its keys do not
    exist, and a write to it is dropped. A token with a negative position, or past `query_starts[B]`,
    writes nothing, and its output is 0. From PagedAttention (Kwon et al. 2023, arXiv
    2309.06180).

    Args:
        q: `[T, N, H]`, the queries of all sequences, packed.
        k: `[T, K, H]`, their keys, or None to attend without writing.
        v: `[T, K, H]`, their values, or None with `k`.
        pages: one layer's pages; donate them at the jit boundary, then the write is in place.
        page_table: int32 `[B, M]`, the pages of each sequence.
        lengths: int32 `[B]`, tokens in each sequence, the new ones included.
        query_starts: int32 `[B + 1]`, where each sequence's tokens start in `T`, and where the last ends.
        scale: factor on the scores; None: `H ** -0.5`.
        window: how many positions a query sees, its own included; None: all.
        soft_cap: c in `c * tanh(score / c)`; None: no cap.
        sinks: float `[N]`, for each query head a logit that takes part in the softmax and has no value.
        sharing: which rows begin with the same pages (`find_groups`). It changes the speed only, and is trusted.
            None: no rows do.
        max_query_len: the most tokens of a sequence in `T`, which is trusted; 1 when decoding. None: T.
        return_lse: whether to return the log of each softmax denominator, sinks included.
        implementation: a name in `BACKENDS`, which never falls back to another; None: chosen by platform and arguments.

    Returns:
        `out` `[T, N, H]` in q's dtype, the pages, and `lse` float32 `[T, N]` or None. Where a query sees no
        key the output is 0 and lse is -inf (the sink where there is one).

    Raises:
        ValueError: arguments that contradict each other.
        NotImplementedError: the named implementation cannot do this.

    Examples:
        >>> pages = init_pages(num_pages=4, num_kv_heads=1, page_size=2, head_dim=8, dtype=jnp.float32, is_padded=False)
        >>> x = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 1, 8))  # three tokens of one sequence
        >>> table, lengths, starts = jnp.array([[3, 1]]), jnp.array([3]), jnp.array([0, 3])
        >>> result = paged_attention(x, x, x, pages, table, lengths, starts, scale=0.0)  # all keys count the same
        >>> result.out[:, 0, 0].tolist()  # the mean of the values up to each token
        [0.0, 0.5, 1.0]
    """
    check_attention(q, k, v, pages, page_table, lengths, query_starts, window, soft_cap, sinks, sharing, max_query_len)
    if window is not None and window >= page_table.shape[1] * pages.page_size:
        window = None  # it is as long as a sequence can be; no kernel needs to mask anything
    arguments = dict(
        q=_padded(q, pages), k=_padded(k, pages), v=_padded(v, pages), pages=stored(pages),
        page_table=page_table, lengths=lengths, query_starts=query_starts,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, window=window, soft_cap=soft_cap, sinks=sinks,
        sharing=sharing if sharing is not None and len(sharing.leader) else None, return_lse=return_lse,
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

    Examples:
        >>> pages = init_pages(num_pages=4, num_kv_heads=1, page_size=2, head_dim=8, dtype=jnp.float32, is_padded=False)
        >>> x = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 1, 8))  # three tokens of one sequence
        >>> table, lengths, starts = jnp.array([[3, 1]]), jnp.array([3]), jnp.array([0, 3])
        >>> pages = write_pages(pages, x, x, table, lengths, starts)
        >>> keys, values = read_pages(pages, jnp.array([3, 1]))
        >>> keys[:, :, 0, 0].tolist()
        [[0.0, 1.0], [2.0, 0.0]]
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

    Examples:
        >>> pages = init_pages(num_pages=4, num_kv_heads=1, page_size=2, head_dim=8, dtype=jnp.float32, is_padded=False)
        >>> keys, values = read_pages(pages, jnp.array([1, 3]))
        >>> keys.shape
        (2, 2, 1, 8)
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

    Examples:
        >>> pages = init_pages(num_pages=4, num_kv_heads=1, page_size=2, head_dim=8, dtype=jnp.float32, is_padded=False)
        >>> x = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 1, 8))  # three tokens of one sequence
        >>> table, lengths, starts = jnp.array([[3, 1]]), jnp.array([3]), jnp.array([0, 3])
        >>> pages = copy_pages(write_pages(pages, x, x, table, lengths, starts), jnp.array([3]), jnp.array([2]))
        >>> read_pages(pages, jnp.array([2]))[0][0, :, 0, 0].tolist()
        [0.0, 1.0]
    """
    if source.shape != target.shape:
        raise ValueError(f"source and target must pair up, got {source.shape} and {target.shape}")
    arguments = dict(pages=stored(pages), source=source, target=target)
    return _like(pages, choose("copy_pages", implementation, arguments)(**arguments))


def _padded(x: Array | None, pages: Pages) -> Array | None:
    """`[T, heads, H]` with the zeros that the pages have after each head."""
    return x if x is None or not pages.padding else jnp.pad(x, ((0, 0), (0, 0), (0, pages.padding)))


def _like(pages: Pages, new: Pages) -> Pages:
    """New pages, as implementations see them, in the form of those that came in."""
    return dataclasses.replace(new, padding=pages.padding)
