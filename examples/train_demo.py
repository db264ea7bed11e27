"""Trains the demo model in `paged_jax/models/demo` on the sources of Python's standard library.

    python -m examples.train_demo --minutes 45 --output paged_jax/models/demo

Every machine with CPython has this corpus, so the model can be made again anywhere. The result is an ordinary
Hugging Face checkpoint folder (Llama), a byte-level BPE tokenizer, and `training.json` with the loss curves.
"""

import argparse
import datetime
import hashlib
import json
import platform
import sys
import sysconfig
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from rich.progress import Progress

from paged_jax.models import checkpoint
from paged_jax.models.decoder import Decoder

EXCLUDED = {"test", "tests", "site-packages", "encodings", "pydoc_data", "__pycache__"}
END_OF_TEXT = "<|endoftext|>"
# One round of batches, [sequences, tokens]: the same number of tokens each, mostly short, some as long as the
# model's longest context.
BATCHES = ((8, 256), (8, 256), (4, 512), (8, 256), (8, 256), (8, 256), (1, 2048), (8, 256))
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.02
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1536,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def corpus() -> tuple[list[str], list[str]]:
    """The standard library's sources in a fixed order: texts to train on, and every sixteenth file held out."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED & set(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        bucket = hashlib.sha256(name.as_posix().encode()).digest()[0]
        (held_out if bucket % 16 == 0 else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that starts every text with the end-of-text token."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts in one row of token ids, each begun by the end-of-text token."""
    return np.concatenate([np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch(texts)])


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to nothing, over the fraction of the training that is done."""
    if progress < WARMUP:
        return PEAK_LEARNING_RATE * progress / WARMUP
    return PEAK_LEARNING_RATE * 0.5 * (1 + float(np.cos(np.pi * (progress - WARMUP) / (1 - WARMUP))))


def make_functions(graph):
    """The optimiser's start, one training step, and the loss, each over (parameters, tokens [B, T + 1])."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)),
    )

    def loss_of(params, tokens):
        logits = nnx.merge(graph, params).dense(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step_of(params, optimizer_state, tokens, rate):
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, optimizer_state, loss

    return optimizer.init, jax.jit(step_of, donate_argnums=(0, 1)), jax.jit(loss_of)


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> jax.Array:
    """Rows of `length` tokens and the one that follows."""
    return jnp.asarray(np.stack([tokens[start : start + length + 1] for start in starts]))


def main(arguments: list[str] | None = None):
    """The command line; see --help."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description="Trains the demo model on Python's standard library.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--minutes", type=float, default=45.0, help="the learning rate reaches 0 by then")
    parser.add_argument("--steps", type=int, default=20_000, help="or after so many steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    train_texts, held_out_texts = corpus()
    tokenizer = train_tokenizer(train_texts, HF_CONFIG["vocab_size"])
    train_tokens, held_out_tokens = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    bytes_per_token = sum(len(text.encode()) for text in held_out_texts) / len(held_out_tokens)
    print(
        f"{len(train_texts)} files, {len(train_tokens)} tokens to train on; "
        f"{len(held_out_texts)} files, {len(held_out_tokens)} tokens held out; {bytes_per_token:.2f} bytes a token"
    )

    config = checkpoint.decoder_config(HF_CONFIG)
    graph, params = nnx.split(Decoder(config, rngs=nnx.Rngs(params=options.seed)))
    init, train_step, evaluate = make_functions(graph)
    optimizer_state = init(params)
    held_out_starts = np.linspace(0, len(held_out_tokens) - 514, 32).astype(int).reshape(8, 4)
    rng = np.random.default_rng(options.seed)
    curve: list[dict] = []
    losses: list[jax.Array] = []
    tokens_seen = 0
    begun = time.monotonic()

    def save(step: int):
        """Writes the checkpoint, and the account of its training as it stands now."""
        held_out = [evaluate(params, windows(held_out_tokens, four, 512)) for four in held_out_starts]
        point = {
            "step": step,
            "tokens": tokens_seen,
            "seconds": round(time.monotonic() - begun, 1),
            "training_loss": round(float(np.mean(jax.device_get(losses))), 4),
            "held_out_loss": round(float(np.mean(jax.device_get(held_out))), 4),
        }
        curve.append(point)
        losses.clear()
        checkpoint.save(options.output, HF_CONFIG, params, dtype=jnp.bfloat16)
        tokenizer.save(str(options.output / "tokenizer.json"), pretty=False)
        record = {
            "command": " ".join(["python -m examples.train_demo", *arguments]),
            "date": datetime.date.today().isoformat(),
            "corpus": {
                "what": "the *.py files of CPython's standard library, without " + ", ".join(sorted(EXCLUDED)),
                "python": platform.python_version(),
                "training_files": len(train_texts),
                "training_tokens": len(train_tokens),
                "held_out": "files whose path's sha256 begins with a multiple of 16",
                "held_out_files": len(held_out_texts),
                "held_out_tokens": len(held_out_tokens),
                "bytes_per_token": round(bytes_per_token, 3),
            },
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "steps": step,
            "tokens": tokens_seen,
            "seconds": point["seconds"],
            "batches": BATCHES,
            "peak_learning_rate": PEAK_LEARNING_RATE,
            "seed": options.seed,
            "device": jax.devices()[0].device_kind,
            "versions": {module.__name__: module.__version__ for module in (jax, flax, optax, tokenizers)},
            "held_out_bits_per_byte": round(point["held_out_loss"] / np.log(2) / bytes_per_token, 4),
            "curve": curve,
        }
        (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(point), flush=True)

    with Progress() as bar:
        task, step, progress = bar.add_task("training", total=1.0), 0, 0.0
        while progress < 1.0:
            sequences, length = BATCHES[step % len(BATCHES)]
            starts = rng.integers(0, len(train_tokens) - length - 1, sequences)
            batch, rate = windows(train_tokens, starts, length), jnp.float32(learning_rate(progress))
            params, optimizer_state, loss = train_step(params, optimizer_state, batch, rate)
            losses.append(loss.block_until_ready())
            step, tokens_seen = step + 1, tokens_seen + sequences * length
            if step % 250 == 0:
                save(step)
            minutes = (time.monotonic() - begun) / 60
            progress = max(step / options.steps, minutes / options.minutes)
            bar.update(task, completed=progress)
    if losses:
        save(step)


if __name__ == "__main__":
    main()
