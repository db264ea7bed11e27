"""What the adapters refuse, at trace time, and what they say."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import linen_paged
import nnx_paged
import nnx_stock
import pytest
from flax import linen as nn
from flax import nnx
from test_adapters import scanned_step

import paged_jax.flax.linen as paged_linen
import paged_jax.flax.nnx as paged_nnx
from paged_jax import AttentionMetadata, CacheConfig, PagePool, PageTables

VOCAB, WIDTH, LAYERS = 61, 32, 2


def trace(step, num_layers=LAYERS, num_kv_heads=2, head_dim=WIDTH // 4, num_tokens=3, **options: Any):
    """A step of three rows, traced and never compiled; linen's, which have 4 KV heads, with an array for each layer."""
    options = {"array_per_layer": num_kv_heads == 4} | options
    config = CacheConfig(num_layers, num_kv_heads, head_dim, 8, 3, 2, page_size=4, dtype="float32", **options)

    def run(params):
        metadata = AttentionMetadata.decode(PageTables.create(config), jnp.ones(3, bool))
        return step.forward(params, jnp.zeros(num_tokens, jnp.int32), PagePool.create(config), metadata)

    return jax.eval_shape(run, step.params)


def nnx_decoder(num_layers=LAYERS):
    return nnx.eval_shape(lambda: nnx_paged.Decoder(VOCAB, WIDTH, num_layers, nnx.Rngs(0)))


def linen_step(call=paged_linen._call, decoder=None):
    decoder = decoder or linen_paged.Decoder(VOCAB, WIDTH, LAYERS)
    variables = jax.eval_shape(lambda: paged_linen.init(decoder, jax.random.key(0), call))
    return paged_linen.paged_step(decoder, variables, call)


def nnx_step(call):
    return paged_nnx.paged_step(nnx_decoder(), call)


class Attention(nnx.Module):
    """One layer, and the options that its caller has."""

    def __init__(self, call=None, cache=(), **options):
        self.call = call or (lambda self, x, metadata: self.attn(x, mask=metadata))
        self.attn = nnx.MultiHeadAttention(
            4, WIDTH, num_kv_heads=2, attention_fn=paged_nnx.PagedCache(**dict(cache)), rngs=nnx.Rngs(0), **options
        )

    def __call__(self, tokens, metadata):
        return self.call(self, jnp.zeros((len(tokens), WIDTH)), metadata)


class LinenAttention(nn.Module):
    options: dict
    arguments: dict
    cache: dict = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, tokens, metadata):
        attn = nn.MultiHeadDotProductAttention(4, attention_fn=paged_linen.PagedCache(**self.cache), **self.options)
        return attn(jnp.zeros((len(tokens), WIDTH)), **{"mask": metadata, **self.arguments})


class LinenDecoder(nn.Module):
    """Blocks under nn.scan, or, without axes, in a loop."""

    scan_axes: dict | None

    @nn.compact
    def __call__(self, tokens, metadata):
        x = jnp.zeros((len(tokens), WIDTH))
        if self.scan_axes is None:
            for _ in range(LAYERS):
                x = linen_paged.Block()(x, metadata)
            return x
        run = lambda block, x, metadata: (block(x, metadata), None)  # noqa: E731  for the next call alone
        options: dict[str, Any] = dict(variable_axes=self.scan_axes, split_rngs={"params": True}, in_axes=nn.broadcast)
        return nn.scan(run, length=LAYERS, **options)(linen_paged.Block(name="ScanBlock_0"), x, metadata)[0]


EMPTY_STEP = jnp.zeros(1, jnp.int32), None


def one(call=None, **options):
    return paged_nnx.paged_step(Attention(call, **({"decode": False} | options)))


def one_linen(options=(), **arguments):
    return linen_step(decoder=LinenAttention(dict(options), arguments))


def test_without_a_mistake_nothing_is_refused():
    logits, _ = trace(one(), num_layers=1)
    assert logits.shape == (3, WIDTH)
    logits, _ = trace(one_linen(), num_layers=1, num_kv_heads=4)
    assert logits.shape == (3, WIDTH)


