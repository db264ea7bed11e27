"""The others: JAX's paged kernel, cuDNN, XLA, and PyTorch and FlashInfer where they are installed.

Each takes a problem and returns a function that runs it, and how many calls that makes; or why it does not, in a
sentence.
"""

import functools
import importlib.util
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.problems import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, Problem, contiguous
from benchmarks.gpu.timing import CALLS, microseconds, repeated
from pallas_kernels import paged_attention

Runner = tuple[Callable[[], Any], int]
PEER_BYTES = 8 * 2**30  # of keys and values: the others need them a second time
XLA_BYTES = 2**30


def reason_to_skip(problem: Problem, module: str = "jax", is_decode: bool = False) -> str | None:
    """Why a peer does not run a problem, or None."""
    if importlib.util.find_spec(module) is None:
        return f"skipped: {module} is not installed"
    if problem.pages.scales is not None:
        return "skipped: it has no scale for every token and head"
    if is_decode and problem.q.shape[0] != problem.lengths.shape[0]:
        return "skipped: it decodes only"
    if problem.kv_bytes > PEER_BYTES:
        return f"skipped: no room for keys and values of {problem.kv_bytes / 2**30:.0f} GiB a second time"
    return None


def ours(problem: Problem, implementation: str = "pallas_gpu", **options: Any) -> Runner:
    def attend(q, pages, page_table, lengths, query_starts):
        return paged_attention(
            q, None, None, pages, page_table, lengths, query_starts, implementation=implementation, **options
        ).out

    return repeated(attend, *problem), CALLS


def xla(problem: Problem, **options: Any) -> Runner | str:
    """The package's own XLA implementation."""
    if problem.kv_bytes > XLA_BYTES:
        return f"skipped: it gathers {problem.kv_bytes / 2**30:.0f} GiB, which takes long"
    return ours(problem, "xla", **options)


def jax_builtin(problem: Problem) -> Runner | str:
    """JAX's own paged kernel (Triton), at the fastest of some settings."""
    if reason := reason_to_skip(problem, is_decode=True):
        return reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as builtin
    page_size, columns = problem.pages.page_size, problem.page_table.shape[1]
    k, v = (jnp.swapaxes(x, 0, 1) for x in jnp.split(problem.pages.data, 2, axis=2))  # [K, P, S, H]
    best: tuple[float, Callable[[], Any]] | None = None
    for tokens, splits in itertools.product((64, 128), (1, 4, 16)):
        pages_per_block = max(1, tokens // page_size)
        if columns % (splits * pages_per_block):
            continue
        function = functools.partial(builtin, pages_per_compute_block=pages_per_block, k_splits=splits)
        scaled = problem.q * HEAD_DIM**-0.5  # it does not scale
        run = repeated(function, scaled, k, v, problem.page_table, problem.lengths)
        took = microseconds(run)
        if best is None or took < best[0]:
            best = took, run
    return "skipped: no setting divides its pages" if best is None else (best[1], CALLS)


def cudnn(problem: Problem) -> Runner | str:
    """cuDNN through JAX, on a contiguous cache."""
    if reason := reason_to_skip(problem):
        return reason
    k, v = contiguous(problem)
    batch = k.shape[0]
    q = problem.q.reshape(batch, -1, NUM_HEADS, HEAD_DIM)
    function = functools.partial(jax.nn.dot_product_attention, is_causal=q.shape[1] > 1, implementation="cudnn")
    return repeated(function, q, k, v), CALLS


def torch_sdpa(problem: Problem) -> Runner | str:
    """PyTorch's scaled_dot_product_attention, on a contiguous cache."""
    if reason := reason_to_skip(problem, "torch"):
        return reason
    import torch  # pyright: ignore[reportMissingImports]  optional

    k, v = (torch.from_dlpack(jnp.swapaxes(x, 1, 2)) for x in contiguous(problem))
    q = jnp.swapaxes(problem.q.reshape(k.shape[0], -1, NUM_HEADS, HEAD_DIM), 1, 2)
    q, is_causal = torch.from_dlpack(q), q.shape[2] > 1

    def run():
        for _ in range(CALLS):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
        torch.cuda.synchronize()

    return run, CALLS


def flashinfer(problem: Problem) -> Runner | str:
    """FlashInfer's paged decode, planned outside of the time."""
    if reason := reason_to_skip(problem, "flashinfer", is_decode=True):
        return reason
    import flashinfer as library  # pyright: ignore[reportMissingImports]  optional
    import torch  # pyright: ignore[reportMissingImports]  optional

    batch, columns = problem.page_table.shape
    page_size = problem.pages.page_size
    data = problem.pages.data
    pages = torch.from_dlpack(jnp.swapaxes(data.reshape(*data.shape[:2], 2, page_size, HEAD_DIM), 1, 2))
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device="cuda") * columns,
        torch.from_dlpack(problem.page_table.reshape(-1)),
        torch.full((batch,), page_size, dtype=torch.int32, device="cuda"),
        NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, page_size, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    q = torch.from_dlpack(problem.q)

    def run():
        for _ in range(CALLS):
            wrapper.run(q, pages)
        torch.cuda.synchronize()

    return run, CALLS


DECODE = {
    "pallas_gpu": functools.partial(ours, max_query_len=1),
    "jax built-in": jax_builtin,
    "cudnn, contiguous": cudnn,
    "xla": functools.partial(xla, max_query_len=1),
    "torch sdpa, contiguous": torch_sdpa,
    "flashinfer": flashinfer,
}
PREFILL = {"pallas_gpu": ours, "cudnn, contiguous": cudnn, "xla": xla, "torch sdpa, contiguous": torch_sdpa}
