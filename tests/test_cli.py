"""The command line, in this process."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import models
from paged_jax.cli import keep_compiled_programs, main
from paged_jax.generator import Completion
from paged_jax.models.families import FAMILIES

load = functools.cache(models.load)


@pytest.fixture(autouse=True)
def one_model_for_all_calls(monkeypatch):
    """A model that is loaded again is compiled again; and nothing is kept on disk."""
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: None)


@pytest.fixture(scope="module")
def continuation():
    """What the demo model greedily says after a prompt, without any cache."""
    model = load(models.DEMO, None)
    dense = jax.jit(model.dense_forward)

    def greedy(text, count):
        tokens = model.tokenizer.encode(text)
        prompt = len(tokens)
        for _ in range(count):
            padded = np.array(tokens + [0] * (64 - len(tokens)), np.int32)
            tokens.append(int(jnp.argmax(dense(model.params, padded)[len(tokens) - 1])))
        return model.tokenizer.decode(tokens[prompt:])

    return greedy


def test_generate_continues_prompts_from_arguments(capsys, continuation):
    assert main(["generate", "import ", "def main(", "--max-new-tokens", "6", "--samples", "2"]) == 0
    expected = [text + continuation(text, 6) for text in ("import ", "import ", "def main(", "def main(")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)


def test_generate_reads_prompts_from_a_file_and_from_stdin(capsys, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("import \n\ndef main(\n")
    options = ["--max-new-tokens", "6", "--json", "--samples", "2", "--temperature", "0.8"]
    assert main(["generate", "--file", str(path), *options]) == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("import \n\ndef main(\n"))
    assert main(["generate", *options]) == 0
    assert capsys.readouterr().out == from_file, "the same seed draws the same tokens"
    samples = [json.loads(line) for line in from_file.splitlines()]
    assert [(s["prompt"], s["sample"]) for s in samples] == [
        ("import ", 0), ("import ", 1), ("def main(", 0), ("def main(", 1)
    ]  # fmt: skip
    assert len({s["text"] for s in samples}) > 1 and all(s["finish"] == "length" for s in samples)
    assert all(s["logprob"] < 0 for s in samples)


def test_generate_chats_by_the_template_of_the_checkpoint(capsys, tmp_path, monkeypatch):
    class Parrot:
        def __init__(self, *_, **__):
            pass

        def run(self, prompts, params):
            return [[Completion(tuple(prompt), (0.0,) * len(prompt), "length")] for prompt in prompts]

    monkeypatch.setattr("paged_jax.generator.Generator", Parrot)
    for path in models.DEMO.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}def {{ messages[0].content }}(")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert main(["generate", "main", "--chat", "--model", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "main\ndef main(\n"


def test_demo_prints_text_and_memory(capsys):
    assert main(["demo", "--samples", "2", "--max-new-tokens", "8"]) == 0
    output = capsys.readouterr().out
    assert "prompt 5" in output and "sample 1" in output
    assert "the pool at its fullest" in output
    assert "sharing saves" in output and "times the paged cache" in output


def test_families_lists_what_config_json_may_name(capsys):
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FAMILIES) and "smollm3      SmolLM 3" in lines


@pytest.fixture
def jax_config():
    """JAX's options of its cache on disk, restored afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_on_disk_unless_jax_has_a_folder_for_them(tmp_path, monkeypatch, jax_config):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax_config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()
    assert jax_config.jax_compilation_cache_dir == str(tmp_path / "paged_jax")
    jax_config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    keep_compiled_programs()
    assert jax_config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_every_command_keeps_compiled_programs(monkeypatch):
    calls = []
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: calls.append(1))
    assert main(["families"]) == 0 and calls == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "no prompts: pass them as arguments, with --file, or one a line on stdin"),
        (["generate", "x", "--file", "y"], "prompts came as arguments and with --file: give one or the other"),
        (["generate", "--file", "/nowhere"], "No such file"),
        (["generate", "x", "--model", "/nowhere"], "/nowhere/config.json"),
        (["generate", "x", "--chat"], "has no chat template"),
        (["generate", "x", "--dtype", "float7"], "float7"),
        (["generate", "x", "--page-size", "0"], "page_size must be a whole number of at least 1, got 0"),
        (["generate", "x", "--num-pages", "2"], "needs 5 pages, but the pool has 1 besides the null page"),
        (["generate", "x", "--top-p", "2"], r"top_p must be in"),
        (["demo", "--samples", "0"], "num_samples must be at least 1"),
    ],
)
def test_bad_input_is_named_on_stderr(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("paged_jax: ")
    assert captured.out == ""
