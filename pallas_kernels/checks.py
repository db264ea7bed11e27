"""What the arguments of an op must agree on; a contradiction raises ValueError while tracing."""


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


def check_attention(
    q, k, v, pages, page_table, lengths, query_starts, window, soft_cap, sinks, sharing, max_query_len
) -> None:
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
    if sharing is not None and not sharing.leader.shape == sharing.tokens.shape == (len(sharing.leader), len(lengths)):
        raise ValueError(
            f"sharing must hold a leader and tokens for each level and each of {len(lengths)} rows, got "
            f"{sharing.leader.shape} and {sharing.tokens.shape}"
        )
