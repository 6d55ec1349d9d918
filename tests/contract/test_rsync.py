"""What every destination does, by rsync: with an account that ``rrsync -no-del`` restricts on the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ssh_server
from tests.contract.destination_contract import DestinationContract, Subject
from tests.contract.rsync_subject import subject_at
from tests.ssh_server import SshServer


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with ssh_server.running() as started:
        yield started


@pytest.fixture(scope="module")
def account(server: SshServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Its key, and the one directory that it sees."""
    directory = tmp_path_factory.mktemp("restricted")
    return server.let_in("restricted", f"{ssh_server.need_rrsync()} -no-del {directory}"), directory


@pytest.fixture
def subject(server: SshServer, account: tuple[Path, Path], tmp_path: Path) -> Subject:
    key, seen = account
    directory = seen / tmp_path.name
    directory.mkdir()
    return subject_at(server.destination(key, f"/{tmp_path.name}"), directory, tmp_path)


class TestContract(DestinationContract):
    pass
