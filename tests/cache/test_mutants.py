"""The random histories find a page table that is broken by hand, each line in turn."""

import dataclasses
import inspect
import types

import pytest
from test_page_table_machine import PageTableMachine

from paged_jax.cache import page_table
from state_machine import run_machine
from table_model import NAMES, TRANSITIONS, Transitions

SHARES = ("fork", "permute", "publish", "attach")
DROPS = ("release", "truncate", "slide", "permute", "drop", "drop_pages")
# what breaks: (the line, what it becomes, the transitions that run it)
MUTANTS = {
    "never copies on write": ("(self.refcounts[last_page] > 1)", "(self.refcounts[last_page] > 9)", ["reserve"]),
    "all sharers keep the page": ("appends & is_last & (", "appends & (", ["reserve"]),
    "keeps a page that others own": ("jnp.sum(same, axis=1, dtype=jnp.int32) == refcount", "refcount > 0", ["reserve"]),
    "a copier keeps its reference": (".add(-1, mode", ".add(0, mode", ["reserve"]),
    "new pages get no owner": ("jnp.ones_like(page)", "jnp.zeros_like(page)", ["reserve"]),
    "further pages get no owner": ("jnp.ones_like(pages)", "jnp.zeros_like(pages)", ["reserve"]),
    "grants one page too many": ("(total <= table.num_free)", "(total <= table.num_free + 1)", ["reserve"]),
    "a smaller row overtakes": ("(total <= table.num_free)", "(num_needed <= table.num_free - 3)", ["reserve"]),
    "a copied row loses its first new page": ("(slot > 0) & ~copies", "slot > 0", ["reserve"]),
    "sharing adds no reference": ("self.refcounts[pages] + 1", "self.refcounts[pages]", SHARES),
    "dropping keeps the reference": ("self.refcounts[pages] - num_times", "self.refcounts[pages]", DROPS),
    "frees pages that others own": ("& (counts == 0)", "& (counts >= 0)", DROPS),
    "a page named twice loses one owner": ("_references(distinct, num_times)", "_references(distinct)", ["drop_pages"]),
    "a page named twice is freed twice": ("is_named & is_first & ~is_bad", "is_named & ~is_bad", ["drop_pages"]),
    "releases other rows": ("mask & (self.lengths > 0)", "~mask & (self.lengths > 0)", ["release"]),
    "release leaves the last page": ("nothing + self.pages.shape[1]", "nothing + self.pages.shape[1] - 1", ["release"]),
    "truncate frees the page it ends in": ("self._columns(lengths), self", "lengths // 4, self", ["truncate"]),
    "slide frees a page still seen": ("- window + 1, 0)", "- window + 2, 0)", ["slide"]),
    "slide treats a shared page as its own": ("(self.refcounts[page] == 1)", "(self.refcounts[page] > 0)", ["slide"]),
    "fork gives a child two parents": ("axis=1, dtype=jnp.int32) == 1)", "axis=1, dtype=jnp.int32) >= 1)", ["fork"]),
    "attach overwrites a row": ('(self.lengths.at[row].get(mode="clip") == 0)', "(row >= 0)", ["attach"]),
    "reset leaves handles alive": ("epoch=self.epoch + 1", "epoch=self.epoch", ["reset"]),
}


def mutate(line: str, broken_line: str) -> type:
    """PageTable with one line changed."""
    source = inspect.getsource(page_table)
    assert source.count(line) >= 1, f"no line of page_table.py holds {line!r}"
    module = types.ModuleType("mutant")
    exec(compile(source.replace(line, broken_line), "mutant", "exec"), module.__dict__)
    return module.PageTable


def transition_of(mutant: type, name: str):
    """The mutant's transition on tables of the real class."""

    def convert(table, cls):
        return cls(**{field.name: getattr(table, field.name) for field in dataclasses.fields(table)})

    def transition(table, *args):
        result = getattr(convert(table, mutant), name)(*args)
        if isinstance(result, tuple):
            return convert(result[0], page_table.PageTable), result[1]
        return convert(result, page_table.PageTable)

    return transition


@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds(name):
    line, broken_line, affected = MUTANTS[name]
    mutant = mutate(line, broken_line)
    transitions = types.SimpleNamespace(**{name: getattr(TRANSITIONS, name) for name in NAMES})
    for affected_name in affected:
        setattr(transitions, affected_name, Transitions.jit(affected_name, transition_of(mutant, affected_name)))

    class Mutant(PageTableMachine):
        def teardown(self):
            pass

    Mutant.transitions = transitions
    with pytest.raises(AssertionError):
        run_machine(Mutant, num_examples=400, num_steps=40, shrink=False)
