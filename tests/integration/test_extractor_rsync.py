"""The extractor with a real SSH server and rsync: the whole way, once, and what comes back is mended."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests import outside, ssh_server
from tests.faults.machine import wait_for
from tests.outside import Outside, Template
from tests.ssh_server import SshServer


@pytest.fixture(scope="module")
def made(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with ssh_server.running() as started:
        yield started


@pytest.fixture
def own(made: Template, scratch: Path, server: SshServer) -> Outside:
    """Its destination is a directory of the server's, named by variables alone."""
    own = Outside(made, scratch)
    options = server.options(server.let_in(scratch.name), own.external)
    own.machine.environment |= {
        "EXTERNAL_DIRECTORY": "off",
        "RSYNC_TARGET": options.target,
        "RSYNC_PORT": str(options.port),
        "RSYNC_KEY_FILE": str(options.key_file),
        "RSYNC_KNOWN_HOSTS_FILE": str(options.known_hosts_file),
    }
    return own


def test_everything_is_copied_once_and_what_is_missing_made_anew(own: Outside) -> None:
    assert sorted(own.once()["extracted"]) == own.sources()
    own.assert_whole()
    assert {record["destination_name"] for record in own.audit()} == {"rsync"}
    path = own.source("daily")
    shutil.rmtree(own.copy(path).parent)
    shown = own.once()
    assert (shown["extracted"], shown["repaired"]) == ([], [path])
    own.assert_whole()
    shutil.rmtree(own.extracted)
    assert sorted(own.once()["adopted"]) == own.sources()


def programs_with(text: str) -> list[str]:
    """The processes of this machine, on either side, that were started with that in their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if text.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def test_the_service_ends_soon_with_everything_that_it_started(own: Outside) -> None:
    with own.serving(300) as service:
        wait_for(lambda: programs_with(str(own.external)))
        before = time.monotonic()
        service.terminate()
        assert service.wait(timeout=25) == 0
        assert time.monotonic() - before < 15
        wait_for(lambda: not programs_with(str(own.external)))
    own.assert_no_half_file()


def test_a_server_that_is_away_is_told_of(own: Outside) -> None:
    own.machine.environment["RSYNC_PORT"] = str(ssh_server.free_port())
    shown = own.once(6)
    assert shown["troubles"][0]["hint"]
    assert own.events() == ["extraction failed"]
