"""The table of shapes: what is compiled and simulated."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Sharing, init_pages, page_bytes, paged_attention
from pallas_kernels.pages import LANES, stored
from pallas_kernels.sharing import RUN, runs_of
from pallas_kernels.tpu import attention
from pallas_kernels.tpu.blocks import decode_sizes, prefill_kernels, prefill_sizes
from pallas_kernels.tpu.heads import pack_heads
from pallas_kernels.tpu.write import tiles_of_step

POOL_BYTES = 400 << 20  # more than VMEM, or XLA would move the pages there
DTYPES = {"bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class StaticCase:
    name: str
    lengths: tuple[int, ...]
    query_lens: tuple[int, ...] = ()  # () : one each
    heads: tuple[int, int] = (32, 8)  # N, K
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    in_grid: bool = False  # one of the 27 cells of chips x pages x contexts
    levels: tuple[tuple[int, int], ...] = ()  # how many rows side by side share how many tokens, a pair for each level
    prefill_tokens: int | None = None  # most of a sequence in a step, as the step knows; None: as many as come
    pool_bytes: int | None = None  # None: a page for every column of the table
    window: int | None = None
    sinks: bool = False

    @property
    def max_query_len(self) -> int:
        return min(self.prefill_tokens or max(self.new_tokens), self.num_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(self.new_tokens)

    @property
    def new_tokens(self) -> tuple[int, ...]:
        return self.query_lens or (1,) * len(self.lengths)

    @property
    def sharing(self) -> Sharing | None:
        """Who shares what."""
        if not self.levels:
            return None
        row = np.arange(len(self.lengths), dtype=np.int32)
        leader = [row - row % size for size, _ in self.levels]
        tokens = [np.full_like(row, count) for _, count in self.levels]
        return Sharing(jnp.asarray(np.stack(leader)), jnp.asarray(np.stack(tokens)))

    @property
    def unique_tokens(self) -> int:
        """Tokens whose keys and values a step must read, once each."""
        total, before = sum(self.lengths), 0
        for size, count in self.levels:
            total -= (count - before) * (len(self.lengths) - len(self.lengths) // size)
            before = count
        return total

    @property
    def max_pages(self) -> int:
        return -(-max(self.lengths) // self.page_size)


def grid() -> list[StaticCase]:
    return [
        StaticCase(f"decode, page {page}, context {context}", (context,) * 32, page_size=page, in_grid=True)
        for page in (16, 64, 128)
        for context in (256, 1024, 4096)
    ]


def eight_bit() -> list[StaticCase]:
    return [
        StaticCase(
            f"decode, {name}, page {page}, context {context}", (context,) * 32, page_size=page, dtype=DTYPES[name]
        )
        for name in ("int8", "fp8")
        for page in (16, 64, 128)
        for context in (1024, 4096)
    ]


def shapes() -> list[StaticCase]:
    ragged = tuple(int(x) for x in np.random.default_rng(1).integers(1, 4097, 32))
    return [
        StaticCase("decode, 8 heads of 1", (4096,) * 32, heads=(8, 1), page_size=64),
        StaticCase("decode, 16 heads of 2", (4096,) * 32, heads=(16, 2), page_size=64),
        StaticCase("decode, 32 heads of 32", (1024,) * 32, heads=(32, 32)),
        StaticCase("decode, batch 1, context 4096", (4096,)),
        StaticCase("decode, batch 1, context 32768", (32768,)),
        StaticCase("decode, head size 64", (1024,) * 32, head_dim=64),
        StaticCase("decode, head size 96", (1024,) * 32, head_dim=96),
        StaticCase("decode, head size 256", (1024,) * 32, head_dim=256),
        StaticCase("decode, lengths 1 to 4096", ragged),
        StaticCase("decode, 64 sequences share 2048 of 2176", (2176,) * 64, levels=((64, 2048),)),
        StaticCase("decode, 8 groups of 8 share 2048 of 2176", (2176,) * 64, levels=((8, 2048),)),
        StaticCase("decode, 64 share 512, 8 of them 2048 of 2176", (2176,) * 64, levels=((64, 512), (8, 2048))),
        StaticCase("decode, 64 sequences of 2176, nothing shared", (2176,) * 64),
        StaticCase("prefill, 512 on 4096", (4096,), (512,)),
        StaticCase("prefill, 16 prompts of 32", (32,) * 16, (32,) * 16, prefill_tokens=512),
        StaticCase("prefill, 16 of 32 on 2048", (2048,) * 16, (32,) * 16, prefill_tokens=512),
        StaticCase("decode, 31 on 2048", (2048,) * 31),
        StaticCase("mixed, 31 decodes on 2048 and 512 on 4096", (2048,) * 31 + (4096,), (1,) * 31 + (512,)),
    ]


# What CI measures again: each kernel, each kind of pages, each chip.
GATE = (
    "decode, page 16, context 256 | v5e",
    "decode, page 16, context 256 | v6e",
    "decode, page 16, context 256 | v7x",
    "decode, page 64, context 1024 | v7x",
    "decode, batch 1, context 4096 | v7x",
    "decode, head size 64 | v7x",
    "decode, int8, page 64, context 1024 | v5e",
    "decode, int8, page 16, context 1024 | v7x",
    "decode, int8, page 64, context 1024 | v7x",
    "decode, fp8, page 64, context 1024 | v7x",
    "prefill, 512 on 4096 | v6e",
    "prefill 512 on 4096, 32/32/128, bf16, page 16 | v7x",
    "prefill 512 on 4096, 4/1/256, bf16, page 16 | v7x",
    "decode, 64 share 512, 8 of them 2048 of 2176 | v6e",
    "decode 32 on 2000, 14/2/64, bf16, page 64 | v7x",
    "decode 32 on 2000, 4/1/256, bf16, page 16 | v7x",
    "decode 32 on 2000, 8/1/128, fp8, page 64 | v6e",
    "decode 32 on 2000, 64/8/64 window 128 sinks, bf16, page 16 | v7x",
)


def kernel_cases() -> dict[str, StaticCase]:
    """The cells that the kernels were made with."""
    return {case.name: case for case in grid() + eight_bit() + shapes()}


def abstract_pages(case: StaticCase):
    sizes = (case.heads[1], case.page_size, case.head_dim, case.dtype)
    num_pages = (case.pool_bytes or POOL_BYTES) // page_bytes(*sizes, is_padded=True)
    if case.pool_bytes is None:
        num_pages = max(len(case.lengths) * case.max_pages + 1, num_pages)
    return jax.eval_shape(partial(init_pages, num_pages, *sizes, is_padded=True))


@partial(jax.jit, static_argnames="case", donate_argnames="pages")
def step(q, k, v, pages, page_table, lengths, query_starts, sharing, sinks, *, case: StaticCase):
    result = paged_attention(
        q, k, v, pages, page_table, lengths, query_starts, sharing=sharing, sinks=sinks, window=case.window,
        max_query_len=case.max_query_len, implementation="pallas_tpu",
    )  # fmt: skip
    return result.out, result.pages


def arguments(case: StaticCase) -> tuple:
    """The shapes of `step`'s arguments."""
    batch, tokens = len(case.lengths), case.num_tokens
    array = jax.ShapeDtypeStruct
    q = array((tokens, case.heads[0], case.head_dim), jnp.bfloat16)
    k = array((tokens, case.heads[1], case.head_dim), jnp.bfloat16)
    table = array((batch, case.max_pages), jnp.int32)
    lengths, starts = array((batch,), jnp.int32), array((batch + 1,), jnp.int32)
    sharing = jax.eval_shape(lambda: case.sharing)
    sinks = array((case.heads[0],), jnp.float32) if case.sinks else None
    return q, k, k, abstract_pages(case), table, lengths, starts, sharing, sinks


