"""Decoders in nnx, in linen and as plain pytrees: over the paged cache they compute what they compute without one."""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import by_hand
import jax
import jax.numpy as jnp
import linen_paged
import linen_stock
import nnx_paged
import nnx_stock
import numpy as np
import pytest
import pytree_paged
from flax import linen as nn
from flax import nnx

import paged_jax.flax.linen as paged_linen
import paged_jax.flax.nnx as paged_nnx
from paged_jax import AttentionMetadata, CacheConfig, PagePool, PageTables
from paged_jax.flax import Step

HERE = pathlib.Path(__file__).parent
SIZES = VOCAB, WIDTH, LAYERS = 61, 32, 2
PROMPTS = [[5, 3, 1], [7, 7, 30, 2, 19, 60, 41, 8], [44], [9, 10, 11, 12, 13, 14, 15]]


@dataclasses.dataclass(frozen=True)
class Way:
    """A paged decoder and the same decoder without a cache: logits [T, V] of one sequence [T]."""

    name: str
    step: Step
    num_kv_heads: int
    dense: Callable[[jax.Array], jax.Array]
    traces: list[tuple[int, ...]]  # the shapes of the tokens each time that Flax's step is traced

    def config(self, **sizes) -> CacheConfig:
        defaults: dict[str, Any] = dict(
            num_pages=64, max_sequences=4, max_pages_per_sequence=16, page_size=4, dtype="float32",
            array_per_layer=self.name == "linen",
        )  # fmt: skip
        return CacheConfig(LAYERS, self.num_kv_heads, WIDTH // 4, **(defaults | sizes))


def make_weights(like):
    """Weights under which greedy decoding does not repeat one token."""
    rng = np.random.default_rng(3)

    def draw(w):
        return rng.normal(0, 3 * WIDTH**-0.5, w.shape) if w.ndim > 1 else np.ones(w.shape)

    return jax.tree.map(lambda w: jnp.asarray(draw(w).astype(w.dtype)), like)


@functools.cache
def way(name: str) -> Way:
    traces = []

    def call(model, tokens, metadata):
        traces.append(tokens.shape)
        return model(tokens, metadata)

    if name == "nnx":
        stock = nnx.eval_shape(lambda: nnx_stock.Decoder(*SIZES, nnx.Rngs(0)))
        paged = nnx.eval_shape(lambda: nnx_paged.Decoder(*SIZES, nnx.Rngs(0)))
        nnx.update(stock, make_weights(nnx.state(stock)))
        nnx.update(paged, nnx.state(stock))
        step, num_kv_heads = paged_nnx.paged_step(paged, call), 2
        dense = functools.partial(nnx.jit(nnx_stock.Decoder.__call__), stock)
    elif name == "linen":
        stock, paged = linen_stock.Decoder(*SIZES), linen_paged.Decoder(*SIZES)
        variables = make_weights(jax.eval_shape(stock.init, jax.random.key(0), jnp.zeros(4, jnp.int32)))
        step, num_kv_heads = paged_linen.paged_step(paged, variables, call), 4
        dense = functools.partial(jax.jit(stock.apply), variables)
    else:
        params = make_weights(jax.eval_shape(lambda: pytree_paged.init(jax.random.key(0), *SIZES)))
        step, num_kv_heads = Step(pytree_paged.forward, params), 4
        dense = functools.partial(jax.jit(dense_pytree), params)
    traces.clear()  # linen finds the layers by an abstract trace
    return Way(name, step, num_kv_heads, dense, traces)


def dense_pytree(params, tokens):
    x = params["embed"][tokens] + params["position"][: len(tokens)]
    for i in range(LAYERS):
        q, k, v = jnp.split((x @ params[f"qkv{i}"]).reshape(len(x), -1, WIDTH // 4), 3, axis=1)
        x = x + jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True).reshape(x.shape)
        x = x + jax.nn.gelu(x @ params[f"up{i}"]) @ params[f"down{i}"]
    return x @ params["embed"].T


@pytest.mark.parametrize("name", ["nnx", "linen", "pytree"])
def test_each_way_gives_the_tokens_of_the_decoder_without_a_cache(name):
    one = way(name)
    expected = [by_hand.without_cache(one.dense, prompt, 12) for prompt in PROMPTS]
    assert by_hand.serve(one.step, one.config(), PROMPTS, 12) == expected
    assert len({token for tokens in expected for token in tokens}) > 12, "greedy tokens that say little"


@pytest.mark.parametrize("example", sorted(HERE.glob("*_paged.py")), ids=lambda path: path.stem)
def test_an_example_has_under_30_lines(example):
    assert len(example.read_text().splitlines()) < 30


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_at_most_15_changed_lines_make_a_stock_decoder_paged(name):
    stock, paged = ((HERE / f"{name}_{kind}.py").read_text().splitlines() for kind in ("stock", "paged"))
    diff = [line for line in difflib.ndiff(stock, paged) if line[:2] in ("- ", "+ ")]
    assert 0 < len(diff) <= 15, "\n".join(diff)


# ---- one attention layer, to rounding --------------------------------------------------------------------------------


class One(nnx.Module):
    """An attention layer, called with the vectors that the tokens stand for; [1, T, D] where `batched`."""

    def __init__(self, attention_fn, rngs, batched=False):
        self.vectors = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, WIDTH)))
        self.attn = nnx.MultiHeadAttention(4, WIDTH, num_kv_heads=2, decode=False, attention_fn=attention_fn, rngs=rngs)
        self.batched = batched

    def __call__(self, tokens, metadata):
        x = self.vectors[tokens]
        x = self.attn(x[None], mask=metadata)[0] if self.batched else self.attn(x, mask=metadata)
        return x if metadata is None else x[metadata.logits_at]


