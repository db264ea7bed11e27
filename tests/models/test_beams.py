"""Beam search against `transformers`: stored results anywhere, fresh ones where torch can be had."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import make_beams
import make_goldens
import numpy as np
import pytest
from live import run_live
from safetensors.numpy import save_file

from paged_jax import KVCache, Stepper, beam_search, models

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "beams.json").read_text())
WIDEST, PAGE_SIZE = max(make_beams.WIDTHS), 8
TOLERANCE = 1e-3  # of a score; float32 sums of 16 log-probabilities in another order differ by about 1e-5


def program(golden, folder: Path, early: bool | str):
    """A search of all prompts in all widths at once: as many as 3 run in the 24 rows, the others wait."""
    config = golden["config"]
    gemma = config["model_type"].startswith("gemma")
    save_file(make_goldens.fill(golden["seed"], golden["shapes"], gemma), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    model = models.load(folder, "float32")
    sizes = dict(num_pages=1 + 24 * 7, max_sequences=24, max_pages_per_sequence=7, page_size=PAGE_SIZE)
    cache = KVCache.create(model.cache_config(**sizes))
    stepper = Stepper(model.forward, token_counts=(32,))
    run = jax.jit(
        functools.partial(
            beam_search, stepper, width=WIDEST, max_new_tokens=make_beams.NEW_TOKENS, early_stopping=early
        )
    )
    texts = make_beams.prompts(golden["seed"]) * len(make_beams.WIDTHS)
    prompts, widths = np.zeros((len(texts), max(map(len, texts))), np.int32), np.repeat(make_beams.WIDTHS, 3)
    for row, text in enumerate(texts):
        prompts[row, : len(text)] = text
    lengths = jnp.array([len(text) for text in texts], jnp.int32)

    def search(penalty: float, stop: list[int]):
        """What is found, by width: for each prompt its sequences and scores."""
        stops = jnp.array(stop or [-1, -1], jnp.int32)
        options = dict(widths=jnp.asarray(widths, jnp.int32), length_penalty=jnp.float32(penalty), stop_tokens=stops)
        out, after = jax.device_get(run(model.params, jnp.asarray(prompts), lengths, cache, **options))
        assert np.array_equal(after.tables.num_free, cache.tables.num_free), "all pages are given back"
        found = [
            [(out.tokens[q, i, : out.lengths[q, i]].tolist(), float(out.scores[q, i])) for i in range(widths[q])]
            for q in range(len(texts))
        ]
        return {width: found[3 * i : 3 * i + 3] for i, width in enumerate(make_beams.WIDTHS)}

    return search


def compare(golden, folder: Path, early: bool | str) -> int:
    """Same sequences in the same order, scores within the tolerance; the number of settings that agree."""
    search, found, num_same, largest = program(golden, folder, early), {}, 0, 0.0
    runs = [run for run in golden["runs"] if run["early"] == early]
    for run in runs:
        setting = run["penalty"], tuple(run["stop"])
        if setting not in found:
            found[setting] = search(run["penalty"], run["stop"])
        for ours, theirs in zip(found[setting][run["width"]], run["found"], strict=True):
            assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs], setting
            difference = max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
            assert difference < TOLERANCE, f"{setting}: a score differs by {difference}"
            largest = max(largest, difference)
        num_same += 1
    print(f"{num_same} settings: the same sequences, scores within {largest:.1e}")
    return num_same


def test_the_settings_of_the_stored_searches_find_different_sequences():
    for golden in GOLDENS.values():
        with_stops = [run for run in golden["runs"] if run["stop"]]
        for name, num in (("width", 3), ("penalty", 3), ("early", 3)):
            others = {"width", "penalty", "early"} - {name}
            by_rest: dict[tuple, set[str]] = {}
            for run in with_stops:
                tokens = json.dumps([[sequence for sequence, _ in beams[:2]] for beams in run["found"]])
                by_rest.setdefault(tuple(str(run[other]) for other in sorted(others)), set()).add(tokens)
            assert max(map(len, by_rest.values())) > 1 and len({str(run[name]) for run in with_stops}) == num, name


@pytest.mark.parametrize(
    ("case", "early"),
    [
        # Each compiles a program; in the short run the family with windows and the default rule stand for all.
        pytest.param(case, early, marks=() if (case, early) == ("gemma3", False) else pytest.mark.long)
        for case in make_beams.CASES
        for early in make_beams.EARLY
    ],
)
def test_sequences_and_scores_equal_transformers(case, early, tmp_path):
    num_same = compare(GOLDENS[case], tmp_path, early)
    assert num_same == (12 if early is False else 9), "three widths with three penalties, and without stop tokens"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Other weights and prompts than the stored ones, searched now."""
    path = tmp_path_factory.mktemp("fresh") / "beams.json"
    run_live(make_beams.__file__, "--seed", "1", "--output", str(path))
    return json.loads(path.read_text())


@pytest.mark.parity
@pytest.mark.parametrize("early", make_beams.EARLY)
@pytest.mark.parametrize("case", make_beams.CASES)
def test_sequences_and_scores_of_fresh_checkpoints_equal_transformers(case, early, fresh, tmp_path):
    compare(fresh[case], tmp_path, early)
