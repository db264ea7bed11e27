"""Checks what users give: prompts become token ids, or an error that says what is wrong with them."""

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from paged_jax.cache.config import CacheConfig
from paged_jax.cache.kv_cache import KVCache
from paged_jax.cache.metadata import AttentionMetadata
from paged_jax.engine.output import Tokenizer
from paged_jax.forward import Forward
from paged_jax.sampling import BeamParams, SamplingParams

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Any
"""A text, token ids, or the messages of a chat, of which an assistant's last one is continued; else: a ValueError."""


@dataclasses.dataclass(frozen=True)
class Intake:
    """Makes token ids and checked parameters of what users give.

    Args:
        tokenizer: of the prompts; None: prompts are token ids.
        stop_tokens: tokens that end every sample.
        vocab_size: a function that returns V; called when it is first needed.
        max_beams: the most beams of a search.
        check_size: a function of the numbers of prompt tokens, new tokens and beams; raises ValueError if they never
            fit.
    """

    tokenizer: Tokenizer | None
    stop_tokens: tuple[int, ...]
    vocab_size: Callable[[], int]
    max_beams: int
    check_size: Callable[[int, int, int], None]

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            ValueError: it is empty, or no prompt, or its token ids are not in the vocabulary.
        """
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise ValueError(f"the prompt is {prompt!r}: pass a text, token ids, or the messages of a chat")
        given: Any = prompt if isinstance(prompt, str) else list(prompt)
        if isinstance(given, str) or (given and all(isinstance(message, Mapping) for message in given)):
            given = self._encode(given)
        wrong = [token for token in given if not isinstance(token, numbers.Integral) or isinstance(token, bool)]
        if wrong:
            raise ValueError(f"the prompt holds {wrong[0]!r}: token ids are whole numbers")
        if not given:
            raise ValueError("the prompt has 0 tokens; it needs at least 1 (for example a begin-of-text token)")
        outside = [token for token in given if not 0 <= token < self.vocab_size()]
        if outside:
            raise ValueError(f"the prompt holds {outside[0]}: token ids are in [0, {self.vocab_size()})")
        return tuple(int(token) for token in given)

    def params(self, params: SamplingParams | BeamParams | Any, num_prompt: int, best_of: int | None) -> SamplingParams:
        """The parameters of a request, with the stop tokens of all; of a search, what it has in common with samples.

        Raises:
            ValueError: they name tokens outside the vocabulary, or ask for more than can ever fit.
        """
        width = 1
        if isinstance(params, BeamParams):
            if params.width > self.max_beams:
                raise ValueError(
                    f"{params!r} of an Engine with max_beams={self.max_beams}: narrow the search, or make the engine "
                    f"with max_beams={params.width}"
                )
            if best_of is not None:
                raise ValueError(f"best_of={best_of} is for samples: of a beam search, num_return are the best")
            params, width = params.sampling, params.width
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is {params!r}: pass SamplingParams(...) or BeamParams(...)")
        params = dataclasses.replace(params, stop_tokens=(*params.stop_tokens, *self.stop_tokens))
        params.check(self.vocab_size())
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need to read the text: pass a tokenizer to the Engine")
        if best_of is not None and best_of < params.num_samples:
            raise ValueError(
                f"best_of={best_of} samples, of which num_samples={params.num_samples} are wanted: raise the first"
            )
        self.check_size(num_prompt, params.max_new_tokens, width)
        return params

    def _encode(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        if self.tokenizer is None:
            what = f"the text {prompt[:20]!r}" if isinstance(prompt, str) else "a chat"
            raise ValueError(f"the prompt is {what}: pass token ids, or a tokenizer to the Engine")
        return prompt_tokens(self.tokenizer, prompt)


def prompt_tokens(tokenizer: Tokenizer, prompt: str | Sequence[Mapping[str, Any]] | Any) -> list[int]:
    """Token ids of a text, or of a chat, in which an assistant's last message is left open, so that it goes on."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.chat(prompt, continue_final_message=prompt[-1].get("role") == "assistant")


def as_batch(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """A list of prompts, also where a single one was given."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {prompts!r}: pass a text, a list of token ids, or a list of such prompts")
    batch: list[Any] = list(prompts)
    is_one = batch and all(isinstance(item, numbers.Integral | Mapping) for item in batch)
    return [batch] if is_one else batch


def find_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: a path, or a Hugging Face repository that was downloaded before.

    Raises:
        ValueError: it is neither.
    """
    path = Path(name).expanduser()
    if (path / "config.json").exists():
        return path
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no {path / 'config.json'}: name the folder of a checkpoint")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{name} is no folder; to find downloaded repositories, install huggingface_hub") from None
    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except Exception as error:  # several kinds of them
        raise ValueError(
            f"{name} is no folder, and no Hugging Face repository that was downloaded before: run `hf download {name}`"
        ) from error


def vocab_size(forward: Forward, params: Any, config: CacheConfig) -> int:
    """V, from the shape of the logits: the decoder is traced, not run."""

    def logits(params: Any) -> jax.Array:
        cache = KVCache.create(config)
        metadata = AttentionMetadata.decode(cache.tables, active=jnp.zeros(config.max_sequences, bool))
        tokens = jnp.zeros(config.max_sequences, jnp.int32)
        return forward(params, tokens, cache.pool, metadata)[0]

    return jax.eval_shape(logits, params).shape[-1]
