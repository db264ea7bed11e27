"""Conversations as `transformers` writes them down, by templates of the constructs that chat models use.

    python tests/models/make_chats.py FOLDER > tests/models/goldens/chats.json

`write_folder` puts tokenizer files of each style below FOLDER; the script reads them with transformers and needs
neither JAX nor this package.
"""

import argparse
import enum
import json
from pathlib import Path
from typing import Any, Literal

# Headers around every turn; tools and the date go into the system turn (in the style of Llama 3).
HEADERS = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- if not today is defined %}
    {%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '1 Jan 2026' %}
{%- endif %}
{%- macro header(role) -%}
    <|start|>{{ role }}<|end|>{{ '\\n\\n' }}
{%- endmacro %}
{{- header('system') + 'Today: ' + today + '\\n' + system }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{{- eos_token }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') + call.name + '(' }}
        {%- for name, value in call.arguments | items %}
            {{- name ~ '=' ~ value | tojson ~ (', ' if not loop.last else ')') }}
        {%- endfor %}
    {%- else %}
        {{- header(message['role']) + message['content'] | trim }}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""
# A namespace, a loop from the back, thoughts that are cut from old answers, a switch (in the style of Qwen 3).
THOUGHTS = """
{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and message.content is string and not ns.found %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{% for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {%- set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- elif message.role == 'debug' %}
        {%- continue %}
    {%- endif %}
<|start|>{{ message.role }}
{{ content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<call>' + call | tojson + '</call>' }}
    {%- endfor %}
<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
    {%- if enable_thinking is defined and enable_thinking is false %}
{{ '\\n<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Strict turns, another name for the assistant, the system's words in the first turn, contents in parts, spans of the
# model's own (in the style of Gemma).
TURNS = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("user and assistant must take turns") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<|start|>' + role + '\\n' + (prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {%- if role == 'model' -%}
            {% generation %}{{ message['content'] | trim }}{% endgeneration %}
        {%- else -%}
            {{ message['content'] | trim }}
        {%- endif -%}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("content of an unknown type") }}
    {%- endif -%}
    {{ '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|start|>model\\n' }}
{%- endif -%}
"""
STYLES = {"headers": HEADERS, "thoughts": THOUGHTS, "turns": TURNS}
SPECIAL_TOKENS = ["<|start|>", "<|end|>"]  # besides the tokenizer's own

SAY = [{"role": "user", "content": " import os "}]
TALK = [
    {"role": "system", "content": "Write <Python> & nothing else.\n"},
    {"role": "user", "content": "def f(x):\n"},
    {"role": "assistant", "content": "<think>\nshort\n</think>\n\n    return x\n", "tool_calls": None},
    {"role": "user", "content": "  and g? 你好 <|end|>"},
]
CALL = {"function": {"name": "run", "arguments": {"code": "1 < 2 and 'é'", "times": 3}}}
TOOL = {"name": "run", "description": "Runs 'code' & says > what <.", "parameters": {"code": {"type": "string"}}}
CALLS = [
    *SAY,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "True"},
    {"role": "debug", "content": "x"},
]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what is it? "}]}]
# (style, messages, what else the template is told)
CHATS = [
    ("headers", SAY, {"today": "today"}),
    ("headers", TALK, {"today": "today", "add_generation_prompt": False}),
    ("headers", CALLS, {"today": "today", "tools": [TOOL, TOOL]}),
    ("headers", SAY, {"today": "today", "bos_token": "<|end|>"}),
    ("thoughts", SAY, {}),
    ("thoughts", TALK, {"enable_thinking": False}),
    ("thoughts", [*TALK[:2], TALK[2] | {"tool_calls": [CALL]}], {"add_generation_prompt": False}),
    ("thoughts", CALLS, {"enable_thinking": True}),
    ("turns", SAY, {}),
    ("turns", TALK, {}),
    ("turns", PARTS, {"add_generation_prompt": False}),
]


# Templates of well-known families, restated: each in a file, with the constructs that it is made of there.
FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "chats").glob("*.jinja"))
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where <it> is, é."},
        "days": {"type": "array", "items": {"type": "integer"}, "description": "Which days."},
        "unit": {"type": ["string", "null"], "enum": ["C", "F"]},
    },
    "required": ["city"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": PARAMETERS}}
CITY = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1]}},
}
ANSWER = {"role": "assistant", "content": "It is <cold> & grey.\n"}
ASKED = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CITY], "reasoning_content": "I must look."},
    {"role": "tool", "name": "weather", "content": "3 degrees", "tool_call_id": "call12345"},
]
THOUGHT = {"role": "assistant", "content": "Yes.", "reasoning": "Is it so?"}
# What every family's template is given: messages, and what else it is told
SCENES = {
    "one question": (SAY, {}),
    "a talk": (TALK, {}),
    "no generation prompt": (TALK[:3], {"add_generation_prompt": False}),
    "tools": (ASKED, {"tools": [WEATHER, TOOL | {"type": "function", "function": WEATHER["function"]}]}),
    "a result and an answer": ([*ASKED, ANSWER, SAY[0]], {"tools": [WEATHER]}),
    "an answer that goes on": ([*TALK[:2], ANSWER | {"content": "It is"}], {"continue_final_message": True}),
    "an answer that goes on after a space": ([*SAY, ANSWER | {"content": "It is "}], {"continue_final_message": True}),
    "parts": ([*PARTS, ANSWER], {"add_generation_prompt": False}),
    "thoughts": ([*SAY, THOUGHT, *SAY], {"enable_thinking": False, "reasoning_effort": "low"}),
    "last thoughts": ([*SAY, THOUGHT], {"add_generation_prompt": False}),
    "two users": ([*SAY, *SAY], {"documents": [{"title": "a", "text": "b"}]}),
}


