"""What fits: weights, pages and sequences in the memory of a device, and the tokens a second that its bandwidth allows.

    plan = make_plan("Qwen3-8B/", "v6e", context=8192)
    print(plan)

    python -m paged_jax plan --model Qwen3-8B/ --memory v6e --context 8192

The numbers are those of the arrays that `models.load` and `KVCache.create` make, padding included; nothing is
allocated, and of a model's folder only config.json is read.
"""

import bisect
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.page_tables import PageTables
from paged_jax.cache.sizes import free_bytes, read_bytes, write_bytes

GIB = 1024**3


class Chip(NamedTuple):
    """What JAX sees as one device."""

    name: str
    memory_bytes: int
    bytes_per_second: float  # of its memory; 0: not known
    platform: str


# Memory as the devices report it, bandwidth as their vendors do. A v7x chip is two devices.
CHIPS = {
    "v5e": Chip("v5e", 16 * GIB, 819e9, "tpu"),
    "v5p": Chip("v5p", 95 * GIB, 2765e9, "tpu"),
    "v6e": Chip("v6e", 32 * GIB, 1640e9, "tpu"),
    "v7x": Chip("v7x", 96 * GIB, 3690e9, "tpu"),
    "h100": Chip("H100", 81559 * 1024**2, 3350e9, "gpu"),
    "h200": Chip("H200", 143771 * 1024**2, 4800e9, "gpu"),
}


class Weights(NamedTuple):
    """The weights that one device holds, in bytes."""

    total: int
    of_experts: int  # of these, in MLPs of which a token uses some
    looked_up: int  # of these, an embedding of which a token reads one row


WEIGHT_DTYPES = "float32", "bfloat16"  # that `models.load` makes of a checkpoint's


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """What a plan needs to know of a model.

    Args:
        name: for people.
        num_layers: layers that keep keys and values.
        num_kv_heads: of a layer.
        head_dim: of a head.
        dtype: of the weights: "float32" or "bfloat16".
        windows: as in `CacheConfig`.
        num_params: numbers in the weights, where `decoder` is None.
        decoder: its `models.DecoderConfig`, from which the weights are counted exactly.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    windows: tuple[int | None, ...] = ()
    num_params: int = 0
    decoder: Any = None

    def weights(self, num_devices: int = 1) -> Weights:
        """What each of several devices holds that split the layers, as `models.load` splits them."""
        if self.decoder is None:
            return Weights(-(-self.num_params // num_devices) * jnp.dtype(self.dtype).itemsize, 0, 0)
        return _decoder_weights(self.decoder, self.dtype, num_devices)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What fits on each of several devices that split the layers of a model; print it.

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
        return math.floor(min(fitting) + 1e-9)

    def step_bytes(self, num_sequences: int) -> float:
        """Bytes that a device reads in a step in which so many sequences of `context` tokens draw a token each."""
        weights, decoder = self.weights, self.model.decoder
        of_experts = weights.of_experts
        if of_experts:  # the share of the experts that so many tokens choose, if they choose at random
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
        """The plan with so many rows; None if their windows leave nothing to the other layers."""
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


def find_chip(memory: Chip | str | int | float) -> Chip:
    """A chip by its name, the device that JAX runs on ("here"), or one that is a size and nothing else.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(memory, Chip):
        return memory
    name = str(memory).lower()
    if name in CHIPS:
        return CHIPS[name]
    if name == "here":
        device = jax.devices()[0]
        return Chip(device.device_kind, free_bytes(device), 0.0, device.platform)
    try:
        return Chip("a device", read_bytes(memory), 0.0, jax.default_backend())
    except ValueError as error:
        raise ValueError(f"memory={memory!r}: {error}; or name one of {', '.join(CHIPS)}, here") from None


def measure_bandwidth(num_bytes: int = 2**28) -> float:
    """Bytes a second that the default device reads, measured by adding up an array."""
    x = jnp.ones(num_bytes // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds)


def find_sizes(model: Any, dtype: str | None = None) -> ModelSizes:
    """The sizes of a model.

    Args:
        model: as in `make_plan`.
        dtype: of its weights; None: what config.json says.

    Raises:
        ValueError: it is not understood.
    """
    if isinstance(model, ModelSizes):
        return model if dtype is None else dataclasses.replace(model, dtype=dtype)
    if isinstance(model, str) and "=" in model:
        return read_sizes(model, dtype or "bfloat16")
    from paged_jax import models  # Flax

    if isinstance(model, models.Model):
        name, decoder, dtype = model.folder.name, model.config, dtype or model.dtype
    else:
        decoder, found = models.read_config(Path(model))
        name, dtype = Path(model).resolve().name, dtype or found
    return ModelSizes(name, dtype=dtype, decoder=decoder, **decoder.cache_sizes)


def read_sizes(text: str, dtype: str = "bfloat16") -> ModelSizes:
    """Sizes from text such as "num_layers=32,num_kv_heads=8,head_dim=128,num_params=8e9".

    With `window=512,window_layers=20`, so many of the layers see no farther than that.

    Raises:
        ValueError: a name is not known, or one is missing.
    """
    names = "num_layers", "num_kv_heads", "head_dim", "num_params", "window", "window_layers"
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in names:
            raise ValueError(f"{name!r} is no size of a model: it has {', '.join(names)}")
        try:
            found[name] = int(float(value))
        except ValueError:
            raise ValueError(f"{name}={value!r} is no number") from None
    for name in names[:4]:
        if name not in found:
            raise ValueError(f"{text!r} does not say {name}: give {', '.join(names[:4])}, or a checkpoint's folder")
    local, window = found.pop("window_layers", 0), found.pop("window", None)
    if (window is None) != (local == 0) or local > found["num_layers"]:
        raise ValueError(
            f"window={window} and window_layers={local} of {found['num_layers']} layers: give both, or neither"
        )
    windows = (window,) * local + (None,) * (found["num_layers"] - local) if local else ()
    return ModelSizes("a model", dtype=dtype, windows=windows, **found)


def alternatives(model: Any, memory: Any, **options: Any) -> list[tuple[str, Plan | str]]:
    """The plan with one thing changed at a time: pages, dtype, devices, windows, sharing.

    Args:
        model: as in `make_plan`.
        memory: as in `make_plan`.
        **options: the other arguments of `make_plan`.

    Returns:
        What was changed, and the plan; or why there is none.
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


@functools.cache
def _decoder_weights(decoder: Any, dtype: str, num_devices: int) -> Weights:
    """Counted over the arrays that a decoder of this config has."""
    from flax import nnx

    from paged_jax.models.decoder import Decoder
    from paged_jax.models.sharding import split_axes

    abstract = nnx.state(nnx.eval_shape(lambda: Decoder(decoder, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))))
    axes = split_axes(decoder, num_devices)
    total = of_experts = looked_up = 0
    for path, leaf in nnx.to_flat_state(abstract):
        name = ".".join(map(str, path))
        size = math.prod(leaf.shape) * leaf.dtype.itemsize // (1 if axes[name] is None else num_devices)
        total += size
        of_experts += size if decoder.num_experts and name.endswith(("mlp.gate_up", "mlp.down")) else 0
        looked_up += size if name == "embed.weight" and not decoder.tie_embeddings else 0
    return Weights(total, of_experts, looked_up)