class OneLinen(nn.Module):
    attention_fn: Callable

    @nn.compact
    def __call__(self, tokens, metadata):
        x = nn.Embed(VOCAB, WIDTH, embedding_init=nn.initializers.normal(1.0))(tokens)
        x = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=self.attention_fn)(x, mask=metadata)
        return x[metadata.logits_at] if isinstance(metadata, AttentionMetadata) else x


def attend(q, k, v, *, window: int | None = None, scale: float | None = None, **_):
    """Causal attention over one sequence, without a cache."""
    local = None if window is None else (window - 1, 0)
    options: dict[str, Any] = dict(is_causal=True, local_window_size=local, scale=scale)
    return jax.nn.dot_product_attention(q[None], k[None], v[None], **options)[0]


def one_layer(name: str, **options):
    """A step of one paged attention layer, and the same layer over a whole context."""
    if name == "linen":
        paged, dense = OneLinen(paged_linen.PagedCache(**options)), OneLinen(nn.dot_product_attention)
        variables = jax.jit(functools.partial(paged_linen.init, paged))(jax.random.key(0))
        return paged_linen.paged_step(paged, variables), 4, lambda t: dense.apply(variables, t, nn.make_causal_mask(t))
    dense = One(functools.partial(attend, **options), nnx.Rngs(0))
    paged = One(paged_nnx.PagedCache(**options), nnx.Rngs(0), batched=name == "nnx, batched")
    return paged_nnx.paged_step(paged), 2, lambda t: dense(t, None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("nnx", {}, marks=pytest.mark.long),  # as the decoders have it
        ("nnx, batched", {"window": 5, "scale": 0.5}),
        ("linen", {}),
    ],
)
def test_a_paged_layer_is_within_2e_6_of_dense_attention(name, options):
    step, num_kv_heads, dense = one_layer(name, **options)
    sizes: dict[str, Any] = dict(page_size=4, dtype="float32", array_per_layer=name == "linen")
    config = CacheConfig(1, num_kv_heads, WIDTH // 4, 32, 4, 8, **sizes)
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, VOCAB, (4, 24)).astype(np.int32)
    expected = np.stack(list(map(jax.jit(dense), contexts)))
    tables, pool = PageTables.create(config), PagePool.create(config)
    done, worst = np.zeros(4, np.int32), 0.0
    for query_lens in np.array([[5, 11, 0, 8], [3, 0, 9, 4], *[[1, 1, 1, 1]] * 8], np.int32):
        pieces = [c[d : d + n].tolist() for c, d, n in zip(contexts, done, query_lens, strict=True)]
        tables, metadata = by_hand.reserve(tables, by_hand.lengths(pieces), max_query_len=11)
        out, pool = step(by_hand.pack(pieces), pool, metadata)
        done += query_lens
        last = expected[np.arange(4), done - 1]
        worst = max(worst, float(np.max(np.abs(np.asarray(out) - last)[query_lens > 0])))
    assert worst <= 2e-6
    assert np.std(expected) > 0.1, "outputs so small that the bound says little"


# ---- layers with windows ---------------------------------------------------------------------------------------------


