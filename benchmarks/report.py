"""A benchmark's result: a table for people, a JSON file with date, versions and command for the record."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

RESULTS = pathlib.Path(__file__).parent / "results"


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help=f"also write the rows to {RESULTS.name}/NAME.json")


class Report:
    """Rows of one benchmark; every row has the same columns."""

    def __init__(self, name: str, title: str):
        self.name = name
        self.title = title
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def show(self) -> None:
        """Print the table."""
        table = Table(title=self.title)
        for column in self.rows[0]:
            table.add_column(
                column.replace("_", " "), justify="left" if isinstance(self.rows[0][column], str) else "right"
            )
        for row in self.rows:
            table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()))
        Console(width=None if sys.stdout.isatty() else 140).print(table)

    def save(self) -> pathlib.Path:
        """Write the rows as JSON beside the earlier results; returns the file."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        record = {
            "name": self.name,
            "title": self.title,
            "date": datetime.date.today().isoformat(),
            "command": _command(),
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "jaxlib": importlib.metadata.version("jaxlib"),
            },
            "machine": {
                "device": jax.devices()[0].device_kind,
                "cores": os.cpu_count(),
                "platform": platform.machine(),
            },
            "rows": self.rows,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        return path

    def finish(self, options: argparse.Namespace) -> None:
        """Print, and save where `--json` asks for it."""
        self.show()
        if options.json:
            print(f"written: {os.path.relpath(self.save())}")


def _command() -> str:
    """How this process was started; of the paths of a machine only their last part."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else "?"
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python -m", name, *words])
