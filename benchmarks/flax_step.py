"""What Flax costs a decode step: one decoder written in nnx, in linen and as a plain pytree, over the same pages.

    python -m benchmarks.flax_step [--json] [--repeats 30]

The decoders have the same weights (linen's attention has as many KV heads as query heads, so it has a plain twin of its
own) and their logits are compared. Each runs `STEPS` decode steps of 8 rows a round, one jitted call a step, the pool
donated; rounds take turns. Beside `paged_step` stands what it spares: `nnx.jit` of the whole model, pages included,
which splits and merges the model in every call.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from benchmarks.report import Report, add_json_option
from benchmarks.timing import compare
from paged_jax import AttentionMetadata, CacheConfig, PagePool, PageTables, paged_attention
from paged_jax.flax import Step
from paged_jax.flax import linen as paged_linen
from paged_jax.flax import nnx as paged_nnx
from paged_jax.flax.step import LayerUse

STEPS, ROWS, LENGTH, HEADS, HEAD_DIM = 20, 8, 256, 4, 64
SIZES = {"demo": (4, 192, 1536), "28 thin layers": (28, 64, 256)}  # layers, width, vocabulary


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(use_bias=False, rngs=rngs)
        self.norm, self.mlp_norm = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        self.attn = nnx.MultiHeadAttention(
            HEADS, width, HEADS * HEAD_DIM, num_kv_heads=2, decode=False, attention_fn=paged_nnx.PagedCache(), **options
        )
        self.up, self.down = nnx.Linear(width, 4 * width, **options), nnx.Linear(4 * width, width, **options)

    def __call__(self, x, metadata):
        x = x + self.attn(self.norm(x), mask=metadata)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Decoder(nnx.Module):
    def __init__(self, num_layers: int, width: int, vocab: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(num_layers)])

    def __call__(self, tokens, metadata):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, metadata)
        return x[metadata.logits_at] @ self.embed.embedding[...].T


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, metadata):
        width = x.shape[-1]
        attn = nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * HEAD_DIM, use_bias=False, attention_fn=paged_linen.PagedCache(), name="attn"
        )
        x = x + attn(nn.RMSNorm(name="norm")(x), mask=metadata)
        up, down = (nn.Dense(n * width, use_bias=False, name=name) for n, name in ((4, "up"), (1, "down")))
        return x + down(nn.gelu(up(nn.RMSNorm(name="mlp_norm")(x))))


class LinenDecoder(nn.Module):
    num_layers: int
    width: int
    vocab: int

    @nn.compact
    def __call__(self, tokens, metadata):
        embed = nn.Embed(self.vocab, self.width, name="embed")
        x = embed(tokens)
        for i in range(self.num_layers):
            x = LinenBlock(name=f"blocks_{i}")(x, metadata)
        return embed.attend(x[metadata.logits_at])


def plain_forward(params, tokens, pool, metadata):
    x = params["embed"][tokens]
    for i, w in enumerate(params["blocks"]):
        h = norm(x, w["norm"])
        q, k, v = (jnp.einsum("td,dnh->tnh", h, w[name]) for name in ("query", "key", "value"))
        out, pool = paged_attention(q, k, v, pool, metadata, i)
        x = x + jnp.einsum("tnh,nhd->td", out, w["out"])
        x = x + jax.nn.gelu(norm(x, w["mlp_norm"]) @ w["up"]) @ w["down"]
    return x[metadata.logits_at] @ params["embed"].T, pool


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def plain_weights(embed, blocks) -> dict[str, Any]:
    def block(w):
        attn = {name: w["attn"][name]["kernel"] for name in ("query", "key", "value", "out")}
        return attn | {n: w[n]["scale"] for n in ("norm", "mlp_norm")} | {n: w[n]["kernel"] for n in ("up", "down")}

    return {"embed": embed["embedding"], "blocks": [block(w) for w in blocks]}


def with_nnx_jit(model: Decoder, pool: PagePool):
    """A step of `nnx.jit`, the pages in the model."""
    caches = [block.attn.attention_fn for block in model.blocks]

    @functools.partial(nnx.jit, donate_argnums=0)
    def run(model, tokens, metadata):
        return model(tokens, metadata)

    shared = paged_nnx.LentPool(pool)
    for cache in caches:
        cache.pool = shared

    def step(tokens, metadata):
        for i, cache in enumerate(caches):
            cache.layer.set_value(LayerUse(pool.place(i)))
        return run(model, tokens, metadata)

    return step


def measure(report: Report, name: str, repeats: int) -> None:
    num_layers, width, vocab = SIZES[name]
    tokens = jnp.arange(ROWS, dtype=jnp.int32)
    linen = LinenDecoder(num_layers, width, vocab)
    variables = paged_linen.init(linen, jax.random.key(0))
    functions, logits = {}, {}

    def setup(num_kv_heads: int, array_per_layer: bool = False):
        sizes: dict[str, Any] = dict(dtype="float32", array_per_layer=array_per_layer)
        config = CacheConfig(num_layers, num_kv_heads, HEAD_DIM, ROWS * 17 + 1, ROWS, 17, **sizes)
        tables, _ = PageTables.create(config).reserve(jnp.full(ROWS, LENGTH, jnp.int32))
        return PagePool.create(config), AttentionMetadata.decode(tables, jnp.ones(ROWS, bool))

    def add(way: str, step: Step, num_kv_heads: int):
        pool, metadata = setup(num_kv_heads, array_per_layer=way == "linen, paged_step")

        def run():
            nonlocal pool
            for _ in range(STEPS):
                out, pool = step(tokens, pool, metadata)
            return out

        functions[way], logits[way] = run, run()

    def decoder():
        return Decoder(num_layers, width, vocab, nnx.Rngs(0))

    step = paged_nnx.paged_step(decoder())
    blocks = [step.params["blocks"][i] for i in range(num_layers)]
    add("plain pytree", Step(plain_forward, plain_weights(step.params["embed"], blocks)), 2)
    add("nnx, paged_step", step, 2)
    params = variables["params"]
    blocks = [params[f"blocks_{i}"] for i in range(num_layers)]
    add("plain pytree for linen", Step(plain_forward, plain_weights(params["embed"], blocks)), HEADS)
    add("linen, paged_step", paged_linen.paged_step(linen, variables), HEADS)

    pool, metadata = setup(2)
    jitted = with_nnx_jit(decoder(), pool)

    def run_jitted():
        for _ in range(STEPS):
            out = jitted(tokens, metadata)
        return out

    functions["nnx, nnx.jit"], logits["nnx, nnx.jit"] = run_jitted, run_jitted()
    twin = {way: "plain pytree for linen" if "linen" in way else "plain pytree" for way in functions}
    for way, out in logits.items():
        np.testing.assert_allclose(out, logits[twin[way]], atol=1e-4, err_msg=way)
    timings = compare(functions, repeats)
    for way, timing in timings.items():
        plain = timings[twin[way]]
        report.add(
            model=name, way=way, ms=timing.wall / STEPS, fastest_ms=timing.fastest / STEPS, cpu_ms=timing.cpu / STEPS,
            of_plain=timing.wall / plain.wall,
            fastest_of_plain=timing.fastest / plain.fastest, cpu_of_plain=timing.cpu / plain.cpu,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    add_json_option(parser)
    options = parser.parse_args()
    title = f"A decode step of {ROWS} rows at {LENGTH} tokens: {STEPS} jitted calls a round, milliseconds a call"
    report = Report("flax_step", title)
    for name in SIZES:
        measure(report, name, options.repeats)
    report.finish(options)


if __name__ == "__main__":
    main()
