"""The random batches find a step that is broken by hand, each line in turn."""

import inspect
import types

import pytest
from test_step_machine import machine_of

from batch_model import HYBRID, PLAIN, Stages, stages_of
from paged_jax.decoding import plan, room, step
from state_machine import run_machine

# what breaks: (the module, the line, what it becomes). None may run forever: a row that keeps all its pages when it is
# to give some up does, since it is asked again and again, and nothing stops a program on a device.
MUTANTS = {
    "the plan ignores the budget": (plan, "jnp.clip(left, 0, wanted)", "wanted"),
    "the plan gives a row that waits tokens": (
        plan,
        "behind, age = state.behind,",
        "behind, age = state.rows.num_known - state.cache.tables.lengths,",
    ),
    "the plan forgets the oldest where it does not fit": (plan, "return ok | is_oldest", "return ok"),
    "the oldest gives up pages": (
        room,
        "jnp.max(jnp.where(candidates, rows.age, OLDEST))",
        "jnp.min(jnp.where(candidates, rows.age, YOUNGEST))",
    ),
    "whoever gives up pages keeps nothing": (
        room,
        "jnp.where(owns, _shared_tokens(tables), 0)",
        "jnp.zeros_like(tables.lengths)",
    ),
    "whoever gave up pages computes": (room, "(made.granted | now) & ~gave_up", "made.granted | now"),
    "older rows give up pages for younger ones": (
        room,
        "holds & (rows.age > oldest_refused)",
        "holds & (rows.age != oldest_refused)",
    ),
    "rows that have ended keep their pages for good": (
        room,
        "ended = ~rows.active & holds",
        "ended = rows.active & ~rows.active",
    ),
    "nobody gives up what it shares": (room, "owns, younger & is_first)", "owns, owns)"),
    "lost tokens are not counted": (room, "attempt.lost_tokens + jnp.sum", "attempt.lost_tokens + 0 * jnp.sum"),
    "windows slide after pages are taken": (room, "state.cache.tables.slide()", "state.cache.tables"),
    "a shared prompt keeps its last token": (
        step,
        "jnp.where(is_ready, rows.num_prompt - 1, tables.lengths)",
        "jnp.where(is_ready, rows.num_prompt, tables.lengths)",
    ),
    "a prompt is shared before it is computed": (
        step,
        "lengths[source] >= rows.num_prompt - 1",
        "lengths[source] >= rows.num_prompt - 3",
    ),
    "a row ends one token late": (step, "num_known >= rows.limit", "num_known > rows.limit"),
    "a stop token ends nothing": (step, "drew & rows.sampling.is_stop(last)", "drew & ~drew"),
    "a token is learnt at the wrong place": (
        step,
        "jnp.where(drawn.drew, rows.num_known[:, None] + i,",
        "jnp.where(drawn.drew, rows.num_known[:, None] + i - 1,",
    ),
}
ONLY_WITH_WINDOWS = {"windows slide after pages are taken"}


def mutate(module: types.ModuleType, line: str, broken_line: str) -> types.ModuleType:
    """A module with one line changed."""
    source = inspect.getsource(module)
    assert source.count(line) == 1, f"{source.count(line)} lines of {module.__name__} hold {line!r}"
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(line, broken_line), "mutant", "exec"), mutant.__dict__)
    return mutant


def stages_with(windows, name: str) -> Stages:
    """The stages of a step with a mutant in them; those that the mutant does not touch are not compiled again."""
    module, line, broken_line = MUTANTS[name]
    mutant, sound = mutate(module, line, broken_line), stages_of(windows)
    if module is plan:
        broken = Stages(windows, plan=mutant.first_come_first_served)
    elif module is room:
        broken = Stages(windows, reserve=mutant.reserve)
    else:
        broken = Stages(windows, share_prompts=mutant.share_prompts, commit=mutant.commit)
    broken.compute, broken.run = sound.compute, sound.run
    if module is step:
        broken.make_room = sound.make_room
    else:
        broken.end = sound.end
    return broken


@pytest.mark.long  # each compiles programs of its own, for ten seconds and more
@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds(name):
    windows = HYBRID if name in ONLY_WITH_WINDOWS else PLAIN
    machine = machine_of(windows, stages_with(windows, name), check_at_the_end=False)
    with pytest.raises(AssertionError):
        run_machine(machine, num_examples=60, num_steps=30, shrink=False)
