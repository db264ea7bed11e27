"""From logits to the next token: what a user asks for, what a row carries, how logits change, and the draw."""

from paged_jax.sampling.automaton import Automaton
from paged_jax.sampling.draw import Draw, draw
from paged_jax.sampling.params import BeamParams, SamplingParams
from paged_jax.sampling.processors import Processor
from paged_jax.sampling.state import SamplingState

__all__ = ["Automaton", "BeamParams", "Draw", "Processor", "SamplingParams", "SamplingState", "draw"]
