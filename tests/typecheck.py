"""The type checker of the test run: beartype on every function, but not on the constructors of dataclasses.

JAX rebuilds a registered dataclass through its constructor with whatever a tree_map returned (shapes, None, booleans):
the annotations of its fields hold for states, not for every tree of that structure.
"""

from beartype import beartype


def check(function):
    return function if function.__name__ == "__init__" else beartype(function)
