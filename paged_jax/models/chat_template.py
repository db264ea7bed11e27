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
import jinja2.sandbox

from paged_jax.models.safetensors_file import read_json


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

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTemplate":
        """Reads chat_template.jinja, or what tokenizer_config.json says.

        Args:
            folder: the checkpoint folder.

        Raises:
            ValueError: neither has a template, or it is not what Hugging Face writes.
        """
        file, config = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
        values = read_json(config) if config.exists() else {}
        tokens = {name: value for name, value in values.items() if name.endswith("_token")}
        tokens = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
        tokens = {name: value for name, value in tokens.items() if isinstance(value, str)}
        if file.exists():
            return cls(file.read_text(encoding="utf-8"), file, tokens)
        source = values.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise ValueError(
                f"{folder} has no chat template: chat_template.jinja does not exist, and tokenizer_config.json has no "
                "'chat_template' (or, among several, no default). Give the folder of a chat model, or encode a text."
            )
        return cls(source, config, tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the text that the model continues.

        Args:
            messages: what was said, such as `{"role": "user", "content": "Hello"}`; values as in JSON.
            add_generation_prompt: end with the beginning of the model's next message.
            variables: other names that the template reads, such as `tools`; they go before special tokens.

        Raises:
            ValueError: the template is broken or refuses the conversation, or there is nothing in it.
        """
        if not messages:
            raise ValueError("the conversation is empty: give at least one message.")
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        defaults = {"tools": None, "documents": None, **self.special_tokens}
        try:
            # What is not JSON could have methods that the sandbox does not know
            plain = json.loads(json.dumps({"messages": messages, **variables}))
            return self._compiled.render(defaults | plain, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.path}: the chat template is broken in line {error.lineno}: {error}.") from error
        except Exception as error:  # a template can fail in every way that an expression can
            raise ValueError(f"{self.path}: the chat template refuses this conversation: {error}") from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(self.source)


class _Generation(jinja2.ext.Extension):
    """Templates mark what the model itself said by `{% generation %}`: of use in training, transparent here."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str):
    raise jinja2.TemplateError(message)
