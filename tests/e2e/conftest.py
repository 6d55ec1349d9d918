"""The session's engine with the stand-in images in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clusters
from tests.e2e import engine as engines
from tests.e2e import images
from tests.e2e.engine import Engine

# The first test of a machine waits for the images to be made.
FIRST_TEST_SECONDS = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(FIRST_TEST_SECONDS))


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker engine with every stand-in image; gone at the end, with everything in it."""
    reason = engines.why_not_here()
    if reason is not None:
        clusters.skip(reason)
    with engines.running() as running:
        images.provide(running)
        yield running
