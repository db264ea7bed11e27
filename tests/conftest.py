"""Strict JAX, four fake CPU devices, and every jaxtyping annotation checked while the tests run.

XLA compiles for a CPU without LLVM's optimisations, which halves the time of a compilation, and so that of most tests;
set another level in XLA_FLAGS to test what users run.
"""

import gc
import json
import os

# Tracing makes many objects and few cycles: looking for these took a twentieth of the time.
gc.set_threshold(50_000, 10, 10)
FLAGS = {"xla_force_host_platform_device_count": 4, "xla_backend_optimization_level": 0}
given = os.environ.get("XLA_FLAGS", "")
added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several test processes compile for TPUs at once

from jaxtyping import install_import_hook

install_import_hook(["paged_jax", "pallas_kernels"], "typecheck.check")

import jax
import pytest
from safetensors.numpy import load_file, save_file

from paged_jax import models

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")


@pytest.fixture(scope="session")
def shallow_demo(tmp_path_factory):
    """The demo model with only its first layer, which compiles faster: for tests of what stands around a model."""
    folder = tmp_path_factory.mktemp("demo")
    config = json.loads((models.DEMO / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").symlink_to(models.DEMO / "tokenizer.json")
    weights = load_file(models.DEMO / "model.safetensors")
    kept = {name: x for name, x in weights.items() if "layers." not in name or "layers.0." in name}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture
def one_token_count(monkeypatch):
    """Engines that are given no token counts compile one pass, not five: for tests of what stands around an engine."""
    monkeypatch.setattr("paged_jax.engine.engine.token_counts_for", lambda *_, **__: (64,))
