"""A machine to break: a tiny database and a vault on a real filesystem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests import clusters
from tests.faults.machine import TABLES, Machine


@pytest.fixture(scope="module")
def database(cluster15: ScratchCluster) -> Iterator[clusters.Database]:
    """The tables of :mod:`tests.faults.machine`, for the tests that only read them."""
    with clusters.temporary_database(cluster15) as own:
        own.execute(TABLES)
        yield own


@pytest.fixture
def machine(scratch: Path, database: clusters.Database) -> Machine:
    """A new vault for one test."""
    return Machine(scratch / "root", database)


@pytest.fixture
def machine_on(database: clusters.Database, loop_filesystem: clusters.LoopFilesystem) -> Callable[..., Machine]:
    """``machine_on(kind, size_mib)``: a vault on a small filesystem of its own."""

    def make(kind: clusters.FilesystemKind, size_mib: int, **environment: str) -> Machine:
        return Machine(loop_filesystem(kind, size_mib) / "root", database, **environment)

    return make
