"""Models that nobody here wrote, from the wheel of google-tunix: over our cache they give the tokens of their own.

pip install --no-deps google-tunix==0.1.7
"""

import functools
import importlib
import importlib.util
import sys
import types
import warnings

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paged_jax import CacheConfig
from paged_jax.flax.nnx import PagedCache, paged_step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs

LAYERS, KV_HEADS, HEAD_DIM, LONGEST = 2, 2, 16, 32
SIZES = dict(
    num_layers=LAYERS, vocab_size=97, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=HEAD_DIM,
    num_kv_heads=KV_HEADS, rope_theta=10_000, norm_eps=1e-6,
)  # fmt: skip
PROMPTS = [[5, 3, 1, 88, 9, 20, 61], [44, 2], [7, 7, 30, 2, 19, 60, 41, 8, 11, 90, 54]]


class PagedAttention(nnx.Module):
    """Their attention with our cache; where they pass a mask, the metadata arrives."""

    def __init__(self, theirs, rope):
        self.theirs, self.rope, self.cache = theirs, rope, PagedCache()

    def __call__(self, x, positions, cache, metadata, segment_ids=None):
        q, k, v = self.theirs.q_proj(x), self.theirs.k_proj(x), self.theirs.v_proj(x)
        if hasattr(self.theirs, "q_norm"):
            q, k = self.theirs.q_norm(q), self.theirs.k_norm(k)
        q, k = (self.rope(y, positions, head_dim=HEAD_DIM) for y in (q, k))
        return cache, self.theirs.o_proj(self.cache(q, k, v, metadata))


def call(model, tokens, metadata):
    logits, _ = model(tokens[None], metadata.positions[None], None, metadata)
    return logits[0, metadata.logits_at]


@pytest.fixture
def lenient():
    """Their code promotes ranks and dtypes as JAX does unless told otherwise."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def load(name: str, cls: str):
    """A model's file and a model of random weights. The package's own __init__ would import all of its trainers."""
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip("google-tunix is not installed: pip install --no-deps google-tunix==0.1.7")
        sys.modules["tunix"] = types.ModuleType("tunix")
        sys.modules["tunix"].__path__ = list(spec.submodule_search_locations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"tunix.models.{name}.model")
    model = getattr(module, cls)(module.ModelConfig(**SIZES), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def draw(w):  # theirs start so small, or as zeros, that one token would repeat
        return w if w.ndim == 1 else jnp.asarray(rng.normal(size=w.shape) * 2 * w.shape[0] ** -0.5, w.dtype)

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return module, model


def with_their_cache(model, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
    """Greedy, one token at a time, over the dense cache that comes with the model."""
    graph, weights = nnx.split(model)

    @jax.jit
    def step(cache, token, position):
        mask = (jnp.arange(LONGEST) <= position)[None, None]
        logits, cache = nnx.merge(graph, weights)(token[None, None], position[None, None], cache, mask)
        return jnp.argmax(logits[0, -1]), cache

    kv = functools.partial(jnp.zeros, (1, LONGEST, KV_HEADS, HEAD_DIM))
    cache = {f"layer_{i}": {"k": kv(), "v": kv(), "end_index": jnp.zeros(1, jnp.int32)} for i in range(LAYERS)}
    tokens = list(prompt)
    for position in range(len(prompt) + num_tokens - 1):
        token, cache = step(cache, jnp.int32(tokens[position]), jnp.int32(position))
        if position + 1 == len(tokens):
            tokens.append(int(token))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize(
    ("name", "cls"), [pytest.param("llama3", "Llama3", marks=pytest.mark.long), ("qwen3", "Qwen3")]
)
def test_a_model_from_tunix_gives_the_tokens_of_its_own_cache(lenient, name, cls):
    module, model = load(name, cls)
    expected = [with_their_cache(model, prompt, 10) for prompt in PROMPTS]
    for layer in model.layers:
        layer.attn = PagedAttention(layer.attn, module.apply_rope)
    step = paged_step(model, call)
    config = CacheConfig(LAYERS, KV_HEADS, HEAD_DIM, 32, len(PROMPTS), 8, page_size=4, dtype="float32")
    assert by_hand.serve(step, config, PROMPTS, 10) == expected
    assert len({token for tokens in expected for token in tokens}) > 8, "greedy tokens that say little"
