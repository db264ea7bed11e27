"""What is left of two reservations of one step, of which some rows have given up the first."""

import jax.numpy as jnp

from paged_jax.cache.page_table import NULL_PAGE, Reservation
from paged_jax.cache.page_tables import Reservations
from paged_jax.decoding.room import _merge


def reservations(granted, source, target) -> Reservations:
    mask = jnp.array(granted, bool)
    return Reservations(mask, (Reservation(mask, jnp.array(source, jnp.int32), jnp.array(target, jnp.int32)),))


def test_no_copy_is_made_for_a_row_that_gave_up_its_pages():
    """Its target may be another row's by now: random batches meet that too seldom to find it."""
    nobody = NULL_PAGE
    first = reservations([1, 1, 0], [3, 4, nobody], [7, 8, nobody])
    second = reservations([0, 0, 1], [nobody, nobody, 5], [nobody, nobody, 8])  # row 1 gave page 8 back to row 2
    merged = _merge(first, second, now=jnp.array([0, 0, 1], bool), gave_up=jnp.array([0, 1, 0], bool))
    (group,) = merged.groups
    assert merged.granted.tolist() == group.granted.tolist() == [True, False, True]
    assert group.copy_source.tolist() == [3, nobody, 5] and group.copy_target.tolist() == [7, nobody, 8]
