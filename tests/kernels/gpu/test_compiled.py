"""The kernels compiled for an H200 on a machine without one: what the compiler says of them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from compiling import LOAD, count, read_reports

from benchmarks.gpu_static.target import compile_for_h200
from pallas_kernels import Sharing, copy_pages, paged_attention, write_pages
from pallas_kernels.pages import Pages, init_pages

pytestmark = pytest.mark.gpu_compile


@pytest.fixture
def compile_kernels(tmp_path, monkeypatch, capfd):
    """Compiles a function for an H200; returns what was compiled and the reports of its kernels by name."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler of GPUs is not installed")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compile_kernels(function, *arguments, most_spilled=0):
        compiled = compile_for_h200(function, *arguments)
        reports = read_reports(tmp_path)
        assert reports, "no kernel was compiled"
        output = "".join(capfd.readouterr())
        for name, report in reports.items():
            assert report.spilled_bytes <= most_spilled, f"{name} spills: {report.log}"
            # C7504, C7508: a register limit that the assembler dropped; C7510: products that wait for one another.
            assert not re.search(r"C75\d\d|serialized|maxnreg", report.log + output)
        return compiled, reports

    return compile_kernels


def abstract_pages(num_kv_heads, page_size, head_dim, dtype=jnp.bfloat16, num_pages=4096) -> Pages:
    return jax.eval_shape(partial(init_pages, num_pages, num_kv_heads, page_size, head_dim, dtype))


# Bytes, mostly where masks meet scales, which a whole tile does not pass; int8 takes two sums, too many for 256 lanes.
SPILLED_BY_ROWS = {
    ("float8_e4m3fn", 64): 288,
    ("float8_e4m3fn", 128): 96,
    ("float8_e4m3fn", 256): 96,
    ("int8", 64): 64,
    ("int8", 256): 544,
}


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def per_product(dtype):
    """Numbers of 64 keys in one tensor core instruction: 32 of each key where those are taken as 8 bits, else 16."""
    return 64 * (16 if dtype == "bfloat16" else 32)


def attention_arguments(batch, tokens, heads, pages, max_pages=256):
    q = array(tokens, heads, pages.head_dim, dtype=jnp.bfloat16)
    return q, None, None, pages, array(batch, max_pages), array(batch), array(batch + 1)


