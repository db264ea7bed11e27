"""Hugging Face checkpoint folders: config.json, model.safetensors (or its shards), tokenizer.json."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.cache.pool import PagePool
from paged_jax.models.config import DecoderConfig
from paged_jax.models.decoder import Decoder
from paged_jax.models.expert_files import split_experts
from paged_jax.models.families import Family, find_family
from paged_jax.models.fields import Fields
from paged_jax.models.safetensors_file import StoredTensor, describe, read_json
from paged_jax.models.sharding import Placement, tensor_parallel
from paged_jax.models.stacks import unstacked
from paged_jax.models.stored import Stored, find_tensors
from paged_jax.models.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")
STORED_DTYPES = ("F32", "F16", "BF16")
PROGRESS_BYTES = 200_000_000  # a progress bar from this size on
# Tensors that some checkpoints carry and that follow from the config or from other tensors.
DERIVED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class GraphForward:
    """A decoder as a `paged_jax.Forward`: its structure only, so that what jit keeps of it holds no weights.

    Equal for equal structures: a checkpoint that is loaded again is not compiled again.
    """

    graph: Any

    def __call__(self, params: Any, tokens: Int[Array, " T"], pool: PagePool, metadata: AttentionMetadata):
        """Float32 logits [Z, V] at the tokens `metadata.logits_at`, and the pool; see `Decoder.__call__`."""
        return nnx.merge(self.graph, params)(tokens, pool, metadata)


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint: its weights, and the decoder as pure functions of them.

    Args:
        config: shape and options of the decoder.
        graph: the structure of the decoder, split from its weights once.
        params: the weights, a pytree.
        folder: where it came from.
        stop_tokens: token ids that end a text.

    Examples:
        >>> model = models.load(models.DEMO)
        >>> config = model.cache_config(num_pages=64, max_sequences=4, max_pages_per_sequence=8)
        >>> model.dense_forward(model.params, jnp.array([[1, 2, 3]])).shape  # [B, T, V], without any cache
        (1, 3, 1536)
    """

    config: DecoderConfig
    graph: Any
    params: Any
    folder: Path
    stop_tokens: tuple[int, ...]

    @property
    def forward(self) -> "GraphForward":
        """The decoder as a `paged_jax.Forward`, without its weights."""
        return GraphForward(self.graph)

    def dense_forward(self, params: Any, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T V"]:
        """Logits at every token of whole sequences, computed without any cache."""
        return nnx.merge(self.graph, params).dense(tokens)

    @property
    def dtype(self) -> str:
        """The dtype of the weights: "float32" or "bfloat16"."""
        return jax.tree.leaves(self.params)[0].dtype.name

    @property
    def cache_sizes(self) -> dict[str, Any]:
        """The fields of a `CacheConfig` that follow from the model."""
        return self.config.cache_sizes | {"dtype": self.dtype}

    def cache_config(self, **sizes: Any) -> CacheConfig:
        """A `CacheConfig` for this model.

        Args:
            **sizes: the fields that do not follow from the model. `dtype` and `windows` are those of the model unless
                you give others. Instead of `num_pages`, `pool_bytes` says how large the pool may be: 4e9, or "4GiB".

        Raises:
            ValueError: both were given, or a size is wrong.
        """
        if "pool_bytes" not in sizes:
            return CacheConfig(**(self.cache_sizes | sizes))
        if "num_pages" in sizes:
            raise ValueError(
                f"num_pages={sizes['num_pages']} and pool_bytes={sizes['pool_bytes']} both size the pool: give one"
            )
        return CacheConfig.for_budget(**(self.cache_sizes | sizes))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights.

        Raises:
            ValueError: there is no tokenizer.json, or it is not readable.
        """
        return Tokenizer.load(self.folder)


def load(
    folder: str | Path,
    dtype: Any = None,
    *,
    max_length: int | None = None,
    sharding: Mesh | Placement | None = None,
    implementation: str | None = None,
    stacked: bool | None = None,
) -> Model:
    """Loads a checkpoint folder, tensor by tensor, straight into its dtype and onto its devices.

    Args:
        folder: holds config.json, and model.safetensors or its shards with model.safetensors.index.json.
        dtype: "float32" or "bfloat16" (or `jnp.bfloat16`) for weights and activations; None: what config.json says.
        max_length: the longest context in tokens that will be run, by which LongRoPE models (Phi 3.5) choose between
            their factors for short and for long contexts; None: what config.json says.
        sharding: a mesh with an axis "model", over which heads and MLPs are split (`tensor_parallel`); or a function
            from the path of a weight, such as "layers.0.attn.q.weight", to its sharding. None: the default device.
        implementation: the kernel for attention over pages, by its name; None: chosen by platform.
        stacked: whether the layers run in a loop over stacked weights, so that the time to compile does not grow with
            their number (see `Decoder`). None: yes, except on a CPU, where the loop would copy the weights.

    Returns:
        The model.

    Raises:
        ValueError: a file is missing, cut short or not understood, or the tensors are not those of the config.

    Examples:
        >>> model = models.load(models.DEMO)
        >>> model.config.num_layers, model.dtype, model.tokenizer.vocab_size
        (4, 'bfloat16', 1536)
    """
    folder = Path(folder)
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"), max_length)
    family = find_family(fields)
    config, fields = family.read(fields), family.text_fields(fields)
    stored = find_tensors(folder, fields, family)
    if stacked is None:
        stacked = _platform(sharding) != "cpu"
    # Where nothing repeats there is nothing to stack.
    period = config.period if stacked and config.period < config.num_layers else None
    options: dict[str, Any] = {"implementation": implementation, "period": period}
    options["dtype"] = _choose_dtype(fields, dtype)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options)))
    plan = _plan(family, abstract, stored, folder, config, period)
    placement = tensor_parallel(config, sharding, period) if isinstance(sharding, Mesh) else sharding
    return Model(config, graph, _read(abstract, plan, placement), folder, _stop_tokens(folder, fields))


def save(folder: str | Path, hf_config: dict[str, Any], params: Any, *, dtype=None, num_shards: int = 1):
    """Writes config.json and the weights as a Hugging Face checkpoint.

    Args:
        folder: made where it does not exist.
        hf_config: what config.json will say; its `model_type` chooses the tensors' names.
        params: the state of a `Decoder` of that config, whatever its period.
        dtype: of the written tensors; None: as they are.
        num_shards: files; more than one come with model.safetensors.index.json.

    Examples:
        >>> import json, tempfile
        >>> model, folder = models.load(models.DEMO), tempfile.mkdtemp()
        >>> models.save(folder, json.loads((models.DEMO / "config.json").read_text()), model.params)
        >>> models.read_config(folder) == models.read_config(models.DEMO)
        True
    """
    flat = _flatten(params)
    num_stacks = sum(path.endswith(".attn_norm.weight") and leaf.ndim == 2 for path, leaf in flat.items())
    whole = _unstack(flat, decoder_config(hf_config).num_layers, num_stacks or None)
    places = find_family(Fields(hf_config)).place({path: part.shape[0] for path, part in whole.items()})
    parts: dict[str, list[np.ndarray]] = {}
    for path, place in sorted(places.items(), key=lambda item: item[1].start):
        value = whole[path].read(flat)
        parts.setdefault(place.name, []).append(np.asarray(value if dtype is None else value.astype(dtype)))
    # save_file writes the memory as it lies, whatever the strides say
    tensors = {name: np.ascontiguousarray(np.concatenate(parts[name])) for name in sorted(parts)}
    tensors = split_experts(tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    shards = [names[i::num_shards] for i in range(num_shards)]
    files = ["model.safetensors"]
    if num_shards > 1:
        (folder / "model.safetensors").unlink(missing_ok=True)  # readers would prefer it
        files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        weight_map = {name: file for shard, file in zip(shards, files, strict=True) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for shard, file in zip(shards, files, strict=True):
        part = folder / f"{file}.part"
        save_file({name: tensors[name] for name in shard}, str(part), metadata={"format": "pt"})
        part.chmod(0o644)
        part.replace(folder / file)
    written = np.dtype(tensors[names[0]].dtype).name
    (folder / "config.json").write_text(json.dumps(hf_config | {"dtype": written}, indent=2) + "\n")


def read_config(folder: str | Path, max_length: int | None = None) -> tuple[DecoderConfig, str]:
    """The decoder of a checkpoint folder and the dtype of its weights, from config.json only.

    Args:
        folder: holds config.json.
        max_length: see `load`.

    Raises:
        ValueError: there is no config.json, or it is not understood.

    Examples:
        >>> decoder, dtype = models.read_config(models.DEMO)
        >>> decoder.num_layers, decoder.num_kv_heads, dtype
        (4, 2, 'bfloat16')
    """
    path = Path(folder) / "config.json"
    fields = Fields(read_json(path), str(path), max_length)
    family = find_family(fields)
    return family.read(fields), _choose_dtype(family.text_fields(fields), None).name


def decoder_config(hf_config: dict[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes."""
    fields = Fields(hf_config)
    return find_family(fields).read(fields)


def _choose_dtype(fields: Fields, dtype: Any) -> jnp.dtype:
    if dtype is not None and not isinstance(dtype, str):
        dtype = jnp.dtype(dtype).name
    if dtype is None:
        name = "dtype" if "dtype" in fields.values else "torch_dtype"
        dtype = fields.text(name, "float32").removeprefix("torch.")
        if dtype not in DTYPES:
            fields.fail(name, f"pass load(folder, dtype=...) with one of {', '.join(DTYPES)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported: use one of {', '.join(DTYPES)}.")
    return jnp.dtype(dtype)


def _platform(sharding: Mesh | Placement | None) -> str:
    """Of the devices that the weights go to."""
    if isinstance(sharding, Mesh):
        return sharding.devices.flat[0].platform
    devices = jnp.zeros(()).devices() if sharding is None else sharding("embed.weight").device_set
    return next(iter(devices)).platform


def _flatten(params) -> dict[str, Any]:
    """Every weight by its path, such as `layers.0.attn.q.weight`."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}


class _Part(NamedTuple):
    """A weight as a checkpoint has it: a weight of ours, or one layer of it where it is stacked."""

    path: str
    index: int | None
    shape: tuple[int, ...]

    def read(self, flat: dict[str, Any]) -> jax.Array:
        """Its value, from all weights."""
        return flat[self.path][...] if self.index is None else flat[self.path][self.index]


def _unstack(flat: dict[str, Any], num_layers: int, period: int | None) -> dict[str, _Part]:
    """The weights of a decoder by their paths in one without a period."""
    return {
        plain: _Part(path, index, leaf.shape if index is None else leaf.shape[1:])
        for path, leaf in flat.items()
        for plain, index in unstacked(path, num_layers, period).items()
    }


def _plan(
    family: Family, abstract, stored: dict[str, Stored], folder: Path, config: DecoderConfig, period: int | None
) -> dict[str, list[tuple[Stored, int, int]]]:
    """For each of our tensors: where each layer of it is stored, and in which rows; one error for all that is wrong."""
    parts = _unstack(_flatten(abstract), config.num_layers, period)
    places = family.place({path: part.shape[0] for path, part in parts.items()})
    shapes: dict[str, tuple[int, ...]] = {}
    for path, place in sorted(places.items(), key=lambda item: item[1].stop):
        shapes[place.name] = (place.stop, *parts[path].shape[1:])
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    extra = {name for name in stored if name not in shapes and not name.endswith(DERIVED)} - ignored
    missing = shapes.keys() - stored.keys()
    misshaped = [
        f"{name} is {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    unsupported = [
        f"{name} ({tensor.dtype})"
        for name, tensor in stored.items()
        if name in shapes and isinstance(tensor, StoredTensor) and tensor.dtype not in STORED_DTYPES
    ]
    problems = {
        "missing": missing,
        "not expected": extra,
        "of another shape": misshaped,
        f"not of {', '.join(STORED_DTYPES)}": unsupported,
    }
    found = [f"{what}: {describe(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"the tensors in {folder} are not those of its config.json. {'; '.join(found)}. "
            "Correct config.json, convert the weights, or download the checkpoint again."
        )
    plan: dict[str, list[tuple[Stored, int, int]]] = {}
    for plain, part in parts.items():  # the layers of a stack in their order
        place = places[plain]
        plan.setdefault(part.path, []).append((stored[place.name], place.start, place.stop))
    return plan


def _read(abstract, plan: dict[str, list[tuple[Stored, int, int]]], placement: Placement | None):
    """All tensors, the largest first: what a copy needs besides the weights is smallest at the end."""
    flat = dict(nnx.to_flat_state(abstract))
    sizes = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in flat.items()}
    total = sum(sizes.values())
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=total < PROGRESS_BYTES) as bar:
        task = bar.add_task("loading weights", total=total)
        for path in sorted(flat, key=sizes.__getitem__, reverse=True):
            name, leaf = ".".join(map(str, path)), flat[path]
            sharding, parts = None if placement is None else placement(name), plan[name]
            tensor, start, stop = parts[0]
            if len(leaf.shape) > len(tensor.shape):
                value = _stack(parts, leaf, sharding, lambda num_bytes: bar.advance(task, num_bytes))
            else:
                value = _copy(tensor.rows(start, stop), leaf.dtype, sharding)
                bar.advance(task, sizes[path])
            flat[path] = leaf.replace(value)
    return nnx.from_flat_state(flat)


def _copy(rows: np.ndarray, dtype, sharding: Sharding | None) -> jax.Array:
    """The rows on their devices; nothing of the file stays mapped."""
    if sharding is None:
        return jnp.array(rows, dtype=dtype, copy=True)
    return jax.make_array_from_callback(rows.shape, sharding, lambda part: np.array(rows[part], dtype))


def _stack(parts: list[tuple[Stored, int, int]], leaf, sharding: Sharding | None, advance) -> jax.Array:
    """The layers of a stacked weight on their devices, written one after the other into the memory of the stack."""
    layer_sharding = sharding
    if isinstance(sharding, NamedSharding):
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    value = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    for i, (tensor, start, stop) in enumerate(parts):
        layer = _copy(tensor.rows(start, stop), leaf.dtype, layer_sharding)
        value = _put(value, layer, i).block_until_ready()  # one layer at a time is held twice
        advance(layer.nbytes)
    return value


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, layer, i):
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, axis=0)


def _stop_tokens(folder: Path, fields: Fields) -> tuple[int, ...]:
    """End-of-text ids: of generation_config.json, otherwise of config.json."""
    path = folder / "generation_config.json"
    generation = Fields(read_json(path) if path.exists() else {}, str(path))
    source = fields if generation.get("eos_token_id", None) is None else generation
    ids = source.get("eos_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        source.fail("eos_token_id", "it must be a token id or a list of them.")
    return tuple(ids)
