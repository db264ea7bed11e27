"""How many pages and sequences fit beside the weights, and how fast they can be read."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.page_tables import PageTables
from paged_jax.cache.sizes import write_bytes
from paged_jax.planner.chips import Chip, find_chip
from paged_jax.planner.sizes import WEIGHT_DTYPES, ModelSizes, Weights, find_sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What fits on one device, or on each of several that split the layers of a model: what `make_plan` returns.

    Print it for a summary.

    Args:
        model: what is run.
        chip: one of the devices.
        num_devices: that split heads and MLPs.
        config: sizes of the cache.
        context: tokens of a sequence.
        memory_bytes: of a device, what is left to programs taken off.
        shared_tokens: with which all sequences begin.
    """

    model: ModelSizes
    chip: Chip
    num_devices: int
    config: CacheConfig
    context: int
    memory_bytes: int
    shared_tokens: int = 0

    @property
    def weights(self) -> Weights:
        """Of each device."""
        return self.model.weights(self.num_devices)

    @property
    def layer_page_bytes(self) -> int:
        """Bytes of one page in one layer, on each device."""
        return self.config.layer_page_bytes_on(self.chip.platform, self.num_devices)

    @property
    def bytes_per_token(self) -> float:
        """Keys and values of one token in all layers, on each device, with their scales and what pads them."""
        return self.model.num_layers * self.layer_page_bytes / self.config.page_size

    @property
    def pool_bytes(self) -> int:
        """Of each device."""
        return self.config.num_layer_pages * self.layer_page_bytes

    @property
    def table_bytes(self) -> int:
        """Of the page tables, which every device holds."""
        tables = jax.eval_shape(lambda: PageTables.create(self.config))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tables))

    def num_sequences(self, lengths: int | Sequence[int] | None = None) -> int:
        """Sequences that fit at the same time.

        Args:
            lengths: tokens of each; or lengths of sequences that come equally often; None: `context`.
        """
        lengths = self.context if lengths is None else lengths
        each = [lengths] if isinstance(lengths, int) else list(lengths)
        fitting = []
        for group in self.config.groups:
            pages = [self.config.pages_mapped(group.window, length) for length in each]
            shared = [0 if group.window else min(self.shared_tokens, n) // self.config.page_size for n in each]
            own = np.mean(np.array(pages) - shared)
            fitting.append((group.num_pages - 1 - max(shared)) / max(own, 1e-9))
        return max(0, math.floor(min(fitting) + 1e-9))

    def step_bytes(self, num_sequences: int) -> float:
        """Bytes that a device reads in a step in which this many sequences of `context` tokens draw a token each."""
        weights, decoder = self.weights, self.model.decoder
        of_experts = weights.of_experts
        if of_experts:  # the share of the experts that this many tokens choose, if they choose at random
            of_experts *= 1 - (1 - decoder.experts_per_token / decoder.num_experts) ** num_sequences
        read = weights.total - weights.looked_up - weights.of_experts + of_experts
        seen = (len(group.layers) * min(self.context, group.window or self.context) for group in self.config.groups)
        return read + num_sequences * sum(seen) * self.layer_page_bytes / self.config.page_size

    def tokens_per_second(self, num_sequences: int | None = None) -> float:
        """The most that the bandwidth allows: every step reads the weights once, and each sequence its pages.

        Args:
            num_sequences: that draw at the same time; None: as many as fit.
        """
        num_sequences = self.num_sequences() if num_sequences is None else num_sequences
        if not num_sequences or not self.chip.bytes_per_second:
            return 0.0
        return num_sequences * self.chip.bytes_per_second / self.step_bytes(num_sequences)

    def __str__(self) -> str:
        devices = f"{self.num_devices} x {self.chip.name}" if self.num_devices > 1 else self.chip.name
        each = " a device" if self.num_devices > 1 else ""
        speed = f", {self.chip.bytes_per_second / 1e9:,.0f} GB/s" if self.chip.bytes_per_second else ""
        tokens = (self.config.num_pages - 1) * self.config.page_size
        lines = {
            "on": f"{devices}: {write_bytes(self.memory_bytes)}{each} for weights and pages{speed}",
            "weights": f"{write_bytes(self.weights.total)}{each}, {self.model.dtype}",
            "keys and values": f"{write_bytes(self.bytes_per_token)} a token{each}: {self.model.num_layers} layers of "
            f"{write_bytes(self.bytes_per_token / self.model.num_layers)}, {self.config.dtype}",
            "pages": f"{self.config.num_pages - 1:,} of {self.config.page_size} tokens, {tokens:,} tokens in all: "
            f"{write_bytes(self.pool_bytes)}{each}, tables {write_bytes(self.table_bytes)}",
            f"sequences of {self.context:,}": f"{self.num_sequences():,} at the same time",
        }
        if self.config.has_windows:
            lines["of these"] = "; ".join(
                f"{group.num_pages - 1:,} in {len(group.layers)} layers that see {group.window or 'all'}"
                for group in self.config.groups
            )
        if self.tokens_per_second():
            lines["bandwidth allows"] = (
                f"{self.tokens_per_second():,.0f} tokens/s with {self.num_sequences():,} sequences, "
                f"{self.tokens_per_second(1):,.0f} with one"
            )
        width = max(map(len, lines))
        return "\n".join([self.model.name, *(f"  {name:{width}}  {text}" for name, text in lines.items())])


def make_plan(
    model: Any,
    memory: Chip | str | int | float,
    *,
    context: int,
    page_size: int = 16,
    dtype: str | None = None,
    cache_dtype: Any = None,
    num_devices: int = 1,
    max_sequences: int | None = None,
    shared_tokens: int = 0,
    windows: bool = True,
    headroom: float = 0.1,
) -> Plan:
    """What fits in the memory of a device.

    Args:
        model: a checkpoint's folder, of which only config.json is read; a `models.Model`; a `ModelSizes`; or text, see
            `read_sizes`.
        memory: a `Chip`, the name of one ("v5e", "v5p", "v6e", "v7x", "h100", "h200"; "here"), or a size ("16GiB").
        context: tokens of a sequence.
        page_size: tokens in a page.
        dtype: of the weights; None: the checkpoint's.
        cache_dtype: of the pages; None: that of the weights.
        num_devices: that split the layers, as `models.load(sharding=mesh)` does.
        max_sequences: rows of the page table; None: as many as fit.
        shared_tokens: with which all sequences begin, such as a system prompt.
        windows: whether layers with a window give up the pages before it.
        headroom: share of the memory that is left to compiled programs and their temporaries.

    Raises:
        ValueError: the model is not understood, its heads do not split, or the weights or one sequence do not fit.

    Examples:
        >>> plan = make_plan("num_layers=32,num_kv_heads=8,head_dim=128,num_params=8e9", "v6e", context=8192)
        >>> plan.num_sequences(), plan.config.num_pages, round(plan.tokens_per_second())
        (13, 7116, 712)
    """
    model, chip = find_sizes(model, dtype), find_chip(memory)
    for name, value in {"num_devices": num_devices, "page_size": page_size, "context": context}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    split = {"KV heads": model.num_kv_heads}
    if model.decoder is not None:
        split["numbers in an MLP"] = model.decoder.intermediate_size
    for what, size in split.items():
        if size % num_devices:
            raise ValueError(f"num_devices={num_devices} does not divide the {size} {what} of {model.name}")
    if model.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={model.dtype!r} of the weights is not supported: use {' or '.join(WEIGHT_DTYPES)}")
    if not 0 <= shared_tokens < context:
        raise ValueError(f"shared_tokens={shared_tokens} must lie in [0, {context}), below the tokens of a sequence")
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom={headroom}: the share that is left to programs must lie in [0, 1)")
    usable = int(chip.memory_bytes * (1 - headroom))
    left = usable - model.weights(num_devices).total
    if left <= 0:
        raise ValueError(
            f"the weights of {model.name} take {write_bytes(usable - left)}, and the device has {write_bytes(usable)} "
            "for them: use more devices, or one with more memory"
        )
    fields = {
        "num_layers": model.num_layers,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": model.dtype if cache_dtype is None else cache_dtype,
        "windows": model.windows if windows else (),
        "page_size": page_size,
        "max_pages_per_sequence": -(-context // page_size),
    }
    empty = CacheConfig(num_pages=2, max_sequences=1, **fields)
    # Pages of all layers together that fit, and what they take on the platform on which the plan is made.
    budget = left // empty.layer_page_bytes_on(chip.platform, num_devices) * empty.layer_page_bytes

    def fit(rows: int) -> Plan | None:
        """The plan with this many rows; None if their windows leave nothing to the other layers."""
        if budget < CacheConfig(num_pages=2, max_sequences=rows, **fields).pool_bytes:
            return None
        config = CacheConfig.for_budget(pool_bytes=budget, max_sequences=rows, **fields)
        return Plan(model, chip, num_devices, config, context, usable, shared_tokens)

    def holds(rows: int) -> bool:
        plan = fit(rows)
        return plan is not None and plan.num_sequences() >= rows

    if max_sequences is None and holds(1):
        max_sequences = _largest(holds)
    plan = fit(max_sequences or 1)
    if plan is None or not plan.num_sequences():
        raise ValueError(
            f"{model.name} takes {write_bytes(usable - left)} of {write_bytes(usable)}, and no sequence of {context} "
            "tokens fits beside it: use more devices, a smaller cache_dtype, or a shorter context"
        )
    return plan


def alternatives(model: Any, memory: Any, **options: Any) -> list[tuple[str, Plan | str]]:
    """The plan with one thing changed at a time: pages, dtype, devices, windows, sharing.

    Args:
        model: as in `make_plan`.
        memory: as in `make_plan`.
        **options: the other arguments of `make_plan`.

    Returns:
        What was changed, and the plan; or why there is none.

    Examples:
        >>> sizes = "num_layers=32,num_kv_heads=8,head_dim=128,num_params=8e9"
        >>> for change, plan in alternatives(sizes, "v6e", context=8192)[5:9]:
        ...     print(change, plan.num_sequences())
        cache_dtype=float32 6
        cache_dtype=bfloat16 13
        cache_dtype=float8_e4m3fn 24
        cache_dtype=int8 24
    """
    model, memory = find_sizes(model, options.pop("dtype", None)), find_chip(memory)
    context = options["context"]
    changes: list[dict[str, Any]] = [{"page_size": size} for size in (8, 16, 32, 64, 128)]
    changes += [{"cache_dtype": dtype} for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int8")]
    changes += [{"num_devices": n} for n in (1, 2, 4, 8) if model.num_kv_heads % n == 0]
    changes += [{"shared_tokens": context // 4}, {"shared_tokens": context // 2}]
    changes += [{"windows": False}] if any(model.windows) else []
    found: list[tuple[str, Plan | str]] = []
    for change in changes:
        name = ", ".join(f"{key}={value}" for key, value in change.items())
        try:
            found.append((name, make_plan(model, memory, **(options | change))))
        except ValueError as error:
            found.append((name, str(error)))
    return found


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number for which something holds that holds for 1, and for no number after the first without it."""
    most = 1
    while holds(2 * most):
        most *= 2
    return most + bisect.bisect_left(range(most + 1, 2 * most), True, key=lambda n: not holds(n))
