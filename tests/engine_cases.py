"""What the tests of the engine share: a tokenizer without a file, and what an empty pool is."""

import numpy as np

from paged_jax.engine import Engine


class Numbers:
    """Token ids as words: 7 is "7 ". It counts how often it is asked, and fails when it is told to."""

    hidden_tokens = frozenset()

    def __init__(self):
        self.fails = False

    def encode(self, text, *, special_tokens=True):
        return [int(word) if word.isdigit() else 0 for word in text.split()]

    def chat(self, messages, **options):
        return [token for message in messages for token in self.encode(message["content"])]

    def decode(self, tokens):
        return "".join(f"{token} " for token in tokens)

    def stream(self, prompt=()):
        return self

    def push(self, tokens):
        if self.fails:
            raise UnicodeError("no such character")
        return self.decode(tokens)

    def finish(self):
        return ""


def pool_is_empty(engine: Engine) -> bool:
    """Nothing holds a page but the prefix cache, and that what it says."""
    engine.step()
    for table, ids in zip(engine.tables.groups, engine.cached_pages(), strict=True):
        expected = np.bincount(ids, minlength=table.num_pages)
        expected[0] = 1  # the null page
        if np.any(table.lengths) or np.asarray(table.refcounts).tolist() != expected.tolist():
            return False
    return True
