"""Functions that a model may call, described as JSON schemas from their type hints and docstrings."""

import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
BARE = SCALARS | {list: "array", tuple: "array", dict: "object"}
SECTION = re.compile(r"^(Args|Returns|Raises):", re.MULTILINE)
ARGUMENT = re.compile(r"^([ \t]*)(\w+):[ \t]*(.*)$")
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE | re.DOTALL)


def as_schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    """Tools as chat templates read them.

    Args:
        tools: JSON schemas, which stay as they are, and functions.

    Raises:
        ValueError: a function lacks type hints or descriptions, or a tool is neither.
    """
    return None if tools is None else [describe(tool) if not isinstance(tool, Mapping) else tool for tool in tools]


def describe(function: Any) -> dict[str, Any]:
    """The schema of a function.

    Args:
        function: has type hints, and a docstring with a sentence, and under `Args:` one for every argument; choices
            may stand at its end, such as `(choices: ["tea", "coffee"])`.

    Raises:
        ValueError: it is no function, or something is missing.
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ValueError(f"{function!r} is no tool: give a JSON schema as a dict, or a function.")
    doc = inspect.getdoc(function)
    if not doc:
        _fail(function, "it has no docstring")
    sections = _sections(doc)
    described = _arguments(sections.get("Args", ""))
    hints, properties, required = get_type_hints(function), {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("self", "cls") and name not in hints:
            continue
        if name not in hints:
            _fail(function, f"its argument {name!r} has no type hint")
        if name not in described:
            _fail(function, f"its docstring does not describe the argument {name!r}")
        properties[name] = _schema(function, hints[name]) | _description(function, described[name])
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    schema = {"name": function.__name__, "description": sections[""], "parameters": parameters}
    return {"type": "function", "function": schema | _result(function, hints, sections.get("Returns"))}


def _result(function: Callable, hints: dict[str, Any], doc: str | None) -> dict[str, Any]:
    """What the function returns; left out where JSON cannot say it, because a model never writes it."""
    if "return" not in hints:
        return {}
    try:
        schema = _schema(function, hints["return"])
    except ValueError:
        return {}
    return {"return": schema | ({} if doc is None else {"description": doc})}


def _sections(doc: str) -> dict[str, str]:
    """The parts of a docstring by their headings; the first has none."""
    parts = SECTION.split(doc)
    found = {"": parts[0].strip()}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(heading, text.strip("\n").rstrip() if heading == "Args" else text.strip())
    return found


def _arguments(text: str) -> dict[str, str]:
    """Each argument's description in one line; lines that are indented deeper than its name continue it."""
    found: dict[str, list[str]] = {}
    depth, name = 0, ""
    for line in filter(str.strip, text.split("\n")):
        match = ARGUMENT.match(line)
        if match and (not found or len(match[1]) <= depth):
            depth, name = len(match[1]), match[2]
            found[name] = [match[3].strip()]
        elif name:
            found[name].append(line.strip())
    return {name: " ".join(filter(None, lines)) for name, lines in found.items()}


def _description(function: Callable, text: str) -> dict[str, Any]:
    match = CHOICES.search(text)
    if not match:
        return {"description": text}
    try:
        choices = json.loads(match[1])
    except ValueError:
        _fail(function, f"the choices in {text!r} are no JSON list")
    choices = [choice.strip() if isinstance(choice, str) else choice for choice in choices]
    return {"enum": choices, "description": text[: match.start()].strip()}


def _schema(function: Callable, hint: Any) -> dict[str, Any]:
    """A type hint as a JSON schema."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is None and isinstance(hint, type):
        if issubclass(hint, enum.Enum):
            return _values(function, [member.value for member in hint])
        if hint in BARE:
            return {"type": BARE[hint]}
    if origin is Literal:
        return _values(function, list(arguments))
    if origin in (Union, types.UnionType):
        return _union(function, arguments)
    if origin is list:
        return {"type": "array", "items": _schema(function, arguments[0])}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_schema(function, argument) for argument in arguments]}
    if origin is dict and len(arguments) == 2:
        return {"type": "object", "additionalProperties": _schema(function, arguments[-1])}
    _fail(function, f"the type hint {hint} has no JSON schema")


def _union(function: Callable, arguments: tuple) -> dict[str, Any]:
    schemas = [_schema(function, argument) for argument in arguments if argument is not type(None)]
    nullable = {"nullable": True} if type(None) in arguments else {}
    if len(schemas) == 1:
        return schemas[0] | nullable
    if all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        names = sorted({schema["type"] for schema in schemas})
        return {"type": names[0] if len(names) == 1 else names} | nullable
    return {"anyOf": schemas} | nullable


def _values(function: Callable, values: list) -> dict[str, Any]:
    kinds = list(dict.fromkeys(SCALARS.get(type(value), "") for value in values))
    if not kinds or "" in kinds:
        _fail(function, f"the values {values} are not all numbers, texts, truth values or None")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _fail(function: Callable, problem: str) -> NoReturn:
    raise ValueError(
        f"{function.__name__} cannot be described as a tool: {problem}. Mend that, or pass a JSON schema in its place."
    )
