"""Best-of-n tree search with sessions: of several continuations of each line the likeliest survive, and are continued.

    python -m examples.tree_search [--prompt TEXT] [--depth 4] [--width 3] [--branches 4]

Each node of the tree is a session. Its children share its pages, and compute only the line that they add.
"""

import argparse
import dataclasses

from paged_jax import Engine, SamplingParams, models
from paged_jax.engine.session import Session


@dataclasses.dataclass(frozen=True)
class Node:
    """A text so far, and how likely the model finds what was added to the prompt."""

    session: Session
    text: str
    logprob: float = 0.0
    num_tokens: int = 0

    @property
    def value(self) -> float:
        """The mean log-probability of a token."""
        return self.logprob / max(1, self.num_tokens)


def grow(node: Node, num_branches: int, seed: int) -> list[Node]:
    """The next line of a node, drawn several times."""
    params = SamplingParams(max_new_tokens=24, temperature=0.8, seed=seed, num_samples=num_branches, stop_strings="\n")
    return [
        Node(
            node.session.fork(drawn),
            node.text + drawn.text + ("\n" if drawn.finish_reason == "stop" else ""),
            node.logprob + sum(drawn.logprobs),
            node.num_tokens + len(drawn.tokens),
        )
        for drawn in node.session.generate(params)
    ]


def search(engine: Engine, prompt: str, depth: int, width: int, num_branches: int) -> list[Node]:
    """The best texts of some lines: a beam of `width` nodes, each continued `num_branches` times."""
    beam = [Node(engine.session(prompt), prompt)]
    for level in range(depth):
        children = [child for node in beam for child in grow(node, num_branches, seed=level)]
        children.sort(key=lambda node: node.value, reverse=True)
        distinct: dict[str, Node] = {}
        for node in children:
            distinct.setdefault(node.text, node)
        best = list(distinct.values())[:width]
        for node in [*beam, *children]:
            if node not in best:
                node.session.close()
        beam = best
    return beam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="def read_file(path):\n")
    for name, default in (("depth", 4), ("width", 3), ("branches", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    engine = Engine.from_pretrained(models.DEMO, max_sequences=4, max_length=256, token_counts=(8, 64))
    for node in search(engine, options.prompt, options.depth, options.width, options.branches):
        print(f"── {node.value:.2f} a token\n{node.text}")
    statistics = engine.stats()
    print(f"{statistics.hit_rate:.0%} of {statistics.prompt_tokens} prompt tokens were cached")


if __name__ == "__main__":
    main()