def weather(city: str, days: list[int] | None = None, unit: Literal["C", "F"] = "C") -> dict[str, float]:
    """
    Tells the weather.

    And more: of every day.

    Args:
        city: Where it is,
            in two lines.
        days: Which days
        unit: The unit (choices: ["C ", "F"])

    Returns:
        The temperature.
    """
    raise NotImplementedError


class Kind(enum.Enum):
    """Values of several kinds."""

    ONE = 1
    TWO = "two"


class Tools:
    """Methods are tools, too."""

    def mix(self, a: int | str, b: tuple[int, str], c: dict, d: Kind, e: Any, f: int | list[str] | None = None):
        """Mixes.

        Args:
            a: one
            b: two
            c: three
            d: four
            e: five: with a colon
            f: six
        """


FUNCTIONS = [weather, Tools().mix]


ONE = {
    "content": "<|one|>",
    "lstrip": True,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
    "special": True,
}
TWO = ONE | {"content": "<|two|>", "lstrip": False, "special": False}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 40},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}
# What folders say of tokens: name -> file -> what stands in it, in tokenizer.json besides the rest
VARIANTS = {
    "truncation": {"tokenizer": {"truncation": TRUNCATION}},
    "padding": {"tokenizer": {"padding": PADDING}, "tokenizer_config": {"pad_token": "<|endoftext|>"}},
    "added": {"tokenizer_config": {"added_tokens_decoder": {"1538": ONE, "1539": TWO}, "bos_token": "<|start|>"}},
    "older": {"added_tokens": {"<|one|>": 1538, "<|two|>": 1539}, "special_tokens_map": {"eos_token": "<|one|>"}},
    "listed": {"tokenizer_config": {"additional_special_tokens": ["<|one|>", "<|two|>"], "pad_token": "<|end|>"}},
    "named": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|one|>"}, "boi_token": "<|two|>"}},
    "map first": {"tokenizer_config": {"eos_token": "<|end|>"}, "special_tokens_map": {"eos_token": ONE}},
    "split": {"tokenizer_config": {"split_special_tokens": True}},
}
VARIED = "a  <|one|> b<|two|>c <|end|> and more, é"


def write_variant(folder: Path, name: str, tokenizer_json: str) -> None:
    """The tokenizer files of one of VARIANTS."""
    folder.mkdir(parents=True, exist_ok=True)
    files = VARIANTS[name] | {"tokenizer": json.loads(tokenizer_json) | VARIANTS[name].get("tokenizer", {})}
    files["tokenizer_config"] = files.get("tokenizer_config", {}) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    for file, value in files.items():
        (folder / f"{file}.json").write_text(json.dumps(value))


def write_folder(folder: Path, style: str, tokenizer_json: str) -> None:
    """The tokenizer files of a checkpoint; the template stands in a file of its own or in the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    bos = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "rstrip": False, "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|end|>", "pad_token": None}
    if style in FAMILIES:
        source = Path(__file__).parent / "chats" / f"{style}.jinja"
        (folder / "chat_template.jinja").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    elif style == "headers":
        (folder / "chat_template.jinja").write_text(STYLES[style])
    elif style == "thoughts":
        config["chat_template"] = STYLES[style]
    else:
        names = {"other": "{{ 1 }}", "default": STYLES[style]}
        config["chat_template"] = [{"name": name, "template": template} for name, template in names.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def run_families(folder: Path) -> dict[str, dict[str, str | None]]:
    """Each family's text of each scene; None where the template refuses it."""
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]  own environment

    found: dict[str, dict[str, str | None]] = {}
    for family in FAMILIES:
        apply = AutoTokenizer.from_pretrained(folder / family).apply_chat_template
        found[family] = {}
        for scene, (messages, variables) in SCENES.items():
            options = {"add_generation_prompt": not variables.get("continue_final_message", False)} | variables
            try:
                found[family][scene] = apply(messages, tokenize=False, **options)
            except Exception:  # of the template, or of its expressions
                found[family][scene] = None
    return found


def run_variants(folder: Path) -> dict[str, dict]:
    """Tokens, texts with and without special tokens, and named special tokens of each variant."""
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]  own environment

    found = {}
    for name in VARIANTS:
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokens = tokenizer(VARIED)["input_ids"]
        texts = [tokenizer.decode(tokens, skip_special_tokens=skip) for skip in (True, False)]
        found[name] = {"tokens": tokens, "texts": texts, "named": tokenizer.special_tokens_map}
    return found


def main():
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]  own environment
    from transformers.utils import get_json_schema  # pyright: ignore[reportMissingImports]  own environment

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tokenizers = {style: AutoTokenizer.from_pretrained(folder / style) for style in STYLES}
    found = []
    for style, messages, variables in CHATS:
        options = {"add_generation_prompt": True, "return_dict": False} | variables
        apply = tokenizers[style].apply_chat_template
        found.append({"text": apply(messages, tokenize=False, **options), "tokens": apply(messages, **options)})
    schemas = [get_json_schema(function) for function in FUNCTIONS]
    found = {"chats": found, "families": run_families(folder), "schemas": schemas, "variants": run_variants(folder)}
    print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
