"""A config.json, read key by key: what is missing or of another kind is named with its file, value and rule."""

import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

REQUIRED = object()
MOST = 2**31 - 1


@dataclass(frozen=True)
class Fields:
    """A config.json, or an object within it.

    Args:
        values: what it holds.
        source: its path.
        run_length: the longest context in tokens that will be run; None: `max_position_embeddings`.
    """

    values: dict[str, Any]
    source: str = "config.json"
    run_length: int | None = None

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The field, or the default where it is missing or null."""
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(
                f"{self.source} has no {name!r}, which {self.values.get('model_type')!r} models need: add it, or "
                "download the checkpoint's config.json again."
            )
        return default

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1, most: int = MOST) -> Any:
        """A whole number, which may be written as 4096.0; or the default."""
        value = self.get(name, default)
        if value is default:
            return value
        if not _is_number(value) or value != math.floor(value) or not least <= value <= most:
            self.fail(name, f"it must be a whole number from {least} to {most}.")
        return int(value)

    def number(self, name: str, default: Any = REQUIRED, *, positive: bool = False) -> Any:
        """A finite number as a float; or the default."""
        value = self.get(name, default)
        if value is default:
            return value
        if not _is_number(value) or (positive and value <= 0):
            self.fail(name, f"it must be a {'positive ' if positive else ''}number.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "it must be true or false.")
        return value

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A text; or the default."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, str):
            self.fail(name, "it must be a text.")
        return value

    def part(self, name: str) -> "Fields":
        """An object within this one; empty where it is missing."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.fail(name, "it must be an object.")
        return replace(self, values=value, source=f"{self.source}, in {name!r},")

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """This many positive numbers."""
        value = self.get(name, None)
        if not isinstance(value, list) or len(value) != count or not all(_is_number(n) and n > 0 for n in value):
            self.fail(name, f"it must be a list of {count} positive numbers.")
        return tuple(map(float, value))

    def fail(self, name: str, rule: str) -> NoReturn:
        """Raises over the value of one field."""
        text = repr(self.values.get(name))
        raise ValueError(f"{self.source} has {name}={text if len(text) < 300 else text[:300] + '...'}: {rule}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
