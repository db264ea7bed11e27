"""The command line: `paged_jax demo`, `paged_jax generate` and `paged_jax families`."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 after bad input, which is named on stderr."""
    options = _parser().parse_args(argv)
    keep_compiled_programs()
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"paged_jax: {error}", file=sys.stderr)
        return 2
    return 0


def keep_compiled_programs() -> None:
    """Let JAX keep what it compiles on disk, so that the next start need not compile it again.

    In $XDG_CACHE_HOME/paged_jax or ~/.cache/paged_jax, unless JAX_COMPILATION_CACHE_DIR names another folder.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "paged_jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paged_jax", description="A paged KV cache for any JAX decoder.")
    commands = parser.add_subparsers(required=True)

    demo = commands.add_parser("demo", help="decode prompts that share a prefix, then show where the memory went")
    demo.set_defaults(command=_demo)
    demo.add_argument("--samples", type=int, default=3, help="continuations of each prompt")
    demo.add_argument("--max-new-tokens", type=int, default=64)
    demo.add_argument("--seed", type=int, default=0)

    families = commands.add_parser("families", help="print the model families whose checkpoints are read")
    families.set_defaults(command=_families)

    generate = commands.add_parser("generate", help="continue prompts with a Hugging Face checkpoint")
    generate.set_defaults(command=_generate)
    generate.add_argument("prompts", nargs="*", help="prompts; none: one a line from --file or stdin")
    generate.add_argument("--model", type=pathlib.Path, help="checkpoint folder; default: the demo model")
    generate.add_argument("--file", type=pathlib.Path, help="read prompts from a file, one a line")
    generate.add_argument("--chat", action="store_true", help="a prompt is what a user says: use the chat template")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--samples", type=int, default=1)
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--min-p", type=float, default=0.0)
    generate.add_argument("--repetition-penalty", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--stop", action="append", default=[], help="end a sample at this string")
    generate.add_argument("--dtype", default=None, help="of weights and pages; default: the checkpoint's")
    generate.add_argument("--page-size", type=int, default=16)
    generate.add_argument("--num-pages", type=int, help="default: enough for 16 rows")
    generate.add_argument("--json", action="store_true", help="one JSON object a sample")
    return parser


def _demo(options: argparse.Namespace) -> None:
    from paged_jax import demo, models

    demo.run(
        models.load(models.DEMO),
        Console(),
        samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )


def _families(options: argparse.Namespace) -> None:
    from paged_jax.models.families import FAMILIES

    width = max(map(len, FAMILIES))
    for model_type, family in sorted(FAMILIES.items()):
        print(f"{model_type:{width}}  {family.title}")


def _generate(options: argparse.Namespace) -> None:
    from paged_jax import models
    from paged_jax.generator import Generator
    from paged_jax.sampling import SamplingParams

    texts = _read_prompts(options)
    model = models.load(options.model or models.DEMO, options.dtype)
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        num_samples=options.samples,
        stop_tokens=model.stop_tokens,
        stop_strings=tuple(options.stop),
    )
    encode = _user_says if options.chat else models.Tokenizer.encode
    prompts = [encode(model.tokenizer, text) for text in texts]
    pages_per_row = -(-(max(map(len, prompts)) + options.max_new_tokens) // max(1, options.page_size))
    num_rows = min(16, len(prompts) * options.samples)
    config = model.cache_config(
        num_pages=num_rows * pages_per_row + 1 if options.num_pages is None else options.num_pages,
        max_sequences=num_rows,
        max_pages_per_sequence=pages_per_row,
        page_size=options.page_size,
    )
    generator = Generator(model.forward, model.params, config, decode_text=model.tokenizer.decode)
    for request, completions in enumerate(generator.run(prompts, params)):
        for number, completion in enumerate(completions):
            text = model.tokenizer.decode(completion.tokens, prompt=prompts[request])
            if options.json:
                fields = {"prompt": texts[request], "sample": number, "text": text, "finish": completion.finish}
                fields["logprob"] = sum(completion.logprobs)
                print(json.dumps(fields))
            else:
                print(texts[request] + ("\n" if options.chat else "") + text)


def _user_says(tokenizer, text: str) -> list[int]:
    return tokenizer.chat([{"role": "user", "content": text}])


def _read_prompts(options: argparse.Namespace) -> list[str]:
    texts = options.prompts
    if options.file is not None:
        if texts:
            raise ValueError("prompts came as arguments and with --file: give one or the other")
        texts = options.file.read_text().splitlines()
    elif not texts:
        texts = sys.stdin.read().splitlines()
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("no prompts: pass them as arguments, with --file, or one a line on stdin")
    return texts
