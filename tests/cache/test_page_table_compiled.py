"""What XLA makes of a page table: a donated loop copies nothing of its size, and a TPU compiler takes seconds."""

import operator
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.page_table import PageTable, Reservation
from table_model import CONFIG, TRANSITIONS, S


def publish_attach_drop(table: PageTable) -> PageTable:
    table, handle = table.publish(1, 3)
    table, _ = table.attach(2, handle)
    return table.drop(handle)


def serve(table: PageTable) -> PageTable:
    """A decode step with continuous batching: the finished leave, prompts of 64 tokens take their rows."""
    table = table.release(table.lengths >= 1000)
    return table.reserve(jnp.where(table.lengths == 0, 64, 1))[0]


STEPS = {
    "reserve": lambda table: table.reserve(table.lengths % 7)[0],
    "reserve by priority": lambda table: table.reserve(jnp.ones_like(table.lengths), table.lengths)[0],
    "release": lambda table: table.release(table.lengths > 30),
    "truncate": lambda table: table.truncate(table.lengths // 2),
    "slide": lambda table: table.slide(5),
    "fork": lambda table: table.fork(jnp.arange(4), jnp.arange(4) + table.version)[0],
    "handles": publish_attach_drop,
    "serve": serve,
}


def compile_loop(step, table: PageTable) -> Any:
    loop = jax.jit(lambda table: lax.fori_loop(0, 100, lambda _, table: step(table), table), donate_argnums=0)
    return loop.lower(table).compile()


def shapes(num_pages: int, num_rows: int, max_pages: int) -> PageTable:
    return jax.eval_shape(lambda: PageTable.create(CacheConfig(1, 1, 128, num_pages, num_rows, max_pages)))


@pytest.mark.parametrize("name", STEPS)
def test_no_copy_of_the_table_in_a_loop(name):
    compiled = compile_loop(STEPS[name], shapes(8192, 64, 32))
    copies = re.findall(r"s32\[(?:8192|64,32)\]\S* copy\(", compiled.as_text())
    assert not copies
    assert compiled.memory_analysis().temp_size_in_bytes < 40_000  # the table takes 74,000 bytes


@pytest.mark.parametrize("name", STEPS)
def test_no_host_callbacks(name):
    text = jax.jit(STEPS[name]).lower(shapes(64, 8, 4)).as_text()
    assert "stablehlo" in text and "callback" not in text and "custom_call" not in text


def test_a_table_is_vmapped_over_replicas():
    """Data-parallel replicas: cond becomes select, the results stay."""
    tables = jax.tree.map(lambda x: jnp.stack([x, x]), PageTable.create(CONFIG))
    new = jnp.array([[5, 1, 0, 0, 0, 0], [0, 0, 2 * S, 0, 0, 0]], jnp.int32)
    tables, reservation = jax.jit(jax.vmap(PageTable.reserve))(tables, new)
    for i in range(2):
        expected, _ = TRANSITIONS.reserve(PageTable.create(CONFIG), new[i])
        replica = jax.tree.map(operator.itemgetter(i), tables)
        assert jax.tree.all(jax.tree.map(np.array_equal, replica, expected))
    assert isinstance(reservation, Reservation)


def test_a_table_is_traced_for_its_shapes_alone():
    shapes = jax.eval_shape(lambda: PageTable.create(CacheConfig(1, 1, 128, 131072, 1024, 128)))
    shapes, _ = jax.eval_shape(PageTable.reserve, shapes, jax.ShapeDtypeStruct((1024,), jnp.int32))
    assert (shapes.num_pages, shapes.num_rows, shapes.max_length) == (131072, 1024, 2048)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", ["serve", "reserve by priority"])
def test_a_tpu_compiles_a_large_table_in_seconds(name):
    pytest.importorskip("libtpu", reason="the compiler of TPUs is not installed")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    on_tpu = jax.sharding.SingleDeviceSharding(device)
    table = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_tpu), shapes(131_072, 1024, 128))
    num_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(table))
    started = time.process_time()
    compiled = compile_loop(STEPS[name], table)
    assert time.process_time() - started < 60  # a sort over the pages alone would take 10 s or more
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes
    assert memory.temp_size_in_bytes < 2 * num_bytes
    assert not re.search(r"s32\[131072\]\S* sort\(", compiled.as_text())
