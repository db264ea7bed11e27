"""The sizes of a model: layers, heads, and the bytes of its weights."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp


class Weights(NamedTuple):
    """The bytes of the weights that one device holds, as `ModelSizes.weights` counts them."""

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

    Examples:
        >>> sizes = ModelSizes("my model", num_layers=32, num_kv_heads=8, head_dim=128, num_params=8_000_000_000)
        >>> sizes.weights().total, sizes.weights(num_devices=4).total
        (16000000000, 4000000000)
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


def find_sizes(model: Any, dtype: str | None = None) -> ModelSizes:
    """The sizes of a model.

    Args:
        model: as in `make_plan`.
        dtype: of its weights; None: what config.json says.

    Raises:
        ValueError: it is not understood.

    Examples:
        >>> sizes = find_sizes(models.DEMO)  # a folder: only config.json is read
        >>> sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, sizes.weights().total  # bytes
        (4, 2, 64, 4132224)
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

    With `window=512,window_layers=20`, 20 of the layers see 512 tokens; the others see all.

    Raises:
        ValueError: a name is not known, or one is missing.

    Examples:
        >>> sizes = read_sizes("num_layers=4,num_kv_heads=8,head_dim=128,num_params=1e9,window=512,window_layers=3")
        >>> sizes.windows
        (512, 512, 512, None)
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
