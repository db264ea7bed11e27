"""Rotary position embeddings: the frequencies of every scaling rule, and the rotation itself."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import target_platform

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864); hashable.

    Args:
        theta: base of the wavelengths.
        kind: how long contexts are reached: "default" (not at all), "linear" (every wavelength times `factor`),
            "llama3" (the long wavelengths times `factor`, the short ones as they are, a smooth change between),
            "yarn" (a ramp between the two, Peng et al.,
            https://arxiv.org/abs/2309.00071) or "longrope" (a factor for each, https://arxiv.org/abs/2402.13753).
        factor: how much longer than `original_length` the context became.
        original_length: context in tokens before it was lengthened.
        low_frequency_factor: llama3: wavelengths above original_length / this are scaled in full.
        high_frequency_factor: llama3: wavelengths below original_length / this are not scaled.
        beta_fast: yarn: lanes that turn more often than this in original_length are not scaled.
        beta_slow: yarn: lanes that turn less often than this are scaled in full.
        truncate: yarn: the two bounds are rounded outwards to whole lanes.
        lane_factors: longrope: factor on the wavelength of each lane pair.
        magnitude: factor on cosine and sine, and so on queries and keys alike.
        rotary_share: the leading share of a head's lanes that turns; the rest carries no position.
        interleaved: a lane turns against its neighbour instead of the lane half of the turning ones away (GLM-4).

    Examples:
        >>> Rope(theta=500000.0, kind="llama3", factor=8.0, original_length=8192).factor
        8.0
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    lane_factors: tuple[float, ...] = ()
    magnitude: float = 1.0
    rotary_share: float = 1.0
    interleaved: bool = False

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position for each pair of lanes that turns, float32 [R // 2]."""
        size = int(head_dim * self.rotary_share)
        plain = self.theta ** -(np.arange(0, size, 2) / max(size, 1))
        if self.kind == "default":
            scaled = plain
        elif self.kind == "linear":
            scaled = plain / self.factor
        elif self.kind == "llama3":
            turns = self.original_length * plain / (2 * math.pi)
            span = self.high_frequency_factor - self.low_frequency_factor
            kept = np.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
            scaled = plain * (kept + (1 - kept) / self.factor)
        elif self.kind == "yarn":
            kept = 1 - np.clip(self._yarn_ramp(size), 0.0, 1.0)
            scaled = plain * (kept + (1 - kept) / self.factor)
        elif self.kind == "longrope":
            scaled = plain / np.asarray(self.lane_factors)
        else:
            raise ValueError(f"rope kind {self.kind!r} is not one of {', '.join(KINDS)}: use one of these.")
        return scaled.astype(np.float32)

    def _yarn_ramp(self, size: int) -> np.ndarray:
        """How far each lane pair stands on the way from the fast bound (0) to the slow one (1)."""

        def lane(turns: float) -> float:
            return size * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = lane(self.beta_fast), lane(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        return (np.arange(size // 2) - low) / max(high - low, 0.001)

    def angles(self, positions: Int[Array, "*T"], head_dim: int) -> tuple[Float[Array, "*T R"], Float[Array, "*T R"]]:
        """Cosine and sine of each token's turns, float32."""
        frequencies = jnp.asarray(self.frequencies(head_dim))
        angle = jnp.einsum("...,r->...r", positions.astype(jnp.float32), frequencies)
        turns = jnp.cos(angle) * self.magnitude, jnp.sin(angle) * self.magnitude
        # Else XLA fuses them into the rotations of all layers, and computes them again for each head of each. Where
        # the layers run in a loop, as on other platforms, they are computed before it.
        return lax.optimization_barrier(turns) if target_platform() == "cpu" else turns


def rotate(
    x: Float[Array, "*T N H"], cos: Float[Array, "*T R"], sin: Float[Array, "*T R"], *, interleaved: bool = False
) -> Float[Array, "*T N H"]:
    """Turns lane i of every head against lane i + R, or lane 2i against 2i + 1, for the first 2R lanes, in float32."""
    size = cos.shape[-1]
    if size == 0:
        return x
    if interleaved:
        left, right = x[..., : 2 * size : 2], x[..., 1 : 2 * size : 2]
    else:
        left, right = x[..., :size], x[..., size : 2 * size]
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = [(left * cos - right * sin).astype(x.dtype), (right * cos + left * sin).astype(x.dtype)]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * size)]
    return jnp.concatenate([*turned, x[..., 2 * size :]], axis=-1)
