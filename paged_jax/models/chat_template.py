"""Conversations to text, by the Jinja template that comes with a chat model."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from paged_jax.models.safetensors_file import read_json
from paged_jax.models.special_tokens import CONFIG, SpecialTokens
from paged_jax.models.tool_schema import as_schemas

FILE, MORE_FILES = "chat_template.jinja", "additional_chat_templates"
LEGACY_FILE = "chat_template.json"  # of processors, for models that see images
# Names of a message's thoughts. Templates read the first, those of gpt-oss the second.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
MARK = "THE_TEXT_ENDS_HERE "  # stands at the end of a message that stays open; the blank shows whether it is trimmed


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """How a conversation is written down for the model; run in Jinja's sandbox, for it came with a download.

    Args:
        source: the template.
        path: the file that holds it, for errors.
        special_tokens: what the template may call by name, such as `bos_token`.
    """

    source: str
    path: Path
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The conversation as the text that the model continues.

        Args:
            messages: what was said, such as `{"role": "user", "content": "Hello"}`; values as in JSON.
            tools: what the model may call: JSON schemas, or functions with type hints and a docstring.
            add_generation_prompt: end with the beginning of the model's next message; None: unless the last message is
                continued.
            continue_final_message: leave the last message open; a name: this field instead of its content.
            variables: other names that the template reads; they go before special tokens.

        Raises:
            ValueError: the template is broken or refuses the conversation, there is nothing in it, or the options
                contradict each other.
        """
        if not messages:
            raise ValueError("the conversation is empty: give at least one message.")
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt=True begins a new message and continue_final_message leaves the last one open: "
                "give only one of them."
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        plain = self._plain(messages, {"tools": as_schemas(tools), **variables})
        messages = [_with_thoughts(message) for message in plain.pop("messages")]
        opened = self._open(messages, continue_final_message) if continue_final_message else ""
        defaults = {"documents": None, **self.special_tokens}
        try:
            text = self._compiled.render(
                defaults | plain, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.path}: the chat template is broken in line {error.lineno}: {error}.") from error
        except Exception as error:  # a template can fail in every way that an expression can
            raise ValueError(f"{self.path}: the chat template refuses this conversation: {error}") from error
        return self._cut(text, opened) if continue_final_message else text

    def _plain(self, messages, variables: dict[str, Any]) -> dict[str, Any]:
        """Everything that the template sees, as JSON: other values could have methods that get out of the sandbox."""
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return json.loads(json.dumps({"messages": said, **variables}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: the chat template refuses this conversation: {error}") from error

    def _open(self, messages: list[dict[str, Any]], field: bool | str) -> str:
        """Marks where the last message ends; returns its text."""
        name = field if isinstance(field, str) else "content"
        names = [name]
        if name in THOUGHTS:  # the same thoughts stand under several names
            names = [other for other in THOUGHTS if messages[-1].get(other) == messages[-1].get(name)]
        if not any(other in self.source for other in names):
            raise ValueError(
                f"{self.path}: the chat template never reads a message's {name!r}: it cannot be continued."
            )
        value = messages[-1].get(name)
        if isinstance(value, str):
            messages[-1] |= {other: value + MARK for other in names}
            return value
        texts = [part for part in value or [] if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if not texts:
            raise ValueError(
                f"continue_final_message={field!r}, but the last message has no text in its {name!r}: give it some, or "
                "leave continue_final_message out."
            )
        text = texts[-1]["text"]
        texts[-1]["text"] += MARK
        return text

    def _cut(self, text: str, opened: str) -> str:
        """The text without what the template wrote after the open message."""
        end = text.rfind(MARK.strip())
        if end < 0 or opened.strip() not in text:
            raise ValueError(
                f"{self.path}: the chat template does not write the last message as it is, so it cannot be continued: "
                f"{opened!r}."
            )
        return text[:end] if text.startswith(MARK, end) else text[:end].rstrip()  # the template trims messages

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(self.source)


def load_templates(folder: str | Path) -> dict[str, ChatTemplate]:
    """The templates of a checkpoint by name, from the newest of the places where they may stand.

    These are chat_template.jinja (`default`) with further ones in a folder beside it, chat_template.json, and
    tokenizer_config.json, where they may be several with names.

    Args:
        folder: the checkpoint folder.

    Raises:
        ValueError: a file is not what Hugging Face writes.
    """
    folder = Path(folder)
    files = {"default": folder / FILE} if (folder / FILE).exists() else {}
    files |= {path.stem: path for path in sorted((folder / MORE_FILES).glob("*.jinja"))}
    if files:
        named = SpecialTokens.load(folder).named
        return {name: ChatTemplate(_read_text(path), path, named) for name, path in files.items()}
    for path in (folder / CONFIG, folder / LEGACY_FILE):
        found = read_json(path).get("chat_template") if path.exists() else None
        if found is not None:
            named = SpecialTokens.load(folder).named
            return {name: ChatTemplate(source, path, named) for name, source in _by_name(path, found).items()}
    return {}


def choose(
    templates: Mapping[str, ChatTemplate], folder: Path, name: str | None, tools: Sequence[Any] | None
) -> ChatTemplate:
    """The template for a conversation.

    Args:
        templates: those of the checkpoint, by name.
        folder: the checkpoint folder, for errors.
        name: of one of them, or a template itself; None: `tool_use` where there are tools, otherwise `default`.
        tools: what the model may call.

    Raises:
        ValueError: there is none.
    """
    if name is not None:
        return templates.get(name) or ChatTemplate(name, folder / "chat_template", SpecialTokens.load(folder).named)
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        raise ValueError(
            f"{folder} has several chat templates and none named 'default': pass chat_template= one of "
            f"{', '.join(sorted(templates))}."
        )
    raise ValueError(
        f"{folder} has no chat template: {FILE} does not exist, and {CONFIG} has no 'chat_template'. Give the folder "
        "of a chat model, pass chat_template=, or encode a text."
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable as text ({error}). Download it again.") from error


def _by_name(path: Path, found: Any) -> dict[str, str]:
    """What stands under `chat_template`: one template, or several with names."""
    try:
        named = {"default": found} if isinstance(found, str) else {entry["name"]: entry["template"] for entry in found}
        if all(isinstance(source, str) for source in named.values()):
            return named
    except (TypeError, KeyError):
        pass
    raise ValueError(
        f"{path} has chat_template={str(found)[:80]!r}: it must be a text, or a list of objects with 'name' and "
        "'template'. Download it again."
    )


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """The thoughts of a message under every name that templates read."""
    thoughts = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


class _Generation(jinja2.ext.Extension):
    """Templates mark what the model itself said by `{% generation %}`: of use in training, transparent here."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        # What is set within stays within
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str):
    raise jinja2.TemplateError(message)