def test_missing_metadata():
    match = "mask is None, but a PagedCache needs the step's AttentionMetadata"
    with pytest.raises(ValueError, match=match):
        trace(one(lambda self, x, metadata: self.attn(x)), num_layers=1)
    with pytest.raises(ValueError, match=match):
        trace(one_linen(mask=None), num_layers=1, num_kv_heads=4)


def test_a_mask_in_the_place_of_the_metadata():
    with pytest.raises(ValueError, match=r"mask is an object of type \w+, but .* pass the metadata down"):
        trace(one(lambda self, x, metadata: self.attn(x, mask=jnp.ones((1, 3, 3), bool))), num_layers=1)


def test_decode_true():
    with pytest.raises(ValueError, match="attn has decode=True, .* a PagedCache needs decode=False"):
        one(decode=True)
    with pytest.raises(ValueError, match="MultiHeadDotProductAttention_0 has decode=True, .* needs decode=False"):
        one_linen({"decode": True})


def test_a_model_without_a_cache():
    with pytest.raises(ValueError, match="Decoder has no PagedCache: give every attention layer one"):
        paged_nnx.paged_step(nnx.eval_shape(lambda: nnx_stock.Decoder(VOCAB, WIDTH, LAYERS, nnx.Rngs(0))))
    with pytest.raises(ValueError, match="Dense has no PagedCache: give every attention layer one"):
        paged_linen.paged_step(nn.Dense(3), {}, lambda model, tokens, metadata: model(jnp.zeros((1, 3))))


def test_a_layer_without_a_cache():
    decoder = nnx_decoder()
    decoder.blocks[0].attn = nnx.MultiHeadAttention(4, WIDTH, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
    match = r"pages for 2 layers, .* has PagedCaches for 1 \(blocks.1.attn.attention_fn\): give each .* num_layers=1"
    with pytest.raises(ValueError, match=match):
        trace(paged_nnx.paged_step(decoder))


def test_a_pool_with_other_layers():
    with pytest.raises(ValueError, match="pages for 3 layers, .* has PagedCaches for 2 .* with num_layers=2"):
        trace(linen_step(), num_layers=3, num_kv_heads=4)


@pytest.mark.parametrize("sizes", [dict(num_kv_heads=4), dict(head_dim=16)])
def test_a_pool_with_other_heads(sizes):
    with pytest.raises(ValueError, match="2 KV heads of size 8, the pool has pages for .* num_kv_heads=2, head_dim=8"):
        trace(nnx_step(lambda model, *step: model(*step)), **sizes)


def test_a_pool_without_an_array_for_each_linen_layer():
    with pytest.raises(ValueError, match=r"one array for all layers .* CacheConfig\(\.\.\., array_per_layer=True\)"):
        trace(linen_step(), num_kv_heads=4, array_per_layer=False)


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ({...: 0}, r"leading axis sizes(.|\n)*must carry the pool .*: nnx.scan\(in_axes=\(nnx.StateAxes"),
        ({paged_nnx.LentPool: None, ...: 0}, "lost what they wrote to the pool. A scan .* must carry the pool"),
    ],
)
def test_a_scan_that_does_not_carry_the_pool(axes, match):
    with pytest.raises(ValueError, match=match):
        trace(scanned_step(state_axes=nnx.StateAxes(axes)))


@pytest.mark.parametrize("options", [dict(array_per_layer=True), dict(windows=(4, None))])
def test_layers_of_a_scan_whose_pages_lie_apart(options):
    match = r"blocks.attn.attention_fn is 2 layers that run in a scan, .* without array_per_layer, .* layers 0 to 1"
    with pytest.raises(ValueError, match=match):
        trace(scanned_step(), **options)


@pytest.mark.parametrize("axes", [dict(params=0), dict(params=0, cache=0)])
def test_linen_layers_in_a_scan_are_refused_with_advice_that_works(axes):
    decoder = LinenDecoder(axes)
    variables = jax.eval_shape(decoder.init, jax.random.key(0), *EMPTY_STEP)
    with pytest.raises(ValueError, match=r"run them in a Python loop, with their weights taken apart, .*ScanBlock_0"):
        paged_linen.paged_step(decoder, variables)

    def take_apart(scanned):
        return {f"Block_{i}": jax.tree.map(lambda w, i=i: w[i], scanned) for i in range(LAYERS)}

    params = jax.eval_shape(take_apart, variables["params"]["ScanBlock_0"])
    step = paged_linen.paged_step(LinenDecoder(None), {"params": params})
    logits, _ = trace(step, num_kv_heads=4)
    assert logits.shape == (3, WIDTH)