def operands(case: StaticCase, device_kind: str) -> dict[str, dict[int, Any]]:
    """For each kernel what its scalar half reads: operand index to words."""
    pages = stored(abstract_pages(case))
    batch = len(case.lengths)
    ids = np.random.default_rng(0).permutation(pages.num_pages - 1)[: batch * case.max_pages] + 1
    table = jnp.asarray(ids.reshape(batch, -1), jnp.int32)
    lengths = jnp.asarray(case.lengths, jnp.int32)
    starts = jnp.asarray(np.concatenate([[0], np.cumsum(case.new_tokens)]), jnp.int32)
    packing = pack_heads(*case.heads, pages.head_dim, pages.data.shape[3])
    chunks, _ = attention.page_chunks(table)
    sharing = case.sharing
    runs = None if sharing is None else runs_of(sharing, lengths, lengths > 0, case.page_size)
    seen = (lengths, table, None if runs is None else runs.rest)
    if case.window is not None:
        seen = attention.in_window(lengths, table, case.page_size, case.window)
    is_short = runs is not None and attention.rests_are_short(runs, lengths, lengths > 0)
    sizes = decode_sizes(pages, seen[1].shape[1], packing, device_kind, LANES if is_short else None)
    rows = attention.decode_rows(seen[0], starts, seen[1], sizes, seen[2])
    result = {"paged_rest" if is_short else "paged_decode": {0: rows, 4: attention.page_chunks(seen[1])[0]}}
    if runs is not None:
        row, begin, end = attention.chunk_rows(runs)
        packing = pack_heads(RUN * case.heads[0], case.heads[1], pages.head_dim, pages.data.shape[3])
        sizes = decode_sizes(pages, case.max_pages, packing, device_kind)
        rows = attention.decode_rows(end, jnp.arange(end.size + 1, dtype=jnp.int32), table[row], sizes, begin)
        result["paged_group"] = {0: rows, 4: attention.page_chunks(table[row])[0]}
        sizes = prefill_sizes(pages, case.heads[0], batch, case.max_pages)
        result[f"paged_prefill_{sizes.query_tokens}"] = {0: attention.group_rows(runs, table, sizes), 2: chunks}
    longest = case.max_query_len
    if longest > 1:
        for sizes, counts in prefill_kernels(pages, case.heads[0], batch, longest, case.max_pages, case.window):
            rows = attention.prefill_rows(lengths, starts, table, sizes, counts)
            result[f"paged_prefill_{sizes.query_tokens}"] = {0: rows, 2: chunks}
        several = jnp.where(starts[1:] - starts[:-1] > 1, lengths, 0)
        result["paged_write"] = {0: tiles_of_step(table, several, starts, case.num_tokens, pages).scalars}
    return {
        kernel: {index: [int(x) for x in words] for index, words in by_index.items()}
        for kernel, by_index in result.items()
    }
