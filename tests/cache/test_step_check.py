"""A loop that goes wrong is told so, in a sentence."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import toy
from paged_jax import AttentionMetadata, Fault, KVCache, PagePool, PageTables, StepCheck
from paged_jax.attention import check_layer

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = toy.config()
reserve = jax.jit(lambda tables, new_tokens: tables.reserve(new_tokens)[0])


@pytest.fixture(scope="module")
def filled():
    """Rows of 5, 0, 3 and 0 tokens."""
    return reserve(PageTables.create(CONFIG), jnp.array([5, 0, 3, 0]))


ROWS = jnp.array([True, False, True, False])
ONE = jnp.array([1, 0, 1, 0])


def test_a_loop_that_reserves_in_every_step_passes(filled):
    check, tables = StepCheck(), filled
    check(tables, AttentionMetadata.ragged(tables, jnp.array([5, 0, 3, 0]), num_tokens=8))
    for _ in range(3):
        tables = reserve(tables, ONE)
        check(KVCache(tables, PagePool.create(CONFIG)), AttentionMetadata.decode(tables, ROWS))
    check(tables, AttentionMetadata.decode(tables, jnp.zeros(4, bool)))  # nobody takes part


def test_a_forgotten_reserve_is_named(filled):
    check = StepCheck()
    metadata = AttentionMetadata.decode(filled, ROWS)
    check(filled, metadata)
    with pytest.raises(
        ValueError,
        match="the tables have not changed since the last step, but this one computes 2 tokens: reserve room",
    ):
        check(filled, AttentionMetadata.decode(filled, ROWS))


def test_metadata_of_the_last_step_is_named(filled):
    metadata = AttentionMetadata.decode(filled, ROWS)
    with pytest.raises(ValueError, match="row 0 has 6 tokens, but the metadata was built when it had 5: build it anew"):
        StepCheck()(reserve(filled, ONE), metadata)
    with pytest.raises(ValueError, match="the metadata has 2 sequences, the tables 4 rows"):
        StepCheck()(filled, AttentionMetadata.ragged(filled, jnp.array([1, 1]), 2, rows=jnp.array([0, 2])))


def test_a_consumed_cache_is_named(filled):
    consumed = jax.tree.map(jnp.copy, filled)
    jax.jit(lambda tables: tables, donate_argnums=0)(consumed)
    with pytest.raises(ValueError, match="this cache was consumed: .*go on with the cache that the call returned"):
        StepCheck()(consumed, AttentionMetadata.decode(filled, ROWS))


def test_it_works_inside_jit_by_a_callback(filled):
    check = StepCheck()

    @jax.jit
    def step(tables):
        metadata = AttentionMetadata.decode(tables, ROWS)
        jax.debug.callback(check, tables, metadata)
        return metadata.positions

    jax.block_until_ready(step(filled))
    jax.effects_barrier()
    assert check.version == int(filled.groups[0].version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=jnp.ones((4, 4, 16), jnp.int32)), "q is int32: queries, keys and values are floating-point numbers"),
        (dict(k=jnp.ones((3, 2, 16))), "k has 3 tokens, but the metadata of this step 4: give it one for each token"),
        (dict(v=jnp.ones((1, 4, 2, 16))), r"v has shape \(1, 4, 2, 16\): the new tokens of all sequences lie packed"),
        (dict(metadata="tables"), "metadata is an object of type str: build it from the page tables"),
        (dict(pool=None), "pool is an object of type NoneType: pass the PagePool, which is cache.pool"),
    ],
)
def test_a_layer_that_does_not_fit_the_step_is_named(filled, change, message):
    arguments = dict(q=jnp.ones((4, 4, 16)), k=jnp.ones((4, 2, 16)), v=jnp.ones((4, 2, 16)))
    arguments |= dict(pool=PagePool.create(CONFIG), metadata=AttentionMetadata.decode(filled, ROWS))
    check_layer(**arguments)
    check_layer(**(arguments | dict(k=None, v=None)))
    with pytest.raises(ValueError, match=message):
        check_layer(**(arguments | change))


AS_A_USER = """
import jax.numpy as jnp
from paged_jax import AttentionMetadata, CacheConfig, KVCache, paged_attention

config = CacheConfig(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=8, max_sequences=2, max_pages_per_sequence=4)
cache = KVCache.create(config)
metadata = AttentionMetadata.decode(cache.tables, jnp.array([True, True]))
paged_attention(*[jnp.ones((3, n, 16)) for n in (4, 2, 2)], cache.pool, metadata, 0)
"""


def test_a_user_reads_the_sentence_where_nothing_checks_annotations():
    result = subprocess.run([sys.executable, "-c", AS_A_USER], capture_output=True, text=True, cwd=ROOT)
    assert (
        result.stderr.strip()
        .split("\n")[-1]
        .startswith("ValueError: q has 3 tokens, but the metadata of this step 2: give it one for each token")
    )


def test_handles_are_passed_as_publish_gave_them(filled):
    tables, handles = filled.publish(0, 4)
    for wrong, given in ((handles[0], "a PageHandle"), (handles * 2, "2 handles"), (None, "a NoneType")):
        for use in (tables.drop, lambda handles: tables.attach(1, handles)):
            with pytest.raises(
                ValueError, match=f"a tuple of 1, one handle for each group of layers, got {given}: pass"
            ):
                use(wrong)


def test_printed_tables_name_what_was_refused(filled):
    tables = reserve(filled, jnp.array([1000, 0, 0, 0]))
    assert Fault(int(tables.fault)) == Fault.ROW_FULL and "refused since clear_fault: <Fault.ROW_FULL: 2>" in repr(
        tables
    )
