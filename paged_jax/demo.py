"""The demonstration: real prompts with a common beginning, several samples each, and where the memory went."""

import inspect
import time

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.show import CELLS
from paged_jax.engine import Engine
from paged_jax.memory import MemoryReport
from paged_jax.models import Model
from paged_jax.plot import page_map
from paged_jax.sampling import SamplingParams

PAGE_SIZE = 16
TOKEN_COUNTS = (64,)  # one, as a model this small compiles longer than it runs
PREFIX_CHARACTERS = 1500
ENDINGS = (
    '\n\ndef fill(text, width=70, **kwargs):\n    """Fill a single paragraph of text',
    "\n\nclass Token:\n    def __init__(self, kind, value):\n",
    "\n\ndef read_file(path):\n    with open(path",
    "\n\nimport os\nimport sys\n\ndef main(argv=None):\n    if argv is None:\n",
    '\n\nclass ParseError(Exception):\n    """Raised when',
    "\n\ndef get(self, name, default=None):\n    try:\n",
)


def prompts() -> list[str]:
    """The beginning of a module of the standard library, continued in different ways."""
    import textwrap

    beginning = inspect.getsource(textwrap)[:PREFIX_CHARACTERS]
    beginning = beginning[: beginning.rindex("\n")]
    return [beginning + ending for ending in ENDINGS]


def run(model: Model, console: Console, *, samples: int = 3, max_new_tokens: int = 64, seed: int = 0) -> None:
    """Generate, streaming the text, then show the pages of the fullest moment beside a contiguous cache."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.7, top_p=0.95, seed=seed, num_samples=samples)
    texts = prompts()
    tokens = [model.tokenizer.encode(text) for text in texts]
    length = max(map(len, tokens)) + max_new_tokens
    config = model.cache_config(
        num_pages=193,
        max_sequences=len(texts) * samples,
        max_pages_per_sequence=-(-length // PAGE_SIZE),
        page_size=PAGE_SIZE,
    )
    engine = Engine(model.forward, model.params, config, model.tokenizer, token_counts=TOKEN_COUNTS)
    for prompt in tokens:
        engine.add_request(prompt, params)
    drawn = np.full((len(texts), samples), "", object)
    counts = np.zeros(drawn.shape, int)

    progress = Progress(TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    task = progress.add_task("tokens", total=drawn.size * max_new_tokens, note="compiling")

    def page(finished: bool = False) -> Group:
        panels = []
        for i, ending in enumerate(ENDINGS):
            body = Text()
            for number in range(samples if finished else 1):
                body.append(("" if number == 0 else "\n") + f"── sample {number} ", "dim")
                body.append("\n" + ending.lstrip("\n"), "cyan")
                body.append(drawn[i, number])
            panels.append(Panel(body, title=f"prompt {i}: {len(tokens[i])} tokens", title_align="left"))
        return Group(*panels) if finished else Group(*panels, progress)

    fullest, picture = None, Text()
    began = time.perf_counter()
    with Live(page(), console=console, refresh_per_second=8, transient=True) as live:
        for piece in engine.stream():
            drawn[piece.request, piece.sample] += piece.text
            counts[piece.request, piece.sample] += len(piece.tokens)
            progress.advance(task, len(piece.tokens))
            if piece.finish_reason:
                progress.advance(task, max_new_tokens - counts[piece.request, piece.sample])
            tables = engine.tables
            report = MemoryReport.measure(tables)
            if fullest is None or report.pages_in_use > fullest.pages_in_use:
                fullest, picture = report, page_map(tables)
            seconds = time.perf_counter() - began
            progress.update(task, note=f"{counts.sum() / seconds:.0f} tokens/s, {report.pages_in_use} pages in use")
            live.update(page())
    console.print(page(finished=True))
    assert fullest is not None
    console.print(Panel(picture, title="the pool at its fullest", expand=False))
    console.print(CELLS)
    console.print(memory_table(fullest, config))


def memory_table(report: MemoryReport, config: CacheConfig) -> Table:
    """The counts of a report beside what contiguous caches would hold for the same sequences."""
    slot_bytes = config.page_bytes / config.page_size

    def row(name, slots, note=""):
        table.add_row(name, f"{slots:,.0f}", f"{slots * slot_bytes / 2**20:.1f} MiB", note)

    paged = report.pages_in_use * report.page_size
    table = Table(title=f"memory for {report.num_sequences} sequences, {report.tokens:,} tokens in all")
    table.add_column("")
    table.add_column("slots", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("")
    row("paged", paged, f"{report.pages_in_use} pages, {report.pages_shared} of them shared")
    row(
        "  of it empty slots",
        report.sequence_pages * report.page_size - report.slots_filled,
        f"{report.waste:.1%} waste",
    )
    row("without sharing", report.pages_mapped * report.page_size, f"sharing saves {report.saved_by_sharing:.1%}")
    for name, reserved in (
        ("contiguous, longest row", config.max_length),
        ("contiguous, power of two", _power_of_two(report.longest)),
    ):
        slots = report.contiguous_slots(reserved)
        row(name, slots, f"{slots / paged:.1f} times the paged cache")
    return table


def _power_of_two(length: int) -> int:
    return 1 << max(0, length - 1).bit_length()