@pytest.mark.parametrize(
    ("page_size", "head_dim", "heads", "dtype", "blocks"),
    [
        (16, 128, (32, 8), "bfloat16", 2),
        (64, 128, (32, 8), "bfloat16", 2),
        pytest.param(128, 128, (32, 8), "bfloat16", 2, marks=pytest.mark.long),
        pytest.param(8, 128, (16, 1), "bfloat16", 2, marks=pytest.mark.long),
        (16, 64, (64, 8), "bfloat16", 2),
        pytest.param(64, 64, (12, 1), "bfloat16", 2, marks=pytest.mark.long),
        pytest.param(64, 256, (16, 1), "bfloat16", 1, marks=pytest.mark.long),
        (16, 128, (32, 8), "float8_e4m3fn", 2),
        pytest.param(64, 128, (32, 8), "float8_e4m3fn", 2, marks=pytest.mark.long),
        pytest.param(128, 128, (32, 8), "float8_e4m3fn", 2, marks=pytest.mark.long),
        pytest.param(8, 64, (64, 8), "float8_e4m3fn", 2, marks=pytest.mark.long),
        pytest.param(16, 128, (32, 8), "int8", 2, marks=pytest.mark.long),
        pytest.param(64, 64, (12, 1), "int8", 2, marks=pytest.mark.long),
        pytest.param(128, 128, (64, 8), "int8", 2, marks=pytest.mark.long),
        pytest.param(32, 256, (16, 2), "int8", 1, marks=pytest.mark.long),
        pytest.param(64, 256, (32, 2), "float8_e4m3fn", 1, marks=pytest.mark.long),
    ],
)
def test_decode(compile_kernels, page_size, head_dim, heads, dtype, blocks):
    num_heads, num_kv_heads = heads
    pages = abstract_pages(num_kv_heads, page_size, head_dim, dtype)
    decode = jax.jit(partial(paged_attention, max_query_len=1, implementation="pallas_gpu"))
    _, reports = compile_kernels(decode, *attention_arguments(64, 64, num_heads, pages))
    tokens = 128 if head_dim == 64 and num_heads // num_kv_heads <= 8 else 64
    # A kernel that an earlier test compiled is not compiled again: the merge may be missing, the rest differs.
    report = reports["paged_decode"]
    assert report.blocks_per_multiprocessor >= blocks
    # Of a tile: its scores 64 tokens at a time, its weighted values 64 lanes at a time; each unbroken.
    products = [(tokens * head_dim // per_product(dtype), False), (tokens * head_dim // 1024, False)]
    assert sorted(report.products()) == sorted(products)
    # The loop over tiles is peeled once or not at all; every copy of it loads each page's keys and its values once.
    (loop,) = report.copy_loops()[-1:]
    pages_per_tile = max(1, tokens // page_size)
    scales = 0 if dtype == "bfloat16" else max(pages_per_tile, 1 + (page_size > tokens))
    ids = 1
    assert count(loop, LOAD) - ids - scales == 2 * pages_per_tile
    assert count(loop, r"\bld\.global") == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_pages_move_in_place(compile_kernels, dtype):
    pages = abstract_pages(8, 64, 128, dtype)
    new = array(256, 8, 128, dtype=jnp.bfloat16)
    write = jax.jit(partial(write_pages, implementation="pallas_gpu"), donate_argnums=0)
    compiled, _ = compile_kernels(write, pages, new, new, array(64, 256), array(64), array(65))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pages.num_bytes
    assert memory.temp_size_in_bytes < pages.num_bytes // 500

    copy = jax.jit(partial(copy_pages, implementation="pallas_gpu"), donate_argnums=0)
    compiled, _ = compile_kernels(copy, pages, array(4), array(4))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pages.num_bytes
    assert memory.temp_size_in_bytes < pages.num_bytes // 500  # the four pages


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_steps_that_write_attend_and_copy_need_no_second_pool(compile_kernels, dtype):
    pages = abstract_pages(8, 16, 128, dtype)
    new = array(64, 8, 128, dtype=jnp.bfloat16)
    q, _, _, _, *rest = attention_arguments(64, 64, 24, pages)

    def steps(pages, q, k, v, *rest):
        def step(_, carry):
            q, pages = carry
            result = paged_attention(q, k, v, pages, *rest, max_query_len=1, implementation="pallas_gpu")
            ids = rest[1][:4]
            return result.out, copy_pages(result.pages, ids, ids + 1, implementation="pallas_gpu")

        return jax.lax.fori_loop(0, 3, step, (q, pages))[1]

    compiled, _ = compile_kernels(jax.jit(steps, donate_argnums=0), pages, q, new, new, *rest)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pages.num_bytes
    assert memory.temp_size_in_bytes < pages.num_bytes // 20


@pytest.mark.parametrize(
    ("page_size", "head_dim", "heads", "tokens", "options"),
    [
        pytest.param(16, 128, (32, 8), 4096, {}, marks=pytest.mark.long),
        (64, 128, (32, 8), 4096, {}),
        pytest.param(
            128, 128, (32, 8), 128, dict(max_query_len=16, has_sinks=True), marks=pytest.mark.long
        ),  # packed, in parts
        pytest.param(64, 64, (64, 8), 2048, dict(window=128, has_sinks=True), marks=pytest.mark.long),
        pytest.param(32, 256, (16, 8), 2048, dict(window=4096, soft_cap=50.0), marks=pytest.mark.long),
        (16, 128, (32, 8), 2048, dict(dtype="float8_e4m3fn")),
        pytest.param(64, 128, (32, 8), 2048, dict(dtype="int8"), marks=pytest.mark.long),
        pytest.param(8, 64, (32, 8), 2048, dict(dtype="int8", window=128), marks=pytest.mark.long),
        pytest.param(64, 64, (32, 8), 2048, dict(dtype="float8_e4m3fn", has_sinks=True), marks=pytest.mark.long),
        pytest.param(16, 256, (16, 8), 2048, dict(dtype="float8_e4m3fn"), marks=pytest.mark.long),
        pytest.param(128, 256, (16, 8), 2048, dict(dtype="int8", window=99, soft_cap=50.0), marks=pytest.mark.long),
        pytest.param(128, 256, (16, 8), 2048, dict(dtype="int8", window=4096, soft_cap=50.0), marks=pytest.mark.long),
    ],
)
def test_rows(compile_kernels, page_size, head_dim, heads, tokens, options):
    num_heads, num_kv_heads = heads
    options = dict(options)
    dtype = options.pop("dtype", "bfloat16")
    pages = abstract_pages(num_kv_heads, page_size, head_dim, dtype)
    sinks = array(num_heads, dtype=jnp.float32) if options.pop("has_sinks", False) else None

    def prefill(sinks, *arguments):
        result = paged_attention(*arguments, sinks=sinks, implementation="pallas_gpu", **options)
        return result.out

    most_spilled = SPILLED_BY_ROWS.get((dtype, head_dim), 0)
    arguments = attention_arguments(4, tokens, num_heads, pages)
    _, reports = compile_kernels(jax.jit(prefill), sinks, *arguments, most_spilled=most_spilled)
    report = reports["paged_rows"]
    assert report.blocks_per_multiprocessor == 1
    assert report.registers <= (128 if head_dim == 64 else 168)  # what four or three warpgroups start with
    is_wide = head_dim <= 128 and dtype != "int8"
    tokens_per_tile = 128 if is_wide else 64
    # Of a tile: its scores, then its weighted values, whose weights never leave the registers; each unbroken.
    assert set(report.products()) == {(64 * head_dim // per_product(dtype), False), (tokens_per_tile // 16, True)}
    # Registers go from the warpgroup that moves to those that compute; the report tells what all start with.
    assert count(report.ptx, r"setmaxnreg\.inc") == count(report.ptx, r"setmaxnreg\.dec") == 1
    (loop,) = report.copy_loops()[-1:]
    pages_per_tile = max(1, tokens_per_tile // page_size)
    ids, scales = 1, 0 if dtype == "bfloat16" else max(pages_per_tile, 1 + (page_size > tokens_per_tile))
    # A tile's keys; its values, in bfloat16 by one of two branches: tokens may be missing.
    assert count(loop, LOAD) - ids - scales == (3 if dtype == "bfloat16" else 2) * pages_per_tile
    assert count(loop, r"\bld\.global") == 0


def test_groups_that_share(compile_kernels):
    pages = abstract_pages(8, 64, 128)

    def decode(leader, tokens, *arguments):
        sharing = Sharing(leader, tokens)
        return paged_attention(*arguments, sharing=sharing, max_query_len=1, implementation="pallas_gpu").out

    arguments = attention_arguments(64, 64, 56, pages)
    _, reports = compile_kernels(jax.jit(decode), array(2, 64), array(2, 64), *arguments)
    assert "paged_rows" in reports  # the decode kernel is one of those above
