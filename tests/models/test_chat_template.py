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

SAY = make_chats.SAY


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder of tokenizer files for each style."""
    tokenizer = tokenizers.Tokenizer.from_file(str(models.DEMO / "tokenizer.json"))
    tokenizer.add_special_tokens(make_chats.SPECIAL_TOKENS)
    parent = tmp_path_factory.mktemp("chats")
    for style in make_chats.STYLES:
        make_chats.write_folder(parent / style, style, tokenizer.to_str())
    return parent


def compare(folders: Path, found: list[dict]) -> None:
    assert len(found) == len(make_chats.CHATS)
    for (style, messages, variables), theirs in zip(make_chats.CHATS, found, strict=True):
        tokenizer = models.Tokenizer.load(folders / style)
        assert tokenizer.chat_text(messages, **variables) == theirs["text"]
        assert tokenizer.chat(messages, **variables) == theirs["tokens"]


def test_chats_are_written_as_transformers_does(folders):
    compare(folders, json.loads((Path(__file__).parent / "goldens" / "chats.json").read_text()))


@pytest.mark.parity
def test_chats_are_written_as_transformers_does_now(folders):
    compare(folders, json.loads(run_live(make_chats.__file__, str(folders))))


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
