"""Monte Carlo tree search over texts: where a continuation went well, more of its neighbourhood is tried.

    python -m examples.uct_search [--prompt TEXT] [--nodes 1000] [--branches 4] [--tokens 8]

UCT (Kocsis and Szepesvari 2006): from the root, follow the child with the best upper confidence bound to a leaf, draw
its children in one batch, and pass their mean value up to the root. Each node of the tree is a session: its children
are drawn from it, share all of its pages, and compute only what they add.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable

from rich.progress import track

from paged_jax import CacheReport, Completion, Engine, SamplingParams, models
from paged_jax.engine.intake import Prompt
from paged_jax.engine.session import Session


def likelihood(completion: Completion) -> float:
    """A value from 0 to 1: the geometric mean of the probabilities that the model gave to what it drew."""
    return math.exp(sum(completion.logprobs) / max(1, len(completion.logprobs)))


@dataclasses.dataclass
class Node:
    """A text so far, and how well went what was tried after it."""

    session: Session
    parent: "Node | None" = None
    children: list["Node"] = dataclasses.field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        """Of the values of what was tried."""
        return self.total / max(1, self.visits)

    def most_promising(self, exploration: float) -> "Node":
        """The child with the greatest upper confidence bound (UCB1)."""
        log = math.log(max(1, self.visits))
        return max(self.children, key=lambda child: child.mean + exploration * math.sqrt(log / child.visits))

    def most_visited(self) -> "Node":
        """The child that the search came back to most often; of several, that with the best mean."""
        return max(self.children, key=lambda child: (child.visits, child.mean))


@dataclasses.dataclass
class Search:
    """A tree that grows by a few nodes at a time.

    Args:
        engine: draws the texts, and keeps their pages.
        root: the prompt.
        num_branches: children of a node.
        num_tokens: that a child adds.
        value: of what a child adds, from 0 to 1.
        exploration: how much a node counts that was seldom tried.
    """

    engine: Engine
    root: Node
    num_branches: int
    num_tokens: int
    value: Callable[[Completion], float] = likelihood
    exploration: float = math.sqrt(2)
    nodes: list[Node] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes.append(self.root)

    def grow(self) -> None:
        """Expand the leaf that the bounds lead to."""
        leaf = self.root
        while leaf.children:
            leaf = leaf.most_promising(self.exploration)
        params = SamplingParams(self.num_tokens, temperature=1.0, seed=len(self.nodes), num_samples=self.num_branches)
        for drawn in leaf.session.generate(params):
            child = Node(leaf.session.fork(drawn), leaf)
            leaf.children.append(child)
            self.nodes.append(child)
            self._pass_up(child, self.value(drawn))

    def _pass_up(self, node: Node | None, value: float) -> None:
        while node is not None:
            node.visits, node.total, node = node.visits + 1, node.total + value, node.parent

    def best(self) -> Session:
        """The end of the path that was taken most often."""
        node = self.root
        while node.children:
            node = node.most_visited()
        return node.session

    def num_unique_tokens(self) -> int:
        """Tokens that the nodes cache, all but the last of each, where beginnings that are equal count once."""
        beginnings = set[tuple[int, ...]]()
        for node in self.nodes:
            tokens = node.session.tokens[:-1]
            beginnings.update(tokens[:end] for end in range(1, len(tokens) + 1))
        return len(beginnings)

    def close(self) -> None:
        """Keep no page of the tree."""
        for node in self.nodes:
            node.session.close()


def search(engine: Engine, prompt: Prompt, num_nodes: int, num_branches: int, num_tokens: int, **options) -> Search:
    """A tree of some nodes."""
    made = Search(engine, Node(engine.session(prompt)), num_branches, num_tokens, **options)
    for _ in track(range(-(-(num_nodes - 1) // num_branches)), "searching", transient=True):
        made.grow()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="def read_file(path):\n")
    for name, default in (("nodes", 1000), ("branches", 4), ("tokens", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    engine = Engine.from_pretrained(
        models.DEMO, max_sequences=options.branches, max_length=512, token_counts=(options.branches, 64), page_size=4,
        num_pages=8192, max_kept_pages=8000,
    )  # fmt: skip
    tree = search(engine, options.prompt, options.nodes, options.branches, options.tokens)
    assert engine.tokenizer is not None
    print(engine.tokenizer.decode(list(tree.best().tokens)))
    report, statistics = CacheReport.measure(engine).groups[0], engine.stats()
    print(f"{len(tree.nodes)} nodes of {tree.num_unique_tokens()} distinct tokens in {report.pages_in_use} pages of 4")
    print(f"{statistics.hit_rate:.0%} of {statistics.prompt_tokens} prompt tokens were cached")
    tree.close()


if __name__ == "__main__":
    main()
