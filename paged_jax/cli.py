"""The command line: `paged_jax demo`, `generate`, `chat`, `plan`, `families` and `store`."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import urllib.parse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from paged_jax.cache.sizes import read_bytes
from paged_jax.decoding.draft import Lookup
from paged_jax.engine import Completion, Engine, Piece
from paged_jax.engine.intake import Prompt, find_folder, prompt_tokens
from paged_jax.engine.output import Tokenizer
from paged_jax.sampling import BeamParams, SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0, 1 where `store verify` found damage, 2 after bad input, which is named on stderr, or 130 after Ctrl-C.
    """
    options = _parser().parse_args(argv)
    keep_compiled_programs()
    try:
        return options.command(options) or 0
    except (ValueError, OSError) as error:
        print(f"paged_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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
    demo.add_argument("--num-samples", type=int, default=3, help="continuations of each prompt")
    demo.add_argument("--max-new-tokens", type=int, default=64)
    demo.add_argument("--seed", type=int, default=0)

    families = commands.add_parser("families", help="print the model families whose checkpoints are read")
    families.set_defaults(command=_families)

    generate = commands.add_parser("generate", help="continue prompts with a Hugging Face checkpoint")
    generate.set_defaults(command=_generate)
    generate.add_argument("prompts", nargs="*", help="prompts; none: one a line from --file or stdin")
    generate.add_argument("--file", type=pathlib.Path, help="read prompts from a file, one a line")
    generate.add_argument("--chat", action="store_true", help="a prompt is what a user says: use the chat template")
    generate.add_argument("--best-of", type=int, help="draw this many samples, and print the --num-samples likeliest")
    generate.add_argument(
        "--json-input",
        action="store_true",
        help='lines are objects: "prompt" or "messages", and fields of SamplingParams in the place of the options',
    )
    generate.add_argument("--json", action="store_true", help="print an object a line for each sample")
    _add_model_options(generate)
    beams = generate.add_argument_group("beam search", "the --num-samples best sequences, instead of drawn samples")
    beams.add_argument("--beams", type=int, metavar="N", help="search with this many beams")
    beams.add_argument("--length-penalty", type=float, help="a score is logprob / length ** penalty; default: 1")
    beams.add_argument("--early-stopping", choices=["false", "true", "never"], help="default: false")

    chat = commands.add_parser("chat", help="talk with a chat model; Ctrl-C cuts an answer, Ctrl-D ends")
    chat.set_defaults(command=_chat)
    chat.add_argument("--system", help="what the model is told first")
    chat.add_argument("--max-length", type=int, default=4096, help="tokens of the whole conversation")
    _add_model_options(chat)

    store = commands.add_parser("store", help="look into a store of pages, check it, make it smaller")
    store.set_defaults(command=_store)
    store.add_argument("action", choices=("info", "verify", "prune"))
    store.add_argument("store", metavar="FOLDER_OR_URL")
    store.add_argument("--max-bytes", metavar="SIZE", help="of `prune`: how many bytes of pages stay, such as 10GiB")

    plan = commands.add_parser("plan", help="say what fits in the memory of a device, and how fast it can be")
    plan.set_defaults(command=_plan)
    plan.add_argument(
        "--model",
        help="checkpoint folder, of which only config.json is read, or num_layers=32,num_kv_heads=8,head_dim=128,"
        "num_params=8e9; default: the demo model",
    )
    plan.add_argument("--memory", default="here", help="16GiB, or v5e, v5p, v6e, v7x, h100, h200; default: this device")
    plan.add_argument("--context", type=int, default=8192, help="tokens of a sequence")
    plan.add_argument("--page-size", type=int, default=16)
    plan.add_argument("--dtype", help="of the weights; default: the checkpoint's")
    plan.add_argument("--cache-dtype", help="of the pages; default: that of the weights")
    plan.add_argument("--num-devices", type=int, default=1, help="that split heads and MLPs")
    plan.add_argument("--max-sequences", type=int, help="rows of the page table; default: as many as fit")
    plan.add_argument("--shared-tokens", type=int, default=0, help="with which all sequences begin")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint folder, or a downloaded repository; default: the demo model")
    parser.add_argument("--dtype", default=None, help="of weights and pages; default: the checkpoint's")
    parser.add_argument("--cache-dtype", help="of the pages: float32, bfloat16, int8, float8_e4m3fn; default: --dtype")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--num-pages", type=int, help="default: enough for all rows")
    parser.add_argument(
        "--drafts",
        type=int,
        default=0,
        metavar="N",
        help="verify up to N (1 to 7) looked-up drafts a step",
    )
    parser.add_argument("--store", metavar="FOLDER_OR_URL", help="keep prefixes there for the next call, and find them")
    parser.add_argument("--host-cache-bytes", metavar="SIZE", default=0, help="of host memory for prefixes: 4GiB")
    sampling = parser.add_argument_group("sampling", "fields of paged_jax.SamplingParams")
    for field in dataclasses.fields(SamplingParams):
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, tuple):
            kind = {"stop_strings": str, "logit_bias": _token_and_bias}.get(field.name, int)
            metavar = "TOKEN=BIAS" if field.name == "logit_bias" else None
            sampling.add_argument(
                option if metavar else option.removesuffix("s"),
                dest=field.name,
                action="append",
                default=[],
                type=kind,
                metavar=metavar,
            )
        else:
            default = 64 if field.name == "max_new_tokens" else field.default
            sampling.add_argument(option, dest=field.name, type=type(default), default=default)


