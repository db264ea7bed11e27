"""Every family against `transformers`: stored results anywhere, fresh ones where torch can be had."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from live import run_live
from paged_run import PagedRun
from safetensors.numpy import save_file

from paged_jax import models

GOLDENS = Path(__file__).parent / "goldens"
# Of the logits' range: float32 sums in another order differ by about 1e-6 a layer.
TOLERANCE = 1e-4
# What they have, others have too: without a cache they run here, and over pages in the live comparison and with -m long
LONG = ("gemma2", "mistral", "qwen2_yarn", "qwen3", "phi4_mini", "qwen3_moe", "qwen3_moe_unnormalised", "mixtral")
LONG += ("olmo2", "granite", "gemma3_with_images", "llama2", "qwen2", "phi3", "llama3", "smollm3", "olmo3")
LONG += ("phi3_longrope", "glm4", "gemma3")


def write_checkpoint(folder: Path, golden):
    """The golden's checkpoint as a folder in Hugging Face's own words."""
    config = json.loads(str(golden["config"]))
    shapes = json.loads(str(golden["shapes"]))
    gemma = config["model_type"].startswith("gemma")
    save_file(make_goldens.fill(int(golden["seed"]), shapes, gemma), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))


def assert_close(what: str, ours: np.ndarray, theirs: np.ndarray):
    difference = np.abs(ours - theirs).max() / np.ptp(theirs)
    print(f"{what}: largest difference {difference:.1e} of the logits' range")
    assert difference < TOLERANCE


def compare(golden, folder: Path, rows: slice = slice(None)):
    """Logits of the dense and of the chunked, paged path, and greedy tokens of one ragged batch."""
    write_checkpoint(folder, golden)
    model = models.load(folder, "float32")
    prompts = make_goldens.prompts(int(golden["seed"]), model.config.vocab_size)[rows]
    assert_close("dense", dense_logits(model, prompts[-1])[::25], golden["logits"])
    run = PagedRun(model, len(prompts), max_length=384, step_tokens=256)
    logits = run.prefill(prompts, chunk=70)
    assert_close("paged", logits, golden["last_logits"][rows])
    greedy = run.greedy(logits, golden["greedy"].shape[1])
    np.testing.assert_array_equal(greedy, golden["greedy"][rows])
    print(f"greedy: {greedy.shape[1]} tokens equal for {greedy.shape[0]} prompts")


def dense_logits(model: models.Model, prompt: list[int]) -> np.ndarray:
    dense = jax.jit(model.dense_forward)
    return np.asarray(dense(model.params, jnp.asarray(prompt, jnp.int32)))


def compare_case(case: str, golden, folder: Path):
    if case not in ("phi3_longrope", "phi4_mini"):
        return compare(golden, folder)
    # Its factors depend on the longest context: transformers ran the last two prompts with the long ones.
    compare(golden, folder, slice(6, None))
    short = models.load(folder, "float32", max_length=make_goldens.SHORT)
    prompt = make_goldens.prompts(int(golden["seed"]), short.config.vocab_size)[5]
    assert_close("short", dense_logits(short, prompt)[-1], golden["last_logits"][5])


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in make_goldens.CASES]
)
def test_logits_and_greedy_tokens_equal_transformers(case, tmp_path):
    golden = np.load(GOLDENS / f"{case}.npz")
    assert golden["greedy"].shape == (8, 64) and {1, 300} < set(make_goldens.PROMPT_LENGTHS)
    assert len(set(golden["greedy"].ravel().tolist())) > 50  # equality of repeated tokens would say little
    compare_case(case, golden, tmp_path)


@pytest.mark.parametrize("case", LONG)
def test_logits_without_a_cache_equal_transformers(case, tmp_path):
    golden = np.load(GOLDENS / f"{case}.npz")
    write_checkpoint(tmp_path, golden)
    model = models.load(tmp_path, "float32")
    prompt = make_goldens.prompts(int(golden["seed"]), model.config.vocab_size)[-1]
    assert_close("dense", dense_logits(model, prompt[:128])[::25], golden["logits"][:6])


@pytest.mark.parity
@pytest.mark.parametrize("case", make_goldens.CASES)
def test_fresh_random_checkpoints_equal_transformers(case, tmp_path):
    """Other weights and prompts than the stored ones, computed now."""
    run_live(make_goldens.__file__, "--seed", "1", "--output", str(tmp_path), case)
    compare_case(case, np.load(tmp_path / f"{case}.npz"), tmp_path)
