"""The decoder: paged against dense, layer groups, and that every option of its config is live."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paged_run import PAGE_SIZE, PagedRun, grant

from paged_jax import AttentionMetadata, CacheConfig, CacheReport, PagePool, PageTables, models
from paged_jax.models.rope import Rope

SMALL = models.DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    qk_norm=True,
    windows=(512, None),
)


def make_decoder(config: models.DecoderConfig, **options) -> models.Decoder:
    """A decoder with weights large enough that its layers matter."""
    decoder = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(decoder)):
        neutral = 1.0 if "norm" in str(path) and not config.unit_offset_norm else 0.0
        leaf.set_value(jnp.asarray((neutral + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)))
    return decoder


@functools.cache
def load_demo(dtype: str = "float32"):
    """The demo model, its layers in a loop, and its jitted dense pass over sequences padded to 256 tokens."""
    model = models.load(models.DEMO, dtype, stacked=True)
    dense = jax.jit(model.dense_forward)

    def logits_of(tokens) -> np.ndarray:
        padded = np.zeros(256, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(dense(model.params, jnp.asarray(padded)))[: len(tokens)]

    return model, logits_of


def test_the_demo_writes_the_same_text_paged_and_dense():
    model, logits_of = load_demo()
    texts = ("import os\n", "class Queue:\n    def __init__(self", "x", "def main(argv):\n" * 16)
    prompts = [model.tokenizer.encode(text) for text in texts]
    run = PagedRun(model, len(prompts), max_length=256, step_tokens=256)
    paged = run.greedy(run.prefill(prompts, chunk=48), 24)
    assert run.num_traces == 2  # growing sequences compile nothing anew: one prefill, one decode step
    for prompt, tokens in zip(prompts, paged, strict=True):
        logits = logits_of([*prompt, *tokens])
        np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), tokens)


def test_the_demo_is_small_and_has_learnt_python():
    assert sum(path.stat().st_size for path in models.DEMO.iterdir()) < 8_000_000
    model, logits_of = load_demo()
    text = 'def read(self, path):\n    with open(path, "rb") as file:\n        return file.read()\n'
    tokens = model.tokenizer.encode(text)
    assert model.tokenizer.decode(tokens) == text
    assert model.tokenizer.vocab_size == model.config.vocab_size
    assert tokens[0] == model.stop_tokens[0]
    logits = logits_of(tokens)[:-1].astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]
    assert losses.mean() < 0.5 * np.log(model.config.vocab_size)


def test_bfloat16_stays_near_float32():
    (_, wide), (_, narrow) = load_demo("float32"), load_demo("bfloat16")
    tokens = np.arange(3, 35)
    expected, logits = wide(tokens), narrow(tokens)
    assert logits.dtype == np.float32
    # 8 bits of mantissa: 2**-8 a rounding, a few roundings a layer
    assert np.abs(logits - expected).max() < 0.05 * np.ptp(expected)
    assert np.abs(logits - expected).mean() < 0.01 * np.ptp(expected)


@pytest.mark.parametrize("weights, pages, bound", [("float32", "int8", 0.03), ("bfloat16", "bfloat16", 0.05)])
def test_narrow_pages_stay_near_float32(weights, pages, bound):
    """int8: 7 bits of every key and value; bfloat16: 8 bits of every activation as well."""
    expected = load_demo()[1](np.arange(3, 35))[-1]
    run = PagedRun(load_demo(weights)[0], 1, 64, 8, dtype=pages)
    logits = run.prefill([list(range(3, 34))], chunk=8)
    assert np.isfinite(logits).all()
    logits = run.step([[34]], 8, 8)[0]
    assert np.abs(logits - expected).max() < bound * np.ptp(expected)
    assert np.abs(logits - expected).max() > 0


def as_model(decoder: models.Decoder) -> Any:
    """What PagedRun needs of a model."""
    graph, params = nnx.split(decoder)
    config = decoder.config
    return types.SimpleNamespace(
        forward=lambda params, *step: nnx.merge(graph, params)(*step),
        params=params,
        cache_config=functools.partial(
            CacheConfig, config.num_layers, config.num_kv_heads, config.head_dim, windows=config.windows
        ),
    )


def test_a_step_writes_the_donated_pool_in_place():
    sizes = dict(hidden_size=192, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64)
    config = dataclasses.replace(SMALL, windows=(), **sizes)
    run = PagedRun(as_model(make_decoder(config)), 4, max_length=16 * 1024, step_tokens=4)
    _, _, metadata = jax.eval_shape(lambda tables: grant(tables, jnp.ones(4, jnp.int32), 4, 1), run.tables)
    arguments = (run.model.params, jnp.zeros(4, jnp.int32), run.pool, metadata)
    analysis = run.forward.lower(*arguments).compile().memory_analysis()
    assert analysis is not None and run.pool.num_bytes > 60_000_000
    assert analysis.alias_size_in_bytes == run.pool.num_bytes
    assert analysis.temp_size_in_bytes < 0.1 * run.pool.num_bytes


def test_a_hybrid_holds_the_pages_of_its_window_and_draws_the_tokens_of_a_dense_forward():
    """Context 4096, window 512: prefill in chunks, then decode steps."""
    length, window, chunk, num_drawn = 4096, 512, 256, 40
    decoder = make_decoder(SMALL)
    hybrid = PagedRun(as_model(decoder), 1, length, step_tokens=chunk)
    most, rng = -(-window // PAGE_SIZE) + 1, np.random.default_rng(0)
    tokens = rng.integers(0, 64, length - num_drawn).tolist()
    noise = rng.gumbel(size=(num_drawn, 64))  # a draw, of which random weights do not repeat one token
    logits = hybrid.prefill([tokens], chunk)
    for i in range(num_drawn):
        everything, local = (report := CacheReport.measure(hybrid.tables, hybrid.config)).groups
        if i:  # a prefill step holds its chunk, too
            assert everything.pages_in_use == -(-everything.tokens // PAGE_SIZE) and local.pages_in_use <= most
        assert report.full_bytes == 2 * everything.pages_in_use * hybrid.config.layer_page_bytes
        tokens.append(int((logits[0] + noise[i]).argmax()))
        logits = hybrid.step([tokens[-1:]], chunk, chunk)
    assert report.saved_by_windows > 0.43  # one layer of two keeps 33 pages of 256
    # The pool of the local layer holds a window and a prefill step, a quarter of the sequence.
    assert hybrid.config.groups[1].num_pages < 0.27 * length / PAGE_SIZE
    expected = np.asarray(jax.jit(decoder.dense)(jnp.array(tokens)))[-num_drawn - 1 : -1] + noise
    assert tokens[-num_drawn:] == expected.argmax(-1).tolist() and len(set(tokens[-num_drawn:])) > 8


def test_logits_are_those_of_the_tokens_that_were_asked_for():
    """By default the last new token of each sequence; any others, in any order."""
    decoder = make_decoder(dataclasses.replace(SMALL, num_layers=1, windows=()))
    config = CacheConfig(1, 1, 8, num_pages=9, max_sequences=2, max_pages_per_sequence=4, dtype="float32")
    _, _, metadata = grant(PageTables.create(config), jnp.array([5, 3]), 10, max_query_len=5)
    prompts = np.random.default_rng(0).integers(0, 64, (2, 5))
    tokens = jnp.asarray([*prompts[0], *prompts[1, :3], 0, 0], jnp.int32)
    expected = np.asarray(jax.jit(decoder.dense)(jnp.asarray(prompts)))
    run, pool = jax.jit(decoder), PagePool.create(config)
    for at, where in ((metadata.logits_at, [(0, 4), (1, 2)]), (jnp.array([6, 0]), [(1, 1), (0, 0)])):
        logits, _ = run(tokens, pool, dataclasses.replace(metadata, logits_at=at))
        np.testing.assert_allclose(logits, [expected[i] for i in where], atol=1e-5)


def test_an_implementation_reaches_the_attention_of_every_layer():
    config = CacheConfig(2, 1, 8, num_pages=4, max_sequences=1, max_pages_per_sequence=2, dtype="float32")
    metadata = jax.eval_shape(lambda: AttentionMetadata.decode(PageTables.create(config), jnp.ones(1, bool)))

    def trace(implementation):
        decoder = make_decoder(SMALL, implementation=implementation)
        return str(jax.make_jaxpr(decoder)(jnp.zeros(1, jnp.int32), PagePool.create(config), metadata))

    assert trace("reference") != trace("xla") == trace(None)
    with pytest.raises(NotImplementedError, match="pallas_tpu"):
        trace("pallas_tpu")
    model = models.load(models.DEMO, implementation="fastest")
    pool = PagePool.create(model.cache_config(num_pages=4, max_sequences=1, max_pages_per_sequence=2))
    with pytest.raises(ValueError, match="implementation must be None or one of .*, got 'fastest'"):
        jax.eval_shape(model.forward, model.params, jnp.zeros(1, jnp.int32), pool, metadata)


def test_a_pool_that_does_not_fit_the_layers_is_refused():
    decoder = nnx.eval_shape(lambda: models.Decoder(SMALL, rngs=nnx.Rngs(0)))
    config = CacheConfig(1, num_kv_heads=1, head_dim=8, num_pages=4, max_sequences=1, max_pages_per_sequence=2)
    metadata = jax.eval_shape(lambda: AttentionMetadata.decode(PageTables.create(config), jnp.ones(1, bool)))
    with pytest.raises(ValueError, match="the pool has pages for 1 layers, but the decoder has 2: create it"):
        jax.eval_shape(decoder, jnp.zeros(1, jnp.int32), PagePool.create(config), metadata)


def test_a_config_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="windows has 1 entries for num_layers=2: give one for each layer"):
        dataclasses.replace(SMALL, windows=(512,))
    with pytest.raises(ValueError, match="num_heads=2 is not a multiple of num_kv_heads=3: every KV head"):
        dataclasses.replace(SMALL, num_kv_heads=3)
    with pytest.raises(ValueError, match="rope kind 'ntk' is not one of default, .*longrope: use one"):
        Rope(kind="ntk").frequencies(8)


EVERYTHING = models.DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-2,
    unit_offset_norm=True,
    qk_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    rope=Rope(theta=100.0),
    local_rope=Rope(theta=7.0),
    unturned_layers=(2,),
    windows=(5, None, None),
    attention_scale=0.7,
    attention_soft_cap=1.5,
    logit_soft_cap=0.8,
    logit_scale=0.6,
    embedding_scale=3.0,
    residual_scale=0.7,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    sinks=True,
    tie_embeddings=True,
)
SHAPES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def test_every_option_changes_the_logits():
    """An option that the decoder ignored would pass every comparison in which it happens not to matter."""
    plain = models.DecoderConfig(**{name: getattr(EVERYTHING, name) for name in SHAPES})
    decoder = make_decoder(EVERYTHING)
    tokens = jnp.arange(24, dtype=jnp.int32)
    expected = decoder.dense(tokens)  # not jitted: the variants share the compiled operations
    # What owns weights of its own must leave them unused, what does not must use the same ones otherwise.
    for option in dataclasses.fields(EVERYTHING):
        if getattr(EVERYTHING, option.name) == getattr(plain, option.name):
            continue
        other = dataclasses.replace(EVERYTHING, **{option.name: getattr(plain, option.name)})
        twin = make_decoder(other)
        shared = dict(nnx.to_flat_state(nnx.state(decoder)))
        for path, leaf in nnx.to_flat_state(nnx.state(twin)):
            if path in shared:
                leaf[...] = shared[path][...]
        difference = jnp.abs(twin.dense(tokens) - expected).max()
        assert difference > 1e-3 * jnp.ptp(expected), option.name