def _token_and_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    return int(token), float(bias)


def _sampling(options: argparse.Namespace, **changes) -> SamplingParams:
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingParams)}
    unknown = sorted(changes.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no field of SamplingParams: it has {', '.join(fields)}")
    return SamplingParams(**(fields | changes))


def _demo(options: argparse.Namespace) -> None:
    from paged_jax import demo, models

    demo.run(
        models.load(models.DEMO, stacked=True),  # compiles faster
        Console(),
        samples=options.num_samples,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )


def _families(options: argparse.Namespace) -> None:
    from paged_jax.models.families import FAMILIES

    width = max(map(len, FAMILIES))
    for model_type, family in sorted(FAMILIES.items()):
        print(f"{model_type:{width}}  {family.title}")


def _store(options: argparse.Namespace) -> int:
    from paged_jax.store import open_store

    where = options.store
    if "://" not in where and not (pathlib.Path(where) / "pages").is_dir():
        raise ValueError(f"{where} is no store: it has no folder of pages, and is no URL such as s3://bucket/prefix")
    url = urllib.parse.urlsplit(where)
    if "://" in where and url.scheme == "file" and not pathlib.Path(urllib.parse.unquote(url.path)).is_dir():
        raise ValueError(f"{where} is no store: there is no such folder")
    if options.action == "prune" and options.max_bytes is None:
        raise ValueError("prune needs --max-bytes: how much of the pages stays, such as 4GiB")
    if options.action != "prune" and options.max_bytes is not None:
        raise ValueError(f"--max-bytes is for prune: leave it out of {options.action}")
    max_bytes, num_bad = read_bytes(options.max_bytes or 0), 0
    store = open_store(where)
    if options.action == "verify":
        num_good, num_bad = store.verify()
        print(f"{num_good} pages are good, {num_bad} were not and were set aside, in {where.rstrip('/')}/aside")
    if options.action == "prune":
        print(f"{store.prune(max_bytes)} pages were removed")
    contents = store.contents()
    inline = f", {contents.inline_pages} of them in the index" if contents.inline_pages else ""
    print(f"{contents.pages} pages, {contents.bytes} bytes{inline}")
    for fingerprint, count in contents.fingerprints.items():
        print(f"  {count} of the model {fingerprint}")
    print(f"{contents.aside} damaged pages were set aside")
    store.close()
    return 1 if num_bad else 0


def _plan(options: argparse.Namespace) -> int:
    from paged_jax import models, planner

    model = planner.find_sizes(options.model or models.DEMO, options.dtype)
    chip = planner.find_chip(options.memory)
    if options.memory == "here":
        chip = chip._replace(bytes_per_second=planner.measure_bandwidth())
    names = "context", "page_size", "cache_dtype", "num_devices", "max_sequences", "shared_tokens"
    wishes = {name: getattr(options, name) for name in names}
    changed = planner.alternatives(model, chip, **wishes)
    fits = True
    try:
        print(planner.make_plan(model, chip, **wishes))
    except ValueError as error:
        if all(isinstance(plan, str) for _, plan in changed):
            raise
        fits = False
        print(f"It does not fit: {error}.\n")
    mixed = range(1, options.context + 1, max(1, options.context // 61))  # lengths that are spread evenly
    unknown = None if chip.bytes_per_second else "tokens/s depend on the bandwidth: name a chip to know them"
    table = Table(title="with one thing changed", title_justify="left", caption=unknown, caption_justify="left")
    for name in ("", f"sequences of {options.context:,}", f"of 1 to {options.context:,}", "tokens/s at most"):
        table.add_column(name, justify="right" if name else "left")
    for name, plan in changed:
        if isinstance(plan, str):
            table.add_row(name, "none")
        else:
            speed = f"{plan.tokens_per_second():,.0f}" if chip.bytes_per_second else "not known"
            table.add_row(name, f"{plan.num_sequences():,}", f"{plan.num_sequences(mixed):,}", speed)
    Console(width=100).print(table)
    return 0 if fits else 1


def _generate(options: argparse.Namespace) -> None:
    from paged_jax import models

    folder = find_folder(options.model or models.DEMO)
    asked = [_Asked.read(line, options) for line in _read_prompts(options)]
    for name in ("length_penalty", "early_stopping"):
        if options.beams is None and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for beam search: add --beams, or leave it out")
    tokenizer = models.Tokenizer.load(folder)
    sizes = [len(one.encode(tokenizer)) + one.sampling.max_new_tokens for one in asked]
    num_samples = sum(options.best_of or one.sampling.num_samples for one in asked)
    # In coarse sizes, so that another call of about this size finds its program compiled.
    num_rows = (4 if num_samples <= 4 else 16) if options.beams is None else min(len(asked), 4) * options.beams
    sizes = {"max_length": -(-max(sizes) // 128) * 128, "max_sequences": num_rows, "max_beams": options.beams or 0}
    printer = _Printer(asked, options.json)
    with _engine(folder, options, of=asked, **sizes) as engine:
        for one in asked:
            engine.add_request(one.prompt, one.params, best_of=options.best_of)
        try:
            for piece in engine.stream():
                printer.push(piece)
        finally:
            printer.finish()


def _beams(options: argparse.Namespace) -> BeamParams:
    """The search that is asked for."""
    params, drawing = _sampling(options), SamplingParams()
    fits = "max_new_tokens", "num_samples", "stop_tokens"
    others = [f.name for f in dataclasses.fields(params) if f.name not in fits]
    wrong = [name for name in others if getattr(params, name) != getattr(drawing, name)]
    if options.json_input:
        raise ValueError("--json-input reads fields of SamplingParams, which a search has not: leave it or --beams out")
    wrong += [name for name in ("best_of", "drafts") if getattr(options, name)]
    if wrong:
        single = {"stop_strings": "stop_string", "forbidden_tokens": "forbidden_token"}
        name = single.get(wrong[0], wrong[0]).replace("_", "-")
        raise ValueError(f"--beams finds the likeliest sequences: leave out --{name}")
    if options.beams < 1:
        raise ValueError(f"--beams {options.beams}: search with at least 1")
    if params.num_samples > options.beams:
        raise ValueError(
            f"--num-samples {params.num_samples} of --beams {options.beams}: ask for no more than there are"
        )
    return BeamParams(
        width=options.beams,
        max_new_tokens=params.max_new_tokens,
        num_return=params.num_samples,
        length_penalty=1.0 if options.length_penalty is None else options.length_penalty,
        early_stopping={None: False, "false": False, "true": True, "never": "never"}[options.early_stopping],
        stop_tokens=params.stop_tokens,
    )


def _engine(folder, options: argparse.Namespace, of: Sequence["_Asked"], **sizes) -> Engine:
    return Engine.from_pretrained(
        folder,
        page_size=options.page_size,
        num_pages=options.num_pages,
        dtype=options.dtype,
        cache_dtype=options.cache_dtype,
        max_stop_tokens=max(len(one.sampling.stop_tokens) for one in of),
        max_bias_tokens=max(len(one.sampling.logit_bias) + len(one.sampling.forbidden_tokens) for one in of),
        drafter=Lookup(options.drafts) if options.drafts else None,
        host_cache_bytes=options.host_cache_bytes,
        store=options.store,
        **sizes,
    )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A prompt of the command line: what is shown of it, and what the engine gets."""

    text: str
    prompt: Prompt
    params: SamplingParams | BeamParams

    @property
    def sampling(self) -> SamplingParams:
        return self.params.sampling if isinstance(self.params, BeamParams) else self.params

    @classmethod
    def read(cls, line: str, options: argparse.Namespace) -> "_Asked":
        """From a line, which is a text, or with --json-input an object."""
        fields = {"prompt": line}
        if options.json_input and options.beams is None:
            try:
                fields = json.loads(line)
                text = fields.pop("prompt", None)
                prompt = fields.pop("messages", text)
            except (json.JSONDecodeError, AttributeError):
                raise ValueError(f"{line[:40]!r} is no JSON object with a prompt or messages") from None
            if prompt is None:
                raise ValueError(f'{line[:40]!r} names no "prompt" and no "messages"')
            return cls(text or "", prompt, _sampling(options, **fields))
        prompt: Prompt = [{"role": "user", "content": line}] if options.chat else line
        params = _sampling(options) if options.beams is None else _beams(options)
        return cls(line + ("\n" if options.chat else ""), prompt, params)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        return prompt_tokens(tokenizer, self.prompt)


class _Printer:
    """Prints samples in the order of the prompts, the first that has not ended while it comes."""

    def __init__(self, asked: Sequence[_Asked], as_json: bool):
        self._asked, self._as_json = asked, as_json
        self._order = [(r, i) for r, one in enumerate(asked) for i in range(one.sampling.num_samples)]
        self._pieces: dict[tuple[int, int], list[Piece]] = {key: [] for key in self._order}
        self._num_shown = 0  # pieces of the first sample in the order

    def push(self, piece: Piece) -> None:
        self._pieces[piece.request, piece.sample].append(piece)
        while self._order and self._show(self._order[0]):
            del self._order[0]

    def finish(self) -> None:
        """Print what there is of the samples that did not end."""
        for key in self._order:
            if self._pieces[key]:
                self._show(key, is_last=True)

    def _show(self, key: tuple[int, int], is_last: bool = False) -> bool:
        """Print what came of a sample; returns whether it has ended."""
        pieces = self._pieces[key]
        has_ended = is_last or bool(pieces and pieces[-1].finish_reason)
        if self._as_json:
            if has_ended:
                print(json.dumps(self._fields(*key)), flush=True)
            return has_ended
        beginning = self._asked[key[0]].text if pieces and not self._num_shown else ""
        print(beginning + "".join(piece.text for piece in pieces[self._num_shown :]), end="", flush=True)
        self._num_shown = 0 if has_ended else len(pieces)
        if has_ended:
            print(flush=True)
        return has_ended

    def _fields(self, request: int, sample: int) -> dict:
        completion = Completion.join(self._pieces[request, sample])
        fields = {"prompt": self._asked[request].text, "sample": sample, "text": completion.text}
        fields |= {"finish_reason": completion.finish_reason, "logprob": sum(completion.logprobs)}
        return fields | {name: value for name in ("score", "error") if (value := getattr(completion, name)) is not None}


def _chat(options: argparse.Namespace) -> None:
    from paged_jax import models

    params = _sampling(options, num_samples=1)
    asked = _Asked("", "", params)
    folder, sizes = find_folder(options.model or models.DEMO), {"max_sequences": 1, "max_length": options.max_length}
    with _engine(folder, options, of=[asked], **sizes) as engine:
        _converse(engine, options, params)


def _converse(engine: Engine, options: argparse.Namespace, params: SamplingParams) -> None:
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        messages.append({"role": "user", "content": text})
        answer = ""
        request = engine.add_request(messages, params)
        try:
            for piece in engine.stream(request):
                print(piece.text, end="", flush=True)
                answer += piece.text
        except KeyboardInterrupt:
            engine.abort(request)
        print()
        messages.append({"role": "assistant", "content": answer})


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
