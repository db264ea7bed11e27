"""Real attention over pages that came back: 8-bit pages with their scales, split over two devices."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import toy
from paged_jax.engine import Engine
from paged_jax.sampling import SamplingParams
from paged_jax.store import Store

CONFIG = toy.config(num_pages=1 + 20, dtype="int8")
PROMPTS = [np.random.default_rng(seed).integers(0, toy.VOCAB, 33).tolist() for seed in range(4)]


def params_on(mesh: Mesh):
    specs = {name: PartitionSpec(None, "model") for name in "qkv"} | {"o": PartitionSpec("model")}

    def place(path, leaf):
        spec = specs.get(getattr(path[-1], "key", ""), PartitionSpec())
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, toy.init_params())


@pytest.mark.long  # attention on two devices takes nine CPU seconds to compile
def test_tokens_are_those_of_an_engine_without_any_cache(tmp_path):
    params = params_on(Mesh(np.array(jax.devices()[:2]), ("model",)))

    def tokens(engine: Engine) -> list[list[int]]:
        greedy = SamplingParams(max_new_tokens=6)
        return [list(engine.generate([prompt], greedy)[0][0].tokens) for prompt in PROMPTS]

    def make(**options) -> Any:
        engine: Any = Engine(toy.forward, params, CONFIG, token_counts=(8, 32), visit_steps=4, **options)
        if engine.tiers is not None:
            engine.tiers.prefill.measured = lambda amount, seconds: None  # so that it loads whatever it finds
        return engine

    cold = tokens(make(prefix_cache=False))
    engine = make(store=Store(tmp_path), host_cache_bytes=1 << 20)
    assert tokens(engine) == tokens(engine) == cold
    engine.flush()
    restarted = make(store=Store(tmp_path))
    assert tokens(restarted) == cold
    assert engine.stats().loaded_tokens == {"host": 4 * 32} and restarted.stats().loaded_tokens == {"store": 4 * 32}
