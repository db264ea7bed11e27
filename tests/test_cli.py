"""The command line, in this process."""

import functools
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_jax import models
from paged_jax.cli import _beams, _parser, _sampling, keep_compiled_programs, main
from paged_jax.engine import Engine
from paged_jax.engine.core import Core
from paged_jax.models.families import FAMILIES
from paged_jax.sampling import BeamParams, SamplingParams

load = functools.cache(models.load)


@pytest.fixture(autouse=True)
def one_model_for_all_calls(monkeypatch, shallow_demo, one_token_count):
    """A model that is loaded again is compiled again; and nothing is kept on disk."""
    monkeypatch.setattr(models, "DEMO", shallow_demo)
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr("paged_jax.cli.keep_compiled_programs", lambda: None)


@pytest.fixture(scope="module")
def continuation(shallow_demo):
    """What the demo model greedily says after a prompt, without any cache."""
    model = load(shallow_demo, None)
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
    assert main(["generate", "import ", "def main(", "--max-new-tokens", "6", "--num-samples", "2"]) == 0
    expected = [text + continuation(text, 6) for text in ("import ", "import ", "def main(", "def main(")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in expected)


def test_generate_reads_prompts_from_a_file_and_from_stdin(capsys, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("import \n\ndef main(\n")
    options = ["--max-new-tokens", "6", "--json", "--num-samples", "2", "--temperature", "0.8"]
    assert main(["generate", "--file", str(path), *options]) == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("import \n\ndef main(\n"))
    assert main(["generate", *options]) == 0
    assert capsys.readouterr().out == from_file, "the same seed draws the same tokens"
    samples = [json.loads(line) for line in from_file.splitlines()]
    assert [(s["prompt"], s["sample"]) for s in samples] == [
        ("import ", 0), ("import ", 1), ("def main(", 0), ("def main(", 1)
    ]  # fmt: skip
    assert len({s["text"] for s in samples}) > 1 and all(s["finish_reason"] == "length" for s in samples)
    assert all(s["logprob"] < 0 for s in samples)


def test_beams_have_options_of_their_own():
    given = "generate x --beams 4 --num-samples 2 --max-new-tokens 9 --length-penalty 0.5 --early-stopping never"
    expected = BeamParams(4, 9, 2, 0.5, "never", (7,))
    assert _beams(_parser().parse_args([*given.split(), "--stop-token", "7"])) == expected


@pytest.mark.long  # another program; searches of an engine stand in tests/engine/test_engine_beams.py
def test_generate_with_one_beam_is_greedy_and_says_what_it_is_worth(capsys, continuation):
    options = ["--beams", "1", "--max-new-tokens", "6", "--length-penalty", "0.5", "--json"]
    assert main(["generate", "import ", "def main(", *options]) == 0
    for text, line in zip(("import ", "def main("), capsys.readouterr().out.splitlines(), strict=True):
        found = json.loads(line)
        assert found["prompt"] == text and found["text"] == continuation(text, 6)
        assert found["finish_reason"] == "length" and found["logprob"] < 0
        assert abs(found["score"] - found["logprob"] / 6**0.5) < 1e-4


@pytest.fixture
def chat_folder(tmp_path):
    """The demo model with a chat template of its own."""
    for path in models.DEMO.iterdir():
        (tmp_path / path.name).symlink_to(path)
    template = "{{ eos_token }}{% for m in messages %}def {{ m.content }}({% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return str(tmp_path)