class Hybrid(nnx.Module):
    """Attention layers that see a window and all; the same metadata goes down to both."""

    def __init__(self, attention_fns, rngs):
        self.embed, self.head = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.layers = nnx.List([
            nnx.MultiHeadAttention(4, WIDTH, num_kv_heads=2, decode=False, attention_fn=function, rngs=rngs)
            for function in attention_fns
        ])  # fmt: skip

    def __call__(self, tokens, metadata=None):
        x = self.embed(tokens) * 8
        for layer in self.layers:
            x = x + layer(x, mask=metadata)
        return self.head(x if metadata is None else x[metadata.logits_at]) * 8


def test_layers_with_windows_keep_few_pages_and_give_the_same_tokens():
    dense = Hybrid([functools.partial(attend, window=5), attend], nnx.Rngs(0))
    expected = [by_hand.without_cache(jax.jit(dense), prompt, 16) for prompt in PROMPTS]
    step = paged_nnx.paged_step(Hybrid([paged_nnx.PagedCache(window=5), paged_nnx.PagedCache()], nnx.Rngs(0)))
    # 5 tokens touch at most 2 pages, and a prefilled prompt holds all of its own.
    config = way("nnx").config(windows=(5, None), window_pages=1 + 2 * 4)
    assert by_hand.serve(step, config, PROMPTS, 16) == expected
    assert len({token for tokens in expected for token in tokens}) > 12, "greedy tokens that say little"


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_a_step_compiles_once_for_growing_sequences_and_other_weights(name):
    one = way(name)
    step, config = one.step, one.config()
    by_hand.serve(step, config, PROMPTS, 1)
    one.traces.clear()
    tables, pool = PageTables.create(config), PagePool.create(config)
    old = pool
    seen = []
    for active in ([True, True, False, True], [True, False, True, True], [False, True, True, True]):
        pieces = [[3] if is_active else [] for is_active in active]
        tables, metadata = by_hand.reserve(tables, by_hand.lengths(pieces))
        logits, pool = step(by_hand.pack(pieces), pool, metadata)
        seen.append(np.asarray(logits)[3])
    assert old.arrays[0].data.is_deleted(), "the pool was copied, not donated"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(step.params))
    assert not np.allclose(seen[0], seen[1]), "the metadata of the first step was used again"
    other = dataclasses.replace(step, params=jax.tree.map(jnp.zeros_like, step.params))
    logits, pool = other(by_hand.pack(pieces), pool, metadata)
    assert not np.any(np.asarray(logits)), "the weights of the first step were used again"
    assert not one.traces


def test_new_weights_of_a_model_fit_its_step():
    model = nnx_paged.Decoder(*SIZES, nnx.Rngs(0))
    step = paged_nnx.paged_step(model)
    model.head.kernel[...] = 2 * model.head.kernel[...]
    new = paged_nnx.weights(model)
    assert jax.tree.structure(new) == jax.tree.structure(step.params)
    np.testing.assert_array_equal(new["head"]["kernel"], 2 * step.params["head"]["kernel"])


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_steps_in_a_loop_update_the_pool_in_place(name):
    step, config = way(name).step, way(name).config(num_pages=20_000, page_size=16)

    def run(params, tables, pool, tokens):
        def one_step(_, carry):
            tables, pool, tokens = carry
            tables, reservation = tables.reserve(jnp.ones(4, jnp.int32))
            metadata = AttentionMetadata.decode(tables, jnp.ones(4, bool))
            logits, pool = step.forward(params, tokens, pool.copy(reservation), metadata)
            return tables, pool, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, 16, one_step, (tables, pool, tokens))

    pool, tables = jax.eval_shape(lambda: (PagePool.create(config), PageTables.create(config)))
    arguments = step.params, tables, pool, jnp.arange(4)
    memory = jax.jit(run, donate_argnums=2).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool.num_bytes, "the pool is not updated in place"
    assert memory.temp_size_in_bytes < 0.02 * pool.num_bytes, "the pool is copied"


class Remat(nnx_paged.Decoder):
    def __call__(self, tokens, metadata):
        x = self.embed(tokens) + self.position(metadata.positions)
        for block in self.blocks:
            x = nnx.remat(nnx_paged.Block.__call__)(block, x, metadata)
        return self.head(x[metadata.logits_at])


class LinenRemat(nn.Module):
    @nn.compact
    def __call__(self, tokens, metadata):
        x = nn.Embed(VOCAB, WIDTH)(tokens)
        for _ in range(LAYERS):
            x = nn.remat(linen_paged.Block)()(x, metadata)
        return x[metadata.logits_at]


