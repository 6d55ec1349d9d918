"""The extractor against a server with rsync: the whole way, with the command line, and kills on it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.progress import Silent
from tests import outside, ssh_server
from tests.outside import Outside, Template, spoil
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
def own(made: Template, server: SshServer, scratch: Path) -> Outside:
    """One backup to copy, to an account that may not delete; the server's directory is ``external``."""
    made_here = Outside(made, scratch, None, "daily")
    key = server.let_in(scratch.name, f"{ssh_server.need_rrsync()} -no-del {made_here.external}")
    (scratch / "temporary").mkdir()
    made_here.machine.environment |= {
        # What a killed pass leaves of it goes with the test.
        "TMPDIR": str(scratch / "temporary"),
        "EXTERNAL_DIRECTORY": "off",
        "RSYNC_TARGET": "root@127.0.0.1:/",
        "RSYNC_PORT": str(server.port),
        "RSYNC_KEY_FILE": str(key),
        "RSYNC_KNOWN_HOSTS_FILE": str(server.known_hosts),
    }
    return made_here


def test_killed_pass_after_pass(own: Outside) -> None:
    """At every step that a file goes through on its way, and at last all is whole, and each copy there once."""
    steps = ["store.hashed", "store.published", "store.compared", "extract.copied", "extract.audited"]
    for step in steps:
        assert own.machine.run("extractor", "once", action="kill", at=step).code == -9
        own.assert_no_half_file()
    own.once()
    own.assert_whole()
    assert own.events(own.source("daily"))[-1] in ("extracted", "adopted")


def test_a_wrong_bit_is_found_and_mended(own: Outside) -> None:
    own.extractor().run_pass(Silent())
    path = own.source("daily")
    spoil(own.copy(path))
    subprocess.run(["rm", "-r", own.extracted], check=True)
    own.extractor().run_pass(Silent())
    aside = {name for name in own.files() if ".damaged-" in name}
    assert len(aside) == 1
    assert own.files() - aside == own.expected(path)
    own.assert_no_half_file()
    assert "repaired" in own.events(path)


def test_what_is_gone_there_is_copied_again(own: Outside) -> None:
    own.extractor().run_pass(Silent())
    own.copy(own.source("daily")).unlink()
    report = own.extractor().run_pass(Silent())
    assert report.repaired == [own.source("daily")]
    own.assert_whole()
