"""The training script of the demo model, on a corpus and a model of a few seconds."""

import json

import jax
import numpy as np
import pytest

from examples import train_demo
from paged_jax import models


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [train_demo.learning_rate(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0, abs=1e-12)
    assert max(rates) == train_demo.PEAK_LEARNING_RATE == rates[2]
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_corpus_keeps_whole_files_apart():
    train, held_out = train_demo.corpus()
    assert not set(held_out) & {text for text in train if len(text) > 200}
    assert len(train) > 5 * len(held_out) > 0
    assert train_demo.corpus() == (train, held_out)


def test_a_short_training_learns_and_writes_a_checkpoint(tmp_path, monkeypatch):
    text = "def double(x):\n    return 2 * x\n" * 200
    tiny = dict(vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    monkeypatch.setattr(train_demo, "corpus", lambda: ([text], [text]))
    monkeypatch.setattr(train_demo, "HF_CONFIG", train_demo.HF_CONFIG | tiny)
    monkeypatch.setattr(train_demo, "BATCHES", ((4, 64),))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers with floats
        train_demo.main(["--output", str(tmp_path), "--steps", "40", "--minutes", "10"])
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["tokens"] == 40 * 4 * 64
    assert record["curve"][-1]["held_out_loss"] < 0.9 * np.log(280)
    model = models.load(tmp_path)
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert model.params["norm"]["weight"].dtype == "bfloat16"