def test_tokens_that_the_metadata_does_not_speak_of():
    with pytest.raises(ValueError, match=r"query \(4, 4, 8\) and key \(4, 2, 8\) must both hold the 3 tokens"):
        trace(one(), num_layers=1, num_tokens=4)


def test_keys_of_another_sequence():
    with pytest.raises(ValueError, match="self-attention over the packed new tokens"):
        trace(one(lambda self, x, metadata: self.attn(x, x[:1], mask=metadata)), num_layers=1)


def test_a_layer_that_runs_twice():
    with pytest.raises(ValueError, match="a PagedCache was called twice in one step"):
        trace(one(lambda self, x, metadata: self.attn(self.attn(x, mask=metadata), mask=metadata)), num_layers=1)


def test_a_layer_that_does_not_run():
    with pytest.raises(
        ValueError, match="the PagedCache of attn.attention_fn was not called: run its layer, or remove it"
    ):
        trace(one(lambda self, x, metadata: x), num_layers=1)


def test_logits_of_every_token():
    with pytest.raises(ValueError, match=r"logits of shape \(1, 3, 61\), a step needs \[Z, V\] with Z = 3: index"):
        trace(nnx_step(lambda model, tokens, metadata: model(tokens, metadata)[None]))


def test_dropout():
    with pytest.raises(ValueError, match="a PagedCache has no dropout: pass deterministic=True"):
        trace(one(dropout_rate=0.1, deterministic=False), num_layers=1)
    with pytest.raises(ValueError, match="a PagedCache has no dropout: pass deterministic=True"):
        one_linen({"dropout_rate": 0.1, "deterministic": False})
    trace(one(dropout_rate=0.1, deterministic=True), num_layers=1)


def test_weights_that_are_never_formed():
    with pytest.raises(ValueError, match="sow_weights=True, but a PagedCache never forms the weights"):
        trace(one(lambda self, x, metadata: self.attn(x, mask=metadata, sow_weights=True)), num_layers=1)
    with pytest.raises(ValueError, match="sow_weights=True, but a PagedCache never forms the weights"):
        one_linen(sow_weights=True)


def test_a_model_outside_of_a_step():
    tokens, metadata = jnp.zeros(1, jnp.int32), None
    with pytest.raises(ValueError, match=r"no pages outside of a step: use paged_step\(model\)"):
        Attention(decode=False)(tokens, metadata)
    layer = LinenAttention({}, {})
    variables = jax.jit(lambda: paged_linen.init(layer, jax.random.key(0)))()
    with pytest.raises(ValueError, match=r"no pages outside of a step: use paged_step\(module, variables\)"):
        layer.apply(variables, tokens, metadata)
    with pytest.raises(ValueError, match=r"no pages outside of a step: use paged_step\(module, variables\)"):
        layer.apply(variables, tokens, metadata, mutable=["cache"])


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"soft_cap": -1.0}, "soft_cap must be above 0"),
        ({"implementation": "fastest"}, "implementation must be None or one of .*, got 'fastest'"),
    ],
)
def test_options_that_make_no_sense(option, match):
    with pytest.raises(ValueError, match=match):
        trace(one(cache=option), num_layers=1)
    with pytest.raises(ValueError, match=match):
        trace(linen_step(decoder=LinenAttention({}, {}, option)), num_layers=1, num_kv_heads=4)


def test_layers_are_named_in_their_order():
    with pytest.raises(ValueError, match=r"blocks\.2\.\S+, blocks\.3\..* blocks\.9\.\S+, blocks\.10\."):
        trace(paged_nnx.paged_step(nnx_decoder(11)))
    with pytest.raises(ValueError, match=r"Block_2\.\S+, Block_3\..* Block_9\.\S+, Block_10\."):
        trace(linen_step(decoder=linen_paged.Decoder(VOCAB, WIDTH, 11)))
