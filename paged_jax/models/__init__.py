"""Decoders in Flax nnx over the paged cache, and the Hugging Face checkpoints they come from."""

from pathlib import Path

from paged_jax.models.checkpoint import Model, load, read_config, save
from paged_jax.models.config import DecoderConfig
from paged_jax.models.decoder import Decoder
from paged_jax.models.rope import Rope
from paged_jax.models.sharding import tensor_parallel
from paged_jax.models.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"  # a small model that writes Python; see examples/train_demo.py

__all__ = [
    "DEMO",
    "Decoder",
    "DecoderConfig",
    "Model",
    "Rope",
    "Tokenizer",
    "load",
    "read_config",
    "save",
    "tensor_parallel",
]