def remat_step(name: str) -> Step:
    """A step whose blocks run under the remat of Flax, with the weights of `way("nnx")` for nnx."""
    if name == "nnx":
        paged = nnx.eval_shape(lambda: Remat(*SIZES, nnx.Rngs(0)))
        nnx.update(paged, way("nnx").step.params)
        return paged_nnx.paged_step(paged)
    return paged_linen.paged_step(
        LinenRemat(), jax.eval_shape(lambda: paged_linen.init(LinenRemat(), jax.random.key(0)))
    )


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_pages_and_metadata_cross_the_remat_of_flax(name):
    step, config = remat_step(name), way(name).config()

    def run(params, pool):
        metadata = AttentionMetadata.decode(PageTables.create(config), jnp.ones(4, bool))
        return step.forward(params, jnp.arange(4), pool, metadata)

    trace = jax.make_jaxpr(run)(step.params, jax.eval_shape(lambda: PagePool.create(config)))
    assert str(trace).count("remat2[") == LAYERS
    assert len(trace.out_avals) == 1 + (1 if name == "nnx" else LAYERS)


def test_blocks_under_nnx_remat_over_an_array_for_each_layer_give_the_same_tokens():
    one = way("nnx")
    expected = by_hand.serve(one.step, one.config(), PROMPTS, 6)
    assert by_hand.serve(remat_step("nnx"), one.config(array_per_layer=True), PROMPTS, 6) == expected


class Scanned(nnx_paged.Decoder):
    """The blocks stacked, run by a scan that carries the pool."""

    def __init__(self, rngs, state_axes=None):
        super().__init__(*SIZES, rngs)
        self.axes = state_axes or nnx.StateAxes({paged_nnx.LentPool: nnx.Carry, ...: 0})
        make = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: nnx_paged.Block(WIDTH, rngs), in_axes=0, out_axes=0))
        self.blocks = make(rngs)

    def __call__(self, tokens, metadata):
        x = self.embed(tokens) + self.position(metadata.positions)
        run = nnx.scan(lambda block, x: block(x, metadata), in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
        return self.head(run(self.blocks, x)[metadata.logits_at])


def scanned_step(**options) -> Step:
    """The scanned decoder with the weights of `way("nnx")`."""
    scanned, params = nnx.eval_shape(lambda: Scanned(nnx.Rngs(0), **options)), way("nnx").step.params
    blocks = [params["blocks"][i] for i in range(LAYERS)]
    nnx.update(scanned, params | {"blocks": jax.tree.map(lambda *w: jnp.asarray(np.stack(w)), *blocks)})
    return paged_nnx.paged_step(scanned)


def test_blocks_under_nnx_scan_give_the_same_tokens():
    one = way("nnx")
    step, config = scanned_step(), one.config()
    expected = by_hand.serve(one.step, config, PROMPTS, 12)
    assert by_hand.serve(step, config, PROMPTS, 12) == expected
    metadata = jax.eval_shape(lambda: AttentionMetadata.decode(PageTables.create(config), jnp.ones(4, bool)))
    jaxpr = jax.make_jaxpr(step.forward)(step.params, jnp.arange(4), PagePool.create(config), metadata)
    assert str(jaxpr).count(" scan[") == 1, "the layers were unrolled"


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_over_a_mesh_each_device_attends_with_its_own_heads(name):
    step, config = way(name).step, way(name).config()

    def run(pool):
        metadata = AttentionMetadata.decode(PageTables.create(config), jnp.ones(4, bool))
        return step.forward(step.params, jnp.arange(4), pool, metadata)

    for mesh, num_split in ((jax.make_mesh((2, 2), ("data", "model")), LAYERS), (None, 0)):
        assert str(jax.make_jaxpr(run)(PagePool.create(config, mesh))).count("shard_map[") == num_split


class Sinks(nnx.Module):
    """Attention of one's own around the cache; its sinks leave no mass to the keys."""

    def __init__(self):
        self.cache = paged_nnx.PagedCache()

    def __call__(self, tokens, metadata):
        q, k, v = (jnp.ones((len(tokens), heads, WIDTH // 4)) for heads in (4, 2, 2))
        return self.cache(q, k, v, metadata, sinks=jnp.array([1e9, -1e9, 1e9, -1e9]))[metadata.logits_at, :, 0]


def test_a_cache_of_attention_of_ones_own_takes_sinks():
    config = CacheConfig(1, 2, WIDTH // 4, 32, 4, 8, page_size=4, dtype="float32")
    tables, metadata = by_hand.reserve(PageTables.create(config), by_hand.lengths(PROMPTS))
    out, _ = paged_nnx.paged_step(Sinks())(by_hand.pack(PROMPTS), PagePool.create(config), metadata)
    np.testing.assert_allclose(out, np.tile([0, 1, 0, 1], (4, 1)), atol=1e-6)
