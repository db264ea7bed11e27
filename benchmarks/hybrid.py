"""What a hybrid decoder keeps in memory: local layers give up the pages before their window.

    python -m benchmarks.hybrid [--json]

A decoder with Gemma 3's pattern and heads (five layers with a window of 512 to one that sees everything, one KV head of
256) and random weights draws 96 tokens after a prompt of 4000, and once more with a cache that keeps everything.
"""

import argparse

import numpy as np
from flax import nnx

from benchmarks.report import Report, add_json_option
from paged_jax import CacheConfig, CacheReport, Engine, SamplingParams, models

WINDOW, PATTERN, CONTEXT, NEW_TOKENS = 512, 6, 4096, 96
CONFIG = models.DecoderConfig(
    vocab_size=256, hidden_size=64, intermediate_size=64, num_layers=PATTERN, num_heads=4, num_kv_heads=1, head_dim=256,
    windows=(WINDOW,) * (PATTERN - 1) + (None,),
)  # fmt: skip


def serve(engine: Engine, prompt: list[int]) -> tuple[list[int], CacheReport]:
    """What one prompt draws, and the memory before its last token."""
    engine.add_request(prompt, SamplingParams(max_new_tokens=NEW_TOKENS))
    tokens, report = [], CacheReport.measure(engine.tables, engine.config)
    while engine.has_work:
        for piece in engine.step():
            tokens += piece.tokens
        latest = CacheReport.measure(engine.tables, engine.config)
        report = latest if latest.groups[0].tokens else report
    return tokens, report


def make_engine(**windows) -> Engine:
    graph, params = nnx.split(models.Decoder(CONFIG, rngs=nnx.Rngs(0)))
    config = CacheConfig(
        CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim, num_pages=CONTEXT // 16 + 1, max_sequences=1,
        max_pages_per_sequence=CONTEXT // 16, dtype="float32", **windows,
    )  # fmt: skip
    return Engine(lambda params, *step: nnx.merge(graph, params)(*step), params, config, visit_steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json_option(parser)
    options = parser.parse_args()
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, CONTEXT - NEW_TOKENS).tolist()
    hybrid, full = make_engine(windows=CONFIG.windows), make_engine()
    (tokens, report), (expected, whole) = serve(hybrid, prompt), serve(full, prompt)
    assert tokens == expected, "giving up pages changed the tokens"
    assert report.full_bytes == whole.full_bytes == sum(whole.bytes_in_use)

    table = Report("hybrid", f"one sequence of {report.groups[0].tokens} tokens in pages of 16, float32")

    def add(layers: str, pages: str, used: int, pool: int) -> None:
        table.add(layers=layers, pages=pages, MiB=used / 2**20, of_full=used / report.full_bytes, pool_MiB=pool / 2**20)

    pairs = list(zip(hybrid.config.groups, report.groups, report.bytes_in_use, report.page_bytes, strict=True))
    for group, counts, used, page_bytes in pairs:
        sees = "everything" if group.window is None else f"{group.window} tokens"
        name = f"{len(group.layers)} that see {sees}"
        add(name, str(counts.pages_in_use), used, group.num_pages * page_bytes)
    add("all", "", sum(report.bytes_in_use), hybrid.config.pool_bytes)
    add("all, nothing given up", str(whole.groups[0].pages_in_use), report.full_bytes, full.config.pool_bytes)
    table.finish(options)


if __name__ == "__main__":
    main()
