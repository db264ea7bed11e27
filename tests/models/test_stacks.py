"""Layers in a loop over stacked weights: the same decoder, in and out of checkpoints, whole or split over devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from paged_run import grant
from test_decoder import make_decoder
from tiny import EXPERTS, TINY

from paged_jax import AttentionMetadata, CacheConfig, PagePool, PageTables, models
from paged_jax.models.checkpoint import decoder_config
from paged_jax.models.stacks import layer_numbers, unstacked

# Two periods of two windows and a layer that sees everything, then a layer more; the pages of the windows' groups lie
# at distances of 2 and 1.
HYBRID = models.DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=7, num_heads=2, num_kv_heads=1, head_dim=8,
    qk_norm=True, windows=(4, 4, None, 4, 4, None, 4),
)  # fmt: skip
PLAIN = dataclasses.replace(HYBRID, num_layers=3, windows=())


def stack_like(plain: models.Decoder, period: int) -> models.Decoder:
    """The decoder with the same weights and a period."""
    decoder = nnx.eval_shape(lambda: models.Decoder(plain.config, period=period, rngs=nnx.Rngs(0)))
    flat = dict(nnx.to_flat_state(nnx.state(plain)))
    for path, leaf in nnx.to_flat_state(nnx.state(decoder)):
        parts = unstacked(".".join(map(str, path)), plain.config.num_layers, period)
        paths = [tuple(int(x) if x.isdigit() else x for x in part.split(".")) for part in parts]
        values = np.stack([flat[path][...] for path in paths])
        leaf.set_value(jnp.asarray(values[0] if None in parts.values() else values))
    return decoder


@functools.cache
def pair(config: models.DecoderConfig, period: int) -> tuple[models.Decoder, models.Decoder]:
    plain = make_decoder(config)
    return plain, stack_like(plain, period)


def test_which_layers_a_period_stacks():
    assert layer_numbers(3, None) == ((0,), (1,), (2,))
    assert layer_numbers(3, 1) == ((0, 1, 2),)
    gemma3 = layer_numbers(26, 6)
    assert gemma3[0] == (0, 6, 12, 18) and gemma3[5] == (5, 11, 17, 23) and gemma3[6:] == ((24,), (25,))
    assert unstacked("layers.5.attn.q.weight", 26, 6)["layers.17.attn.q.weight"] == 2
    assert unstacked("layers.7.attn.q.weight", 26, 6) == {"layers.25.attn.q.weight": None}
    assert unstacked("norm.weight", 26, 6) == {"norm.weight": None}


def test_the_period_of_a_pattern_of_windows():
    def period(*windows):
        return dataclasses.replace(PLAIN, num_layers=len(windows), windows=windows).period

    assert PLAIN.period == 1 and HYBRID.period == 3
    assert period(8, 8, 8) == 1
    assert period(8, None, 8, None) == 2
    assert period(*((8,) * 5 + (None,)) * 4, 8, 8) == 6
    assert period(None, None, 8, 8) == 4  # nothing repeats


@pytest.mark.parametrize(
    "config, period",
    [
        (HYBRID, 3),
        pytest.param(PLAIN, 1, marks=pytest.mark.long),  # the loop and the layers after it are those of the hybrid
        pytest.param(PLAIN, 2, marks=pytest.mark.long),
    ],
    ids=["hybrid", "plain", "two"],
)
def test_a_loop_over_layers_computes_what_the_layers_compute(config, period):
    """Over pages, whose windows give some up; without a cache; and the gradient of that."""
    plain, stacked = pair(config, period)
    tokens = np.random.default_rng(0).integers(0, 32, 12, np.int32)
    expected = jax.jit(plain.dense)(tokens)
    np.testing.assert_allclose(jax.jit(stacked.dense)(tokens), expected, atol=1e-5)
    # Chunks of other lengths sum in another order: that alone moves these logits, which span 7, by 7e-6.
    atol = 1e-5 * np.ptp(expected)
    assert np.ptp(expected) > 1

    sizes: dict[str, Any] = dict(num_pages=8, max_sequences=1, max_pages_per_sequence=4, page_size=4, dtype="float32")
    cache = CacheConfig(config.num_layers, 1, 8, windows=config.windows, **sizes)
    run = jax.jit(stacked)
    tables, pool = PageTables.create(cache), PagePool.create(cache)
    for start in (0, 6):
        tables, _, metadata = grant(tables, jnp.array([6]), 6)
        metadata = dataclasses.replace(metadata, logits_at=jnp.arange(6))
        logits, pool = run(tokens[start : start + 6], pool, metadata)
        np.testing.assert_allclose(logits, expected[start : start + 6], atol=atol)


def test_a_loop_over_layers_has_the_gradients_of_the_layers():
    plain, stacked = pair(dataclasses.replace(PLAIN, num_layers=2), 1)

    def gradient(decoder):
        graph, params = nnx.split(decoder)
        tokens = jnp.arange(12)
        return jax.jit(jax.grad(lambda params: jnp.square(nnx.merge(graph, params).dense(tokens)).mean()))(params)

    of_plain, of_stack = dict(nnx.to_flat_state(gradient(plain))), gradient(stacked)
    for path, leaf in nnx.to_flat_state(of_stack):
        paths = [(*path[:1], i, *path[2:]) for i in range(2)] if path[0] == "layers" else [path]
        expected = np.stack([of_plain[each][...] for each in paths])
        expected = expected if path[0] == "layers" else expected[0]
        np.testing.assert_allclose(leaf[...], expected, atol=1e-5 * np.abs(expected).max() + 1e-6)


def test_the_loop_traces_a_period_of_layers_and_writes_the_pool_in_place():
    def lowered(num_periods: int):
        windows = (4, None) * num_periods
        config = dataclasses.replace(HYBRID, num_layers=2 * num_periods, windows=windows)
        decoder = nnx.eval_shape(lambda: models.Decoder(config, period=2, rngs=nnx.Rngs(0)))
        graph, params = nnx.split(decoder)
        cache = CacheConfig(len(windows), 1, 8, 30_000, 2, 8, dtype="float32", windows=windows, window_pages=30_000)
        pool, tables = jax.eval_shape(lambda: (PagePool.create(cache), PageTables.create(cache)))
        metadata = jax.eval_shape(lambda tables: AttentionMetadata.decode(tables, jnp.ones(2, bool)), tables)
        step = jax.jit(lambda pool, *rest: nnx.merge(graph, rest[0])(rest[1], pool, rest[2]), donate_argnums=0)
        return step.lower(pool, params, jnp.arange(2), metadata), pool.num_bytes

    (short, _), (long, pool_bytes) = lowered(2), lowered(5)
    assert long.as_text().count("\n") == short.as_text().count("\n")
    memory = long.compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool_bytes and memory.temp_size_in_bytes < 0.02 * pool_bytes


# ---- checkpoints -----------------------------------------------------------------------------------------------------

CHECKPOINTS = {
    "llama": dict(num_hidden_layers=3),
    "phi3, fused": dict(model_type="phi3", num_hidden_layers=3),
    "gemma3, a rest": dict(
        model_type="gemma3_text", num_hidden_layers=5, sliding_window=4, sliding_window_pattern=2,
        query_pre_attn_scalar=8, hidden_activation="gelu_pytorch_tanh",
    ),
    "experts": EXPERTS | dict(num_hidden_layers=3),
}  # fmt: skip
FOUR_KV_HEADS = dict(num_attention_heads=8, num_key_value_heads=4)


def make(folder, **changes):
    hf_config = TINY | FOUR_KV_HEADS | changes
    models.save(folder, hf_config, nnx.state(make_decoder(decoder_config(hf_config))), num_shards=2)
    return hf_config


def leaves(model: models.Model) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(model.params)}


def assert_same_weights(stacked: dict[str, jax.Array], plain: dict[str, jax.Array], config: models.DecoderConfig):
    seen = set()
    for path, leaf in stacked.items():
        stack = np.asarray(leaf)
        for part, index in unstacked(path, config.num_layers, config.period).items():
            np.testing.assert_array_equal(stack if index is None else stack[index], plain[part], err_msg=part)
            seen.add(part)
    assert seen == plain.keys()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_into_stacks_and_out_of_them(tmp_path, name):
    hf_config = make(tmp_path / "a", **CHECKPOINTS[name])
    plain, stacked = models.load(tmp_path / "a"), models.load(tmp_path / "a", "float32", stacked=True)
    of_plain = leaves(plain)
    assert_same_weights(leaves(stacked), of_plain, plain.config)
    models.save(tmp_path / "b", hf_config, stacked.params)
    for path, leaf in leaves(models.load(tmp_path / "b")).items():
        np.testing.assert_array_equal(leaf, of_plain[path], err_msg=path)


def spec_of(leaf: jax.Array) -> tuple:
    assert isinstance(leaf.sharding, NamedSharding)
    return tuple(leaf.sharding.spec)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_stack_is_split_as_its_layers_are(tmp_path, name):
    make(tmp_path, **CHECKPOINTS[name])
    mesh = jax.make_mesh((4,), ("model",))
    model = models.load(tmp_path, sharding=mesh)
    config, plain = model.config, leaves(model)
    stacked = leaves(models.load(tmp_path, sharding=mesh, stacked=True))
    assert_same_weights(stacked, plain, config)
    for path, leaf in stacked.items():
        for part, index in unstacked(path, config.num_layers, config.period).items():
            spec = spec_of(plain[part])
            expected = spec if index is None else (None, *spec) if spec else ()
            assert spec_of(leaf) == expected, path


def test_weights_on_a_cpu_are_not_stacked_unless_asked(tmp_path):
    make(tmp_path, **CHECKPOINTS["llama"])
    assert leaves(models.load(tmp_path))["layers.2.attn_norm.weight"].shape == (16,)
    assert leaves(models.load(tmp_path, stacked=True))["layers.0.attn_norm.weight"].shape == (3, 16)


def test_layers_that_do_not_repeat_are_not_stacked(tmp_path):
    qwen = dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    make(tmp_path, num_hidden_layers=3, **qwen)
    assert leaves(models.load(tmp_path, stacked=True))["layers.2.attn_norm.weight"].shape == (16,)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "match"),
    [
        (
            2,
            "the layers do not repeat after period=2: use a multiple of 3, or None",
        ),
        (0, "period=0 must be at least 1 and at most num_layers=7"),
        (8, "period=8 must be at least 1 and at most num_layers=7"),
    ],
)
def test_a_period_that_the_layers_do_not_have(period, match):
    with pytest.raises(ValueError, match=match):
        models.Decoder(HYBRID, period=period, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("pool", [dict(array_per_layer=True), dict(windows=(4,) + (None,) * 6)])
def test_a_pool_whose_layers_do_not_lie_at_equal_distances(pool):
    cache = CacheConfig(7, 1, 8, num_pages=8, max_sequences=1, max_pages_per_sequence=4, dtype="float32", **pool)
    metadata = AttentionMetadata.decode(PageTables.create(cache), jnp.ones(1, bool))
    with pytest.raises(ValueError, match="runs its layers in a loop of 3, .* windows of the decoder .* period=None"):
        jax.eval_shape(pair(HYBRID, 3)[1], jnp.zeros(1, jnp.int32), PagePool.create(cache), metadata)


def test_a_weight_that_nobody_said_how_to_split():
    place = models.tensor_parallel(PLAIN, jax.make_mesh((1,), ("model",)))
    with pytest.raises(ValueError, match="layers.0.attn.gate.weight is no weight of this decoder: say in SPLIT_AXES"):
        place("layers.0.attn.gate.weight")
