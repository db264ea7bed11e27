"""What the tests of the store share."""

import logging

import pytest


@pytest.fixture
def warnings(caplog):
    """The warnings of the store so far."""
    caplog.set_level(logging.WARNING, "paged_jax.store")
    return lambda: [record.getMessage() for record in caplog.records]
