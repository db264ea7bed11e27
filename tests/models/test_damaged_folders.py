"""Folders that were damaged at random are refused with one sentence that names a file, or load the same weights."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_tokenizers
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_decoder import make_decoder
from tiny import EXPERTS, TINY

from paged_jax import models
from paged_jax.models.checkpoint import decoder_config

KINDS = {
    "llama": TINY | dict(rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, eos_token_id=2),
    "gpt_oss": TINY | EXPERTS | dict(attention_bias=True, layer_types=["full_attention"] * 2),
    "mixtral": TINY | dict(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1),
}
WRONG = st.sampled_from(
    [None, True, -1, 0, 1, 3, 2**31, 2**70, 1.5, -0.5, 1e30, "", "1", "x" * 500, [], [1], ["a"], {}, {"a": 1}]
)
WRONG_SIZES = st.sampled_from(
    [None, True, -1, 0, 1, 2**40, 2**80, 1.5, "8", [], [[0]], {}, [0, 2**40], [-8, 8], [8, 0], [1.5, 2]]
)


def write(folder: Path, kind: str) -> dict[str, np.ndarray]:
    params = nnx.state(make_decoder(decoder_config(KINDS[kind])))
    models.save(folder, KINDS[kind], params, num_shards=3)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return weights(params)


def weights(params) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One whole folder of each kind, with its weights."""
    parent = tmp_path_factory.mktemp("whole")
    return {kind: (parent / kind, write(parent / kind, kind)) for kind in KINDS}


def damage_json(data, path: Path) -> None:
    """Removes a key or gives it another value, in one of the objects of the file."""
    value = json.loads(path.read_text())
    objects = [value, *(entry for entry in value.values() if isinstance(entry, dict) and entry)]
    target = data.draw(st.sampled_from(objects))
    key = data.draw(st.sampled_from(sorted(target)))
    if data.draw(st.booleans()):
        del target[key]
    else:
        target[key] = data.draw(WRONG)
    path.write_text(json.dumps(value))


def damage_bytes(data, path: Path) -> None:
    """Cuts the file, or overwrites some of its bytes; of a shard, of its header."""
    content = bytearray(path.read_bytes())
    reach = (
        min(len(content), 8 + int.from_bytes(content[:8], "little")) if path.suffix == ".safetensors" else len(content)
    )
    if data.draw(st.booleans()):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        start = data.draw(st.integers(0, reach - 1))
        content[start : start + 4] = data.draw(st.binary(min_size=1, max_size=4))
        path.write_bytes(content)