def test_generate_chats_by_the_template_of_the_checkpoint(capsys, chat_folder, continuation):
    assert main(["generate", "main", "--chat", "--model", chat_folder, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == "main\n" + continuation("def main(", 6) + "\n"


def test_generate_takes_objects_with_wishes_of_their_own(capsys, monkeypatch, continuation):
    lines = ['{"prompt": "import ", "max_new_tokens": 5}', '{"prompt": "def main(", "stop_strings": "("}']
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["generate", "--json-input", "--json", "--max-new-tokens", "6", "--stop-string", "zzz"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["text"] == continuation("import ", 5) and first["finish_reason"] == "length"
    assert second["text"] == continuation("def main(", 6).partition("(")[0]


def test_every_field_of_the_sampling_parameters_has_an_option():
    given = _parser().parse_args(
        "generate x --max-new-tokens 9 --min-new-tokens 1 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 "
        "--repetition-penalty 1.5 --presence-penalty 0.1 --frequency-penalty 0.2 --logit-bias 5=-1.5 "
        "--forbidden-token 7 --stop-token 3 --stop-token 4 --stop-string END --seed 11 --num-samples 2".split()
    )
    assert _sampling(given) == SamplingParams(
        max_new_tokens=9, min_new_tokens=1, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5,
        presence_penalty=0.1, frequency_penalty=0.2, logit_bias=((5, -1.5),), forbidden_tokens=(7,),
        stop_tokens=(3, 4), stop_strings=("END",), seed=11, num_samples=2,
    )  # fmt: skip
    assert _sampling(_parser().parse_args(["generate", "x"])) == SamplingParams(max_new_tokens=64)


def interrupt_after(monkeypatch, num_steps: int) -> None:
    """Ctrl-C in the step after some."""
    steps, advance = itertools.count(), Core.advance

    def interrupted(core):
        if next(steps) == num_steps:
            raise KeyboardInterrupt
        advance(core)

    monkeypatch.setattr(Core, "advance", interrupted)


def test_an_interrupt_prints_what_there_is_and_ends_cleanly(capsys, monkeypatch, continuation):
    interrupt_after(monkeypatch, 4)
    assert main(["generate", "import ", "def main(", "--max-new-tokens", "40"]) == 130
    first, second = capsys.readouterr().out.split("def main(")
    assert ("import " + continuation("import ", 40)).startswith(first.rstrip("\n")) and first.endswith("\n")
    assert continuation("def main(", 40).startswith(second.removesuffix("\n"))


def test_chat_remembers_what_was_said_and_what_was_cut(capsys, monkeypatch, chat_folder, continuation):
    said = iter(["main", "run"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or exec("raise EOFError"))
    assert main(["chat", "--model", chat_folder, "--max-new-tokens", "6", "--max-length", "128"]) == 0
    first = continuation("def main(", 6)
    second = continuation(f"def main(def {first}(def run(", 6)
    assert capsys.readouterr().out == f"{first}\n{second}\n\n"


@pytest.fixture
def statistics(monkeypatch):
    """Of the engines that were closed."""
    found, close = [], Engine.close

    def close_and_keep(engine):
        close(engine)
        found.append(engine.stats())

    monkeypatch.setattr(Engine, "close", close_and_keep)
    return found


def test_generate_finds_what_an_earlier_call_has_stored(tmp_path, capsys, statistics):
    command = ["generate", 20 * "x = 1\n", "--max-new-tokens", "4", "--store", str(tmp_path)]
    outputs = []
    for _ in range(2):
        assert main([*command, "--host-cache-bytes", "1MiB"]) == 0
        outputs.append(capsys.readouterr().out)
    first, second = statistics
    assert outputs[0] == outputs[1] and first.loaded_tokens == {}
    assert second.loaded_tokens["store"] == second.prompt_tokens - 1
    assert f"{second.prompt_tokens - 1} tokens loaded from the store; 0 pages in host memory" in second.summary


def test_chat_has_the_same_options(monkeypatch):
    seen = {}

    def from_pretrained(folder, **options):
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    assert main(["chat", "--store", "there", "--host-cache-bytes", "2GiB"]) == 2
    assert (seen["store"], seen["host_cache_bytes"]) == ("there", "2GiB")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host-cache-bytes", "much"], "host_cache_bytes='much': 'much' is no size: write a number of bytes"),
        (["--store", "s4://x"], "the store 's4://x' cannot be opened"),
        (["--store", __file__], "is a file: name a folder"),
    ],
)
def test_what_makes_no_sense_for_an_engine_is_refused(capsys, options, message):
    assert main(["generate", "x", *options]) == 2
    assert message in capsys.readouterr().err


def test_demo_prints_text_and_memory(capsys):
    assert main(["demo", "--num-samples", "2", "--max-new-tokens", "8"]) == 0
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
        (
            ["generate", "x", "--cache-dtype", "int4"],
            "dtype must be one of float32, bfloat16, int8, float8_e4m3fn, got",
        ),
        (["generate", "x", "--page-size", "0"], "page_size must be a whole number of at least 1, got 0"),
        (["generate", "x", "--num-pages", "2"], "needs 5 pages, but the pool has 1 besides the null page"),
        (["generate", "x", "--top-p", "2"], r"top_p must be in"),
        (["generate", "x", "--beams", "2", "--top-k", "3"], "--beams finds the likeliest sequences: leave out --top-k"),
        (
            ["generate", "x", "--beams", "2", "--drafts", "3"],
            "leave out --drafts",
        ),
        (
            ["generate", "x", "--length-penalty", "2"],
            "--length-penalty is for beam search: add --beams",
        ),
        (["generate", "x", "--drafts", "9"], "num_drafts of the drafter must be from 1 to 7, got 9"),
        (
            ["generate", "x", "--beams", "2", "--json-input"],
            "--json-input reads fields of SamplingParams, which a search",
        ),
        (["generate", "x", "--beams", "2", "--num-samples", "3"], "--num-samples 3 of --beams 2: ask for no more than"),
        (["demo", "--num-samples", "0"], "num_samples must be at least 1"),
    ],
)
def test_bad_input_is_named_on_stderr(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("paged_jax: ")
    assert captured.out == ""
