"""Reading back over SSH, with a key that may only read, on a machine that has nothing of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters.destinations.directory import DirectoryDestination
from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests import elsewhere, ssh_server
from tests.elsewhere import Source, bare_machine, copy_out
from tests.integration.keeper import bytes_digest, fresh_name
from tests.ssh_server import SshServer


@pytest.fixture(scope="module")
def source(cluster15: ScratchCluster) -> Iterator[Source]:
    with elsewhere.source(cluster15) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with ssh_server.running() as running:
        yield running


def test_a_machine_with_nothing_reads_everything_back(source: Source, server: SshServer, scratch: Path) -> None:
    directory = scratch / "copies"
    directory.mkdir()
    copy_out(source, DirectoryDestination(directory, 0o444, scratch / "no-vault"))
    key = server.let_in("reader")
    machine = bare_machine(source, scratch, RSYNC_KEY_FILE=str(key), RSYNC_KNOWN_HOSTS_FILE=str(server.known_hosts))
    place = f"ssh://root@127.0.0.1:{server.port}{directory}"
    listed = machine.json("list", "--from", place, "--globals")
    assert [each["kind"] for each in listed] == ["database", "globals", "database"]
    verified = machine.json("verify", "--all", "--deep", "--from", place)
    assert (verified["ok"], len(verified["backups"])) == (True, 3)
    got = machine.json("fetch", "latest", "--from", place, "--to", scratch / "to")
    assert bytes_digest(Path(got["path"])) == source.second["sha256"]
    with fresh_name(source.database.cluster) as target:
        machine.json("restore", source.first["id"], "--from", place, "--to", target.conninfo, "--create", "--table",
                     "shop.orders")  # fmt: skip
        assert target.value("SELECT count(*) FROM shop.orders") == 3000
    assert not machine.root.exists()