def damage_header(data, path: Path) -> None:
    """Says something else of a tensor: its sizes, dtype, place or name."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    what = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "remove", "rename", "entry"]))
    if what == "remove":
        del header[name]
    elif what == "rename":
        header[
            data.draw(st.sampled_from(["x", name + "_blocks", "model.layers.0.mlp.experts.99999999999.w1.weight"]))
        ] = header.pop(name)
    elif what == "entry":
        header[name] = data.draw(WRONG)
    else:
        wrong = st.sampled_from(["F64", "U8", "BF16", "F8_E4M3", "", 3]) if what == "dtype" else WRONG_SIZES
        header[name][what] = data.draw(wrong)
    text = json.dumps(header).encode()
    said = data.draw(st.sampled_from([len(text), len(text), len(text), 0, 2**40, 2**63]))
    path.write_bytes(said.to_bytes(8, "little") + text + content[8 + size :])


def damage(data, folder: Path) -> None:
    files = sorted(path for path in folder.iterdir())
    path = data.draw(st.sampled_from(files))
    how = data.draw(st.sampled_from(["delete", "bytes", "json", "header", "header"]))
    if how == "delete":
        path.unlink()
    elif how == "bytes":
        damage_bytes(data, path)
    elif how == "json":
        damage_json(data, data.draw(st.sampled_from([file for file in files if file.suffix == ".json"])))
    else:
        damage_header(data, data.draw(st.sampled_from([file for file in files if file.suffix == ".safetensors"])))


def load_or_refuse(folder: Path) -> models.Model | None:
    """The model; None where it is refused, as it should be."""
    try:
        return models.load(folder, "float32")
    except ValueError as error:
        assert str(folder) in str(error), error
        assert len(str(error)) < 4000
    return None


def check(folder: Path, intact: dict[str, np.ndarray]) -> None:
    model = load_or_refuse(folder)
    if model is None:
        return
    # What still loads means what it says: the same weights, or those that another config.json describes
    loaded = weights(model.params)
    for path in loaded.keys() & intact.keys():
        np.testing.assert_array_equal(loaded[path], intact[path], err_msg=path)
    assert loaded.keys() == intact.keys() or loaded.keys() == intact.keys() - {"head.weight"}


def load_damaged(whole: Path, folder: Path, num_examples: int, load: Callable[[Path], None]) -> None:
    """Calls `load` on copies of a whole folder, each damaged at random in its own way."""

    @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def run(data):
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for path in whole.iterdir():
            shutil.copyfile(path, folder / path.name)
        damage(data, folder)
        load(folder)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_folder_is_refused_by_name_or_loads_the_same_weights(kind, folders, tmp_path):
    whole, intact = folders[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_damaged(whole, tmp_path / "damaged", 40, lambda folder: check(folder, intact))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB: no lie about a size is believed


# In a process of its own, which prints the most memory that loading one of the folders added, and how many
# could be loaded.
LOAD_DAMAGED = """
import gc, re, sys
from pathlib import Path
import test_damaged_folders as own
whole, folder, num_examples = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
own.models.load(own.models.DEMO)
status = lambda name: int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
most = num_loaded = 0

def load(folder):
    global most, num_loaded
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status("VmRSS")
    num_loaded += own.load_or_refuse(folder) is not None
    most = max(most, status("VmHWM") - before)

own.load_damaged(whole, folder, num_examples, load)
print(most, num_loaded)
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_large_damaged_folder_takes_no_more_memory_than_loading_it(tmp_path):
    config = KINDS["llama"] | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=16384)
    config |= dict(num_attention_heads=8, num_key_value_heads=4)
    params = nnx.state(models.Decoder(decoder_config(config), rngs=nnx.Rngs(0)))
    whole = tmp_path / "whole"
    models.save(whole, config, params, num_shards=3)
    size = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    command = [sys.executable, "-c", LOAD_DAMAGED, str(whole), str(tmp_path / "damaged"), "40"]
    child = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    most, num_loaded = map(int, child.stdout.split())
    print(f"{size / 1e6:.0f} MB, {num_loaded} of 40 loaded: peak {most / size:.3f} of it")
    assert 0 < num_loaded < 40 and most <= 1.3 * size


TEXT_FILES = {
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": "</s>",
        "additional_special_tokens": ["<|tool|>"],
        "chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}],
    },
    "special_tokens_map.json": {"eos_token": {"content": "</s>", "lstrip": False}},
    "added_tokens.json": {"</s>": 1537},
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    small_tokenizers.byte_level().save(str(folder / "tokenizer.json"))
    for name, value in TEXT_FILES.items():
        (folder / name).write_text(json.dumps(value))
    assert models.Tokenizer.load(folder).chat_text([{"content": "x"}]) == "<s>x"
    return folder


def test_a_damaged_tokenizer_is_refused_by_name_or_reads_text(text_folder, tmp_path):
    folder = tmp_path / "damaged"

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def run(data):
        folder.mkdir(exist_ok=True)
        for path in text_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        path = folder / data.draw(st.sampled_from(sorted([*TEXT_FILES, "tokenizer.json"])))
        (damage_json if data.draw(st.booleans()) else damage_bytes)(data, path)
        try:
            tokenizer = models.Tokenizer.load(folder)
            assert all(isinstance(token, int) for token in tokenizer.encode("the cat"))
            tokenizer.chat_text([{"role": "user", "content": "x"}])
        except ValueError as error:
            assert str(folder) in str(error), error
            assert len(str(error)) < 4000

    run()
