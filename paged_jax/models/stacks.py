"""Layers whose weights are stacked, so that one compiled layer serves many: which layer is where."""

from paged_jax.models.config import DecoderConfig


def layer_numbers(num_layers: int, period: int | None) -> tuple[tuple[int, ...], ...]:
    """For each entry of `Decoder.layers` the layers that it is.

    Layers repeat after `period`: entry j < period holds the stacked weights of the layers j, j + period, j + 2 * period
    and so on. What is left of the last period follows, one layer an entry. Gemma 3's 26 layers with a period of 6 are
    (0, 6, 12, 18), ..., (5, 11, 17, 23), (24,), (25,).

    Args:
        num_layers: L.
        period: None: every layer is an entry.
    """
    if period is None:
        return tuple((layer,) for layer in range(num_layers))
    num_stacked = num_layers // period * period
    stacks = (tuple(range(first, num_stacked, period)) for first in range(period))
    return *stacks, *((layer,) for layer in range(num_stacked, num_layers))


def unstacked(path: str, num_layers: int, period: int | None) -> dict[str, int | None]:
    """The paths that the parts of a weight have in a decoder without a period.

    Returns:
        By path, which part along the first axis that is; None: the whole weight, which is not stacked.
    """
    if not path.startswith("layers."):
        return {path: None}
    layers, entry, name = path.split(".", 2)
    is_stacked = period is not None and int(entry) < period
    numbers = layer_numbers(num_layers, period)[int(entry)]
    return {f"{layers}.{layer}.{name}": i if is_stacked else None for i, layer in enumerate(numbers)}


def check_period(config: DecoderConfig, period: int) -> None:
    """Raises ValueError unless the layers repeat after that many."""
    if not 1 <= period <= config.num_layers:
        raise ValueError(f"period={period} must be at least 1 and at most num_layers={config.num_layers}.")
    kinds = [config.kind(layer) for layer in range(config.num_layers)]
    if kinds != [kinds[layer % period] for layer in range(config.num_layers)]:
        raise ValueError(
            f"the windows and rotary embeddings of the layers do not repeat after period={period}: use a multiple of "
            f"{config.period}, or None."
        )
