"""What `transformers` finds by beam search in tiny random checkpoints, to compare ours with.

    python tests/models/make_beams.py [--seed 0] [--output tests/models/goldens/beams.json]

Needs torch and transformers, and neither JAX nor this package; the checkpoints are those of make_goldens.py. Without
stop tokens all sequences have one length, so there the penalties and the rules of stopping change nothing but the
scores, and one of each is stored.
"""

import argparse
import collections
import itertools
import json
import tempfile
from pathlib import Path

import make_goldens

CASES = ("llama3", "qwen3", "gemma3")  # a window in every other layer of the last
LENGTHS = (3, 40, 17)  # of the prompts of one ragged batch; 40 passes the window
NEW_TOKENS = 16
WIDTHS, PENALTIES, EARLY = (2, 4, 8), (0.5, 1.0, 2.0), (False, True, "never")


def prompts(seed: int) -> list[list[int]]:
    """The batch."""
    longest = make_goldens.prompts(seed, make_goldens.VOCAB_SIZE)[6]
    starts = [0, *itertools.accumulate(LENGTHS)]
    return [longest[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]


def search(model, batch: list[list[int]], width: int, stops: list[int], penalty: float, early: bool | str) -> list:
    """For each prompt its sequences, the best first: [tokens, score]."""
    import torch  # pyright: ignore[reportMissingImports]  own environment

    longest = max(map(len, batch))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, num_beams=width, num_return_sequences=width,
            length_penalty=penalty, early_stopping=early, do_sample=False, eos_token_id=stops or None, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    found = []
    for sequence, score in zip(out.sequences[:, longest:].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(sequence) if token in stops), len(sequence))
        found.append([sequence[:end], round(score, 5)])
    return [found[start : start + width] for start in range(0, len(found), width)]


def compute(case: str, seed: int) -> dict:
    """The checkpoint, its stop tokens, and what each setting finds."""
    with tempfile.TemporaryDirectory() as folder:
        config, shapes, model = make_goldens.write_model(case, seed, folder)
    batch = prompts(seed)
    plain = search(model, batch, max(WIDTHS), [], 1.0, False)
    common = collections.Counter(token for beams in plain for tokens, _ in beams for token in tokens[2:])
    stops = [token for token, _ in common.most_common(3)[1:]]  # two that are drawn often, but not in every sequence
    runs = [
        dict(
            width=width,
            stop=stop,
            penalty=penalty,
            early=early,
            found=search(model, batch, width, stop, penalty, early),
        )
        for stop in ([], stops)
        for width in WIDTHS
        for penalty in (PENALTIES if stop else (1.0,))
        for early in (EARLY if stop else (False,))
    ]
    return {"config": json.loads(config.to_json_string(use_diff=True)), "shapes": shapes, "seed": seed, "runs": runs}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "goldens" / "beams.json")
    options = parser.parse_args()
    cases = {case: compute(case, options.seed) for case in CASES}
    lines = [json.dumps(case) + ": " + json.dumps(golden, separators=(",", ":")) for case, golden in cases.items()]
    options.output.write_text("{" + ",\n".join(lines) + "}\n")
    for case, golden in cases.items():
        lengths = [
            len(tokens) for run in golden["runs"] if run["stop"] for beams in run["found"] for tokens, _ in beams
        ]
        print(case, collections.Counter(lengths))


if __name__ == "__main__":
    main()
