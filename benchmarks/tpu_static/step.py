"""What a whole decode step of a model costs on paper, and which part of it neither reads pages nor weights.

    python -m benchmarks.tpu_static.step [--chip v6e] [--layers 32] [--page-size 16] [--top 12] [--json]

Compiles one step of `paged_jax.decoding` with libtpu: plan, page table, the forward pass of a Llama 3 8B, drawing, for
32 rows on 2000 tokens. Executes the scalar half of every program that the step runs, XLA's fusions and Pallas kernels
alike, as often as the loops around it run, and adds up by what the program is for:

    runs, cycles  programs, and bundles that they issue, one a cycle
    us            under a simple model of copies (HBM bandwidth, 700 ns latency), each program after the one before it
    floor_us      of the bytes that its programs copy from and to HBM
    share         of us

Of a conditional the first branch runs, in which JAX has nothing to do, but rows need new pages, as some nearly always
do, and draw greedily; the last two rows say what else it may be. Not in it: what XLA prefetches beside other programs
(`copy-start`; the bytes of these programs are fewer then), what it gives to a SparseCore, how programs start. A program
that the compiler does not list since it equals another one costs what that one does.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.report import Report, add_json_option
from benchmarks.tpu_static.cases import StaticCase, operands
from benchmarks.tpu_static.compile import WHOLE_STEP, compile_in_child, scheduled_programs
from benchmarks.tpu_static.hlo import Instruction, Module, parse_module
from benchmarks.tpu_static.program import parse
from benchmarks.tpu_static.simulate import CHIPS, Chip, Result, run
from paged_jax import CacheConfig, Stepper, models
from paged_jax.decoding.rows import DecodeState
from paged_jax.decoding.step import release, step

NUM_ROWS, CONTEXT = 32, 2000
# A function whose operations only the branch with work to do has.
NEW_PAGES = "_running_total"
DRAW = "_gumbel"
WORKING = {NEW_PAGES}
PAGE_TABLE = "page table, plan, rows"
OTHERWISE = {"drawing": ("drawing at a temperature", {NEW_PAGES, DRAW}), PAGE_TABLE: ("nobody needs a page", set())}
# The innermost source file of these decides what a program is for.
PURPOSES = {
    "paged_jax/sampling/": "drawing",
    "pallas_kernels/": "around the kernels",
    "paged_jax/attention.py": "around the kernels",
    "paged_jax/cache/": PAGE_TABLE,
    "paged_jax/decoding/": PAGE_TABLE,
    "paged_jax/models/": "norms, rope, activations",
}
WITHOUT_COST = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple"}


def abstract_step(num_layers: int, page_size: int) -> tuple[Any, tuple]:
    """The jitted step, and the shapes of its arguments."""
    config = models.DecoderConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=num_layers, num_heads=32,
        num_kv_heads=8, head_dim=128,
    )  # fmt: skip
    decoder = nnx.eval_shape(lambda: models.Decoder(config, period=config.period, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    graph, params = nnx.split(decoder)

    def forward(params, tokens, pool, metadata):
        return nnx.merge(graph, params)(tokens, pool, metadata)

    stepper = Stepper(forward, (NUM_ROWS,))
    columns = -(-CONTEXT // page_size)
    cache = CacheConfig(
        num_layers, 8, 128, NUM_ROWS * columns + 1, page_size=page_size, max_sequences=NUM_ROWS,
        max_pages_per_sequence=columns,
    )  # fmt: skip
    state = jax.eval_shape(lambda: DecodeState.create(cache, CONTEXT + 1, stepper.token_counts))

    def one(state, params):
        state, ended = step(stepper, params, state)
        return release(state, ended & ~state.rows.keeps)

    return jax.jit(one, donate_argnums=0), (state, params)


def choose_branch(module: Module, working: set[str], conditional: Instruction) -> int:
    """The second branch of two where an operation of these functions is in it."""

    def functions(name: str):
        for x in module.computations[name]:
            yield x.source[0].split()[-1] if x.source else ""
            for called in x.calls:
                yield from functions(called)

    return int(len(conditional.calls) == 2 and not working.isdisjoint(functions(conditional.calls[1])))


def purpose(instruction: Instruction) -> str:
    """What a program is for."""
    if instruction.name.startswith("paged_"):
        return "pages"
    if instruction.op.endswith(("dot_general", "jit(dynamic_index_in_dim)/dynamic_slice")):  # products, a layer's part
        return "weights"
    for place in instruction.source:
        for path, name in PURPOSES.items():
            if path in place:
                return name
    return "XLA's own copies" if instruction.opcode == "copy" else "other"


def function(instruction: Instruction) -> str:
    """The function in whose lines it stands, with its file."""
    if not instruction.source:
        return ""
    place, name = instruction.source[0].rsplit(" ", 1)
    return f"{Path(place).name.partition(':')[0]} {name}"


@dataclasses.dataclass
class Cost:
    """Of some programs together."""

    runs: int = 0
    cycles: int = 0
    us: float = 0.0
    floor_us: float = 0.0

    def add(self, result: Result, times: int, chip: Chip) -> None:
        self += Cost(
            times,
            times * result.cycles,
            times * result.model_cycles / chip.clock_ghz / 1e3,
            times * (result.read_bytes + result.write_bytes) / chip.hbm_gbs / 1e3,
        )

    def __iadd__(self, other: Cost) -> Cost:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def row(self, total_us: float) -> dict[str, float]:
        rounded = {"us": round(self.us, 1), "floor_us": round(self.floor_us, 1)}
        return {"runs": self.runs, "cycles": self.cycles, **rounded, "share": round(self.us / total_us, 4)}


class Programs:
    """The programs of a dump, simulated when their cost is asked for."""

    def __init__(self, folder: Path, module: Module, chip: Chip, words: dict[str, dict[int, Any]]):
        self.chip, self.words = chip, words
        named = ((re.match(r"\d+-(.*)-\d\d-packed", path.name), path) for path in scheduled_programs(folder))
        self.paths = {match[1]: path for match, path in named if match}
        self.results: dict[str, Result] = {}
        instructions = [x for computation in module.computations.values() for x in computation]
        self.equals = {x.content: x.name for x in instructions if x.name in self.paths}

    def cost(self, instruction: Instruction) -> Result | None:
        """None: no program, or nothing is known of it."""
        name = instruction.name if instruction.name in self.paths else self.equals.get(instruction.content)
        if name is None:
            return None
        if name not in self.results:
            kernel = name.partition(".")[0]
            scalars = collections.defaultdict(lambda: [0])  # of XLA's fusions, such as the number of a layer
            words = self.words.get(kernel, scalars)
            self.results[name] = run(parse(self.paths[name].read_text()), self.chip, words)
        return self.results[name]


Costs = dict[tuple[str, str], Cost]  # by purpose and function


def add_up(programs: Programs, module: Module, working: set[str]) -> tuple[Costs, collections.Counter[str]]:
    """What a step costs, and the operations whose cost is not known."""
    costs: Costs = collections.defaultdict(Cost)
    unknown: collections.Counter[str] = collections.Counter()
    for instruction, times in module.executed(lambda x: choose_branch(module, working, x)):
        if instruction.opcode in WITHOUT_COST:
            continue
        result = programs.cost(instruction)
        if result is None:
            unknown[instruction.opcode] += times
        else:
            costs[purpose(instruction), function(instruction)].add(result, times, programs.chip)
    return costs, unknown


def by_purpose(costs: Costs) -> dict[str, Cost]:
    result: dict[str, Cost] = collections.defaultdict(Cost)
    for (name, _), cost in costs.items():
        result[name] += cost
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    parser.add_argument("--chip", default="v6e", choices=CHIPS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--top", type=int, default=12, help="functions that are shown, of those that read neither")
    options = parser.parse_args()
    case = StaticCase("", (CONTEXT,) * NUM_ROWS, page_size=options.page_size, prefill_tokens=NUM_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        sizes = str(options.layers), str(options.page_size)
        compiled = compile_in_child(WHOLE_STEP, options.chip, dump, *sizes)
        if "error" in compiled:
            sys.exit(compiled["error"])
        (path,) = dump.glob("*-TLP-hlo.txt")
        module = parse_module(path.read_text())
        programs = Programs(dump, module, CHIPS[options.chip], operands(case, CHIPS[options.chip].device_kind))
        costs, unknown = add_up(programs, module, WORKING)
        otherwise = {name: add_up(programs, module, working)[0] for name, (_, working) in OTHERWISE.items()}
    total = sum(cost.us for cost in costs.values())
    title = f"a step of 8B, {options.layers} layers, {NUM_ROWS} rows on {CONTEXT}, {options.chip}"
    report = Report(f"tpu_step_{options.chip}", title)
    for name, cost in sorted(by_purpose(costs).items(), key=lambda item: -item[1].us):
        report.add(what=name, **cost.row(total))
    for name, (text, _) in OTHERWISE.items():
        report.add(what=f"{name}: {text}", **by_purpose(otherwise[name])[name].row(total))
    report.finish(options)
    functions = Report("", "the dearest functions that read neither pages nor weights")
    others = [(key, cost) for key, cost in costs.items() if key[0] not in ("pages", "weights")]
    for (name, place), cost in sorted(others, key=lambda item: -item[1].us)[: options.top]:
        functions.add(what=name, function=place, **cost.row(total))
    functions.show()
    print("not counted:", ", ".join(f"{n} {opcode}" for opcode, n in unknown.most_common()))


if __name__ == "__main__":
    main()
