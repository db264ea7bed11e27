"""Every family against `transformers`: stored results anywhere, fresh ones where torch can be had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from paged_run import PagedRun
from safetensors.numpy import save_file

from paged_jax import models

GOLDENS = Path(__file__).parent / "goldens"
# Of the logits' range: float32 sums in another order differ by about 1e-6 a layer.
TOLERANCE = 1e-4


def write_checkpoint(folder: Path, golden):
    """The golden's checkpoint as a folder in Hugging Face's own words."""
    config = json.loads(str(golden["config"]))
    shapes = json.loads(str(golden["shapes"]))
    gemma = config["model_type"].startswith("gemma")
    save_file(make_goldens.fill(int(golden["seed"]), shapes, gemma), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))


def assert_close(ours: np.ndarray, theirs: np.ndarray):
    assert np.abs(ours - theirs).max() < TOLERANCE * np.ptp(theirs)


def compare(golden, folder: Path, rows: slice = slice(None), max_length: int | None = None):
    """Logits of the dense and of the chunked, paged path, and greedy tokens of one ragged batch."""
    write_checkpoint(folder, golden)
    model = models.load(folder, "float32", max_length=max_length)
    prompts = make_goldens.prompts(int(golden["seed"]), model.config.vocab_size)[rows]
    if len(prompts[-1]) == make_goldens.PROMPT_LENGTHS[-1]:
        dense = jax.jit(model.dense_forward)(model.params, jnp.asarray(prompts[-1], jnp.int32))
        assert_close(np.asarray(dense)[::25], golden["logits"])
    run = PagedRun(model, len(prompts), max_length=384, step_tokens=256)
    logits = run.prefill(prompts, chunk=70)
    assert_close(logits, golden["last_logits"][rows])
    greedy = run.greedy(logits, golden["greedy"].shape[1])
    np.testing.assert_array_equal(greedy, golden["greedy"][rows])


def compare_case(case: str, golden, folder: Path):
    if case == "phi3_longrope":  # its factors depend on the longest context
        compare(golden, folder, slice(0, 6), max_length=make_goldens.SHORT)
        compare(golden, folder, slice(6, None))
    else:
        compare(golden, folder)


@pytest.mark.parametrize("case", make_goldens.CASES)
def test_logits_and_greedy_tokens_equal_transformers(case, tmp_path):
    golden = np.load(GOLDENS / f"{case}.npz")
    assert len(set(golden["greedy"].ravel().tolist())) > 50  # equality of repeated tokens would say little
    compare_case(case, golden, tmp_path)


@pytest.mark.parametrize("case", make_goldens.CASES)
def test_fresh_random_checkpoints_equal_transformers(case, tmp_path):
    """Other weights and prompts than the stored ones, computed now; PARITY_PYTHON may name the interpreter."""
    python = os.environ.get("PARITY_PYTHON", sys.executable)
    probe = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True)
    if probe.returncode:
        pytest.skip("torch and transformers are not installed (extra `parity`)")
    script = Path(make_goldens.__file__)
    command = [python, str(script), "--seed", "1", "--output", str(tmp_path), case]
    subprocess.run(command, check=True, capture_output=True)
    compare_case(case, np.load(tmp_path / f"{case}.npz"), tmp_path)
