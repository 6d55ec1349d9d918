"""Fixtures that every directory of tests shares; what they do is in :mod:`tests.clusters`."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests import clusters
from tests.clusters import AWKWARD_TEMPLATE, MAJORS, Clusters, Database, LoopFilesystem, NewDatabase


def pytest_configure() -> None:
    """Under nohup, or in the background of a shell, programs that tests start would ignore what tests send them."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    # A change fails for what it changes: the same examples in every run, others with --hypothesis-profile=explore.
    # How long one example takes says something of the machine's other work only.
    hypothesis.settings.register_profile("pgkeep", derandomize=True, deadline=None)
    hypothesis.settings.register_profile("explore", deadline=None)
    hypothesis.settings.load_profile("pgkeep")


@pytest.fixture(scope="session")
def session_clusters() -> Iterator[Clusters]:
    started = Clusters()
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="session")
def cluster15(session_clusters: Clusters) -> ScratchCluster:
    return session_clusters.get(15)


@pytest.fixture(scope="session")
def cluster16(session_clusters: Clusters) -> ScratchCluster:
    return session_clusters.get(16)


@pytest.fixture(scope="session")
def cluster18(session_clusters: Clusters) -> ScratchCluster:
    return session_clusters.get(18)


@pytest.fixture(scope="session", params=MAJORS, ids=lambda major: f"pg{major}")
def any_cluster(request: pytest.FixtureRequest, session_clusters: Clusters) -> ScratchCluster:
    """Runs the test once on each major."""
    return session_clusters.get(request.param)


@pytest.fixture
def new_database() -> Iterator[NewDatabase]:
    """``new_database(cluster, template=..., name=...)``: databases that go with the test."""
    with contextlib.ExitStack() as stack:

        def create(cluster: ScratchCluster, **options: str) -> Database:
            return stack.enter_context(clusters.temporary_database(cluster, **options))

        yield create


@pytest.fixture
def fresh_database(any_cluster: ScratchCluster) -> Iterator[str]:
    """The conninfo of an empty database of one's own, once on each major."""
    with clusters.temporary_database(any_cluster) as database:
        yield database.conninfo


@pytest.fixture
def awkward15(session_clusters: Clusters) -> Iterator[Database]:
    """A copy of the awkward database, free to change."""
    with clusters.temporary_database(session_clusters.get_with_awkward_template(15), template=AWKWARD_TEMPLATE) as own:
        yield own


@pytest.fixture
def awkward16(session_clusters: Clusters) -> Iterator[Database]:
    """As ``awkward15``."""
    with clusters.temporary_database(session_clusters.get_with_awkward_template(16), template=AWKWARD_TEMPLATE) as own:
        yield own


@pytest.fixture
def awkward18(session_clusters: Clusters) -> Iterator[Database]:
    """As ``awkward15``."""
    with clusters.temporary_database(session_clusters.get_with_awkward_template(18), template=AWKWARD_TEMPLATE) as own:
        yield own


@pytest.fixture(params=MAJORS, ids=lambda major: f"pg{major}")
def any_awkward(request: pytest.FixtureRequest, session_clusters: Clusters) -> Iterator[Database]:
    """A copy of the awkward database, once on each major."""
    cluster = session_clusters.get_with_awkward_template(request.param)
    with clusters.temporary_database(cluster, template=AWKWARD_TEMPLATE) as own:
        yield own


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory on a real filesystem; flags set in it are cleared before it is removed."""
    with clusters.scratch_directory() as directory:
        yield directory


@pytest.fixture
def loop_filesystem() -> Iterator[LoopFilesystem]:
    """``loop_filesystem(kind, size_mib) -> Path``: small filesystems of every kind; needs root."""
    with contextlib.ExitStack() as stack:

        def mount(kind: clusters.FilesystemKind, size_mib: int) -> Path:
            return stack.enter_context(clusters.mounted_filesystem(kind, size_mib))

        yield mount
