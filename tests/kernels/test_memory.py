"""No op copies the pool, and no step computes what it need not: read from what XLA compiled."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels import copy_pages, init_pages, paged_attention, write_pages

PAGE_SIZE, SEQUENCES, MAX_PAGES, COPIES = 16, 32, 256, 32
SHAPES = [(32, 8, 128), (8, 2, 64)]  # N, K, H
DTYPES = ["float32", "bfloat16", "int8", "float8_e4m3fn"]
# With scales and without; the others differ in no operation on the pages.
CPU_DTYPES = [pytest.param(x, marks=pytest.mark.long if x in ("float32", "int8") else ()) for x in DTYPES]
TOKENS = 512  # of a prefill
attend = functools.partial(paged_attention, implementation="xla")
write = functools.partial(write_pages, implementation="xla")
copy = functools.partial(copy_pages, implementation="xla")


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def problem(shape, dtype, num_layers=1):
    """Layers of pages of 512 MB in all, and where a step's tokens belong."""
    _, num_kv_heads, head_dim = shape
    token_bytes = 2 * num_kv_heads * head_dim * jnp.dtype(dtype).itemsize
    num_pages = 2**29 // (PAGE_SIZE * token_bytes * num_layers)
    pages = jax.eval_shape(lambda: init_pages(num_pages, num_kv_heads, PAGE_SIZE, head_dim, dtype))
    where = (
        array("int32", SEQUENCES, MAX_PAGES),
        array("int32", SEQUENCES),
        array("int32", SEQUENCES + 1),
    )
    return (pages,) * num_layers, where


def tokens(shape, dtype, num_tokens):
    num_heads, num_kv_heads, head_dim = shape
    dtype = "bfloat16" if jnp.dtype(dtype).itemsize == 1 else dtype
    kv = array(dtype, num_tokens, num_kv_heads, head_dim)
    return array(dtype, num_tokens, num_heads, head_dim), kv, kv


def ops(shape, dtype):
    """name -> (function, arguments), the layers of pages first."""
    layers, where = problem(shape, dtype)
    q, k, v = tokens(shape, dtype, TOKENS)
    ids = array("int32", COPIES)

    def decode(layers, q, k, v, *where):
        return attend(q, k, v, layers[0], *where, max_query_len=1)[:2]

    return {
        "write": (lambda layers, *arguments: write(layers[0], *arguments), (layers, k, v, *where)),
        "decode": (decode, (layers, *tokens(shape, dtype, SEQUENCES), *where)),
        "prefill": (lambda layers, q, k, v, *where: attend(q, k, v, layers[0], *where)[:2], (layers, q, k, v, *where)),
        "copy": (lambda layers, *ids: copy(layers[0], *ids), (layers, ids, ids)),
    }


def steps_in_a_loop(layers, q, k, v, *where):
    """Several layers, several steps: what a decode loop does."""
    table, lengths, starts = where

    def step(i, carry):
        layers, q = carry
        layers = list(layers)
        for j, pages in enumerate(layers):
            q, layers[j], _ = attend(q, k, v, pages, table, lengths + i, starts, max_query_len=1)
        ids = lengths[:COPIES]
        layers = [copy(pages, ids, ids + 1) for pages in layers]
        return tuple(layers), q

    return jax.lax.fori_loop(0, lengths[0], step, (layers, q))


def check(function, arguments, device=None):
    sharding = device and SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    memory = jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    pool_bytes = sum(pages.num_bytes for pages in arguments[0])
    assert memory.alias_size_in_bytes == pool_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < 0.02 * pool_bytes, f"{memory.temp_size_in_bytes} bytes of temporaries"


@pytest.fixture(scope="module")
def v6e():
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=abstract)):
        yield device


OPS = ["write", "decode", "prefill", "copy"]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_on_a_cpu_no_op_copies_the_pool(dtype, name):
    function, arguments = ops(SHAPES[0], dtype)[name]
    check(function, arguments)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", *(pytest.param(x, marks=pytest.mark.long) for x in DTYPES[:3])])
def test_on_a_cpu_no_loop_over_layers_copies_the_pool(dtype):
    layers, where = problem(SHAPES[1], dtype, num_layers=2)
    check(steps_in_a_loop, (layers, *tokens(SHAPES[1], dtype, SEQUENCES), *where))


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_tpu_v6e_no_op_copies_the_pool(dtype, name, v6e):
    function, arguments = ops(SHAPES[0], dtype)[name]
    check(function, arguments, v6e)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_tpu_v6e_no_loop_over_layers_copies_the_pool(dtype, v6e):
    layers, where = problem(SHAPES[0], dtype, num_layers=2)
    check(steps_in_a_loop, (layers, *tokens(SHAPES[0], dtype, SEQUENCES), *where), v6e)


def test_blocks_have_no_more_rows_than_a_sequence_may_have_queries():
    """Or 16 continuations of 16 tokens would cost as much as 16 of 128."""
    layers, where = problem(SHAPES[1], "float32")
    arguments = *tokens(SHAPES[1], "float32", 256), layers[0], *where

    def flops(longest):  # of each loop's body once
        step = functools.partial(attend, max_query_len=longest)
        cost = jax.jit(step).lower(*arguments).cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert flops(16) < flops(128) / 2


def test_all_layers_of_a_step_share_one_work_list():
    def step(layers, q, k, v, *where):
        layers = list(layers)
        for i, pages in enumerate(layers):
            q, layers[i], _ = attend(q, k, v, pages, *where, max_query_len=1)
        return q, layers

    def work_lists(num_layers):
        """Instructions of the compiled step that sum up its items."""
        layers, where = problem(SHAPES[1], "float32", num_layers)
        compiled = jax.jit(step).lower(layers, *tokens(SHAPES[1], "float32", SEQUENCES), *where).compile()
        return (compiled.as_text() or "").count("list_items/reduce_sum")

    assert work_lists(1) == work_lists(2) > 0
