"""Chat templates: the text and the tokens of transformers, and what is refused."""

import json
from datetime import datetime
from pathlib import Path

import make_chats
import pytest
import tokenizers
from live import run_live

from paged_jax import models
from paged_jax.models.chat_template import ChatTemplate
from paged_jax.models.special_tokens import SpecialTokens
from paged_jax.models.tool_schema import as_schemas

SAY = make_chats.SAY


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder of tokenizer files for each style."""
    tokenizer = tokenizers.Tokenizer.from_file(str(models.DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens(make_chats.SPECIAL_TOKENS)
    parent = tmp_path_factory.mktemp("chats")
    for style in [*make_chats.STYLES, *make_chats.FAMILIES]:
        make_chats.write_folder(parent / style, style, tokenizer.to_str())
    for name in make_chats.VARIANTS:
        make_chats.write_variant(parent / name, name, tokenizer.to_str())
    return parent


def compare(folders: Path, found: dict) -> None:
    assert len(found["chats"]) == len(make_chats.CHATS)
    for (style, messages, variables), theirs in zip(make_chats.CHATS, found["chats"], strict=True):
        tokenizer = models.Tokenizer.load(folders / style)
        assert tokenizer.chat_text(messages, **variables) == theirs["text"]
        assert tokenizer.chat(messages, **variables) == theirs["tokens"]


def compare_families(folders: Path, found: dict) -> None:
    """The text of transformers, or one sentence where the template refuses a scene."""
    assert len(found["families"]) >= 40
    num_refused = 0
    for family, scenes in found["families"].items():
        tokenizer = models.Tokenizer.load(folders / family)
        assert scenes.keys() == make_chats.SCENES.keys()
        for scene, (messages, variables) in make_chats.SCENES.items():
            if scenes[scene] is not None:
                assert tokenizer.chat_text(messages, **variables) == scenes[scene], (family, scene)
            else:
                num_refused += 1
                with pytest.raises(ValueError, match="chat_template.jinja: the chat template"):
                    tokenizer.chat_text(messages, **variables)
    print(f"{len(found['families'])} families, {num_refused} scenes refused by both")


def compare_variants(folders: Path, found: dict) -> None:
    assert found["variants"].keys() == make_chats.VARIANTS.keys()
    for name, theirs in found["variants"].items():
        tokenizer = models.Tokenizer.load(folders / name)
        tokens = tokenizer.encode(make_chats.VARIED)
        texts = [tokenizer.decode(tokens), tokenizer.decode(tokens, special_tokens=True)]
        named = SpecialTokens.load(folders / name).named
        assert {"tokens": tokens, "texts": texts, "named": named} == theirs, name


def stored() -> dict:
    return json.loads((Path(__file__).parent / "goldens" / "chats.json").read_text(encoding="utf-8"))


def test_chats_are_written_as_transformers_does(folders):
    compare(folders, stored())


def test_forty_families_are_written_as_transformers_does(folders):
    compare_families(folders, stored())


def test_functions_become_the_schemas_that_transformers_makes():
    assert as_schemas(make_chats.FUNCTIONS) == stored()["schemas"]


def test_folders_mean_the_tokens_that_transformers_reads_from_them(folders):
    compare_variants(folders, stored())


@pytest.mark.parity
def test_chats_are_written_as_transformers_does_now(folders):
    found = json.loads(run_live(make_chats.__file__, str(folders)))
    compare(folders, found)
    compare_families(folders, found)
    compare_variants(folders, found)
    assert as_schemas(make_chats.FUNCTIONS) == found["schemas"]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, Path("folder/chat_template.jinja"), {})


def test_a_template_may_ask_for_the_date(folders):
    before, text, after = datetime.now(), template("{{ strftime_now('%Y-%m-%d') }}").render(SAY), datetime.now()
    assert f"{before:%Y-%m-%d}" <= text <= f"{after:%Y-%m-%d}"


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{% if x %}", SAY, r"chat_template.jinja: the chat template is broken in line 1: Unexpected end of template"),
        ("{{ raise_exception('no!') }}", SAY, r"chat_template.jinja: the chat template refuses this conversation: no!"),
        ("{{ messages[0].content + 1 }}", SAY, r"refuses this conversation: can only concatenate str"),
        ("{{ ''.__class__.__mro__ }}", SAY, r"refuses this conversation: access to attribute '__class__' .* unsafe"),
        ("{{ messages.append(1) }}", SAY, r"refuses this conversation: access to attribute 'append' .* unsafe"),
        ("", [{"role": "user", "content": Path()}], r"refuses this conversation: Object of type PosixPath is not JSON"),
        ("", [], "the conversation is empty: give at least one message"),
    ],
)
def test_a_template_that_fails_says_where_and_why(source, messages, message):
    with pytest.raises(ValueError, match=message):
        template(source).render(messages)


def test_turns_that_the_template_forbids_are_refused(folders):
    with pytest.raises(ValueError, match="refuses this conversation: user and assistant must take turns"):
        models.Tokenizer.load(folders / "turns").chat([*SAY, *SAY])


@pytest.mark.parametrize("config", [None, {}])
def test_a_folder_without_a_template_is_refused_when_it_is_needed(tmp_path, config):
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((models.DEMO / "tokenizer.json").read_bytes())
    tokenizer = models.Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="has no chat template: chat_template.jinja does not exist, and tokenizer_con"):
        tokenizer.chat(SAY)


DEFAULT, TOOL_USE = "{{ 'd' ~ (tools is none) }}", "{{ tools[0].function.name }}"
NAMED = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": TOOL_USE}]


def write_named(folder: Path, where: str) -> models.Tokenizer:
    """A folder with two templates, in one of the places where they may stand."""
    (folder / "tokenizer.json").write_bytes((models.DEMO / "tokenizer.json").read_bytes())
    if where == "tokenizer_config.json":
        (folder / where).write_text(json.dumps({"chat_template": NAMED}))
    elif where == "chat_template.json":
        (folder / where).write_text(json.dumps({"chat_template": NAMED}))
    else:
        (folder / "chat_template.jinja").write_text(DEFAULT)
        (folder / where).mkdir()
        (folder / where / "tool_use.jinja").write_text(TOOL_USE)
    return models.Tokenizer.load(folder)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.json", "additional_chat_templates"])
def test_tools_choose_the_template_tool_use(tmp_path, where):
    tokenizer = write_named(tmp_path, where)
    assert tokenizer.chat_text(SAY) == "dTrue"
    assert tokenizer.chat_text(SAY, tools=[make_chats.WEATHER]) == "weather"
    assert tokenizer.chat_text(SAY, tools=[make_chats.weather]) == "weather"
    assert tokenizer.chat_text(SAY, tools=[make_chats.WEATHER], chat_template="default") == "dFalse"
    assert tokenizer.chat_text(SAY, chat_template="{{ 1 + 1 }}") == "2"


def test_templates_without_a_default_are_listed(tmp_path):
    tokenizer = write_named(tmp_path, "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED[1:]}))
    with pytest.raises(
        ValueError, match="several chat templates and none named 'default': pass chat_template= one of tool_"
    ):
        tokenizer.chat_text(SAY)


@pytest.mark.parametrize("found", [3, [{"name": "default"}], ["x"], [{"name": "a", "template": 1}]])
def test_a_chat_template_of_another_kind_is_refused(tmp_path, found):
    tokenizer = write_named(tmp_path, "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json has chat_template=.*it must be a text, or a list of obj"
    ):
        tokenizer.chat_text(SAY)


OPEN = [*SAY, {"role": "assistant", "content": "It is ", "thinking": "so"}]
PLAIN = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"


def test_the_last_turn_stays_open_where_it_is_continued():
    assert template(PLAIN).render(OPEN) == "[ import os ][It is ]["
    assert template(PLAIN).render(OPEN, continue_final_message=True) == "[ import os ][It is "
    assert template(PLAIN.replace("m.content", "m.content | trim")).render(OPEN, continue_final_message=True) == (
        "[import os][It is"
    )
    thoughts = template("{{ messages[-1].reasoning_content }}</think>")
    assert thoughts.render(OPEN, continue_final_message="thinking") == "so"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    inner = template("{% for part in messages[0].content %}{{ part.text }}|{% endfor %}")
    assert inner.render(parts, continue_final_message=True) == "a"


@pytest.mark.parametrize(
    ("source", "messages", "options", "message"),
    [
        (PLAIN, OPEN, {"add_generation_prompt": True, "continue_final_message": True}, "give only one of them"),
        (
            "{{ 1 }}",
            OPEN,
            {"continue_final_message": True},
            "never reads a message's 'content': it cannot be continued",
        ),
        (PLAIN, OPEN, {"continue_final_message": "name"}, "never reads a message's 'name': it cannot be continued"),
        (
            PLAIN,
            [{"role": "assistant"}],
            {"continue_final_message": True},
            "the last message has no text in its 'content'",
        ),
        (
            "{{ messages[0].content }}",
            OPEN,
            {"continue_final_message": True},
            "does not write the last message as it is",
        ),
        (PLAIN, OPEN, {"tools": [3]}, "3 is no tool: give a JSON schema as a dict, or a function"),
        (PLAIN, OPEN, {"tools": [len]}, "<built-in function len> is no tool"),
    ],
)
def test_options_that_contradict_each_other_are_refused(source, messages, options, message):
    with pytest.raises(ValueError, match=message):
        template(source).render(messages, **options)


def no_docstring(a: int): ...


def no_hint(a):
    """Does.

    Args:
        a: it
    """


def no_description(a: int):
    """Does."""


def odd_hint(a: Path):
    """Does.

    Args:
        a: it
    """


def odd_choices(a: str):
    """Does.

    Args:
        a: it (choices: x)
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            no_docstring,
            "no_docstring cannot be described as a tool: it has no docstring. Mend that, or pass a JSON schema",
        ),
        (no_hint, "its argument 'a' has no type hint"),
        (no_description, "its docstring does not describe the argument 'a'"),
        (odd_hint, "the type hint <class 'pathlib.*Path'> has no JSON schema"),
        (odd_choices, r"the choices in 'it \(choices: x\)' are no JSON list"),
    ],
)
def test_a_function_that_says_too_little_is_refused_by_name(function, message):
    with pytest.raises(ValueError, match=message):
        as_schemas([function])


def test_what_is_set_within_a_generation_block_stays_within():
    source = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    assert template(source).render(SAY) == "21"
