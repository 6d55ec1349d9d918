"""What goes wrong between the extractor and a server with rsync: nothing half counts, and what was sent is not lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgkeep.adapters.destinations import rsync_ssh
from pgkeep.errors import StorageError
from pgkeep.progress import Progress, Silent
from tests import ssh_server
from tests.contract.destination_contract import ASIDE, FOLDER, MIB, NAME, PATH, Subject, content_of
from tests.contract.filesystems import opened
from tests.contract.rsync_subject import subject_at
from tests.faults.machine import PROJECT, processes_of
from tests.ssh_server import SshServer

PARTIAL = f"{FOLDER}/.pgkeep-partial/{NAME}"
STEPS = ("store.hashed", "advance", "store.published", "store.compared")
DATA = os.urandom(MIB) * 4
# Slow enough that something can happen meanwhile.
SLOW_KIB = 2048


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    with ssh_server.running() as started:
        yield started


@pytest.fixture(scope="module")
def key(server: SshServer) -> Path:
    return server.let_in("plain")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    directory = tmp_path / "there"
    directory.mkdir()
    return directory


class When(Silent):
    """Does something once part of a file was sent."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do: Callable[[], None] | None = do
        self._sending = False

    def step(self, name: str) -> None:
        self._sending = name == "store.hashed"

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        if self._do is not None and self._sending and len(DATA) // 4 < done_bytes < len(DATA):
            do, self._do = self._do, None
            do()


def store(subject: Subject, progress: Progress, data: bytes = DATA) -> None:
    subject.source.write_bytes(data)
    with subject.destination.opened() as place, opened(subject.source) as source:
        place.store(PATH, source, content_of(data), progress)


def assert_nothing_counts(subject: Subject) -> None:
    assert NAME not in subject.names(FOLDER)
    with subject.destination.opened() as place:
        assert place.sizes({PATH: ""}) == {}
        assert list(place.files(["daily"])) == []


def test_a_connection_that_is_cut_is_taken_up_where_it_was(
    server: SshServer, key: Path, there: Path, tmp_path: Path
) -> None:
    with ssh_server.way_to(server) as way:
        subject = subject_at(server.destination(key, there, port=way.port), there, tmp_path)
        # Some of it is still on its way inside the server's ssh and rsync when both ends hear of the cut.
        way.limit_bytes = len(DATA) * 7 // 8
        with pytest.raises(StorageError, match="has cut the connection"):
            store(subject, Silent())
        way.limit_bytes = None
        wait_until_kept(there)
        assert_nothing_counts(subject)
        way.sent_bytes = 0
        store(subject, Silent())
        assert subject.get(PATH) == DATA
        assert way.sent_bytes < len(DATA) * 3 // 4
        assert not (there / PARTIAL).exists()


def wait_until_kept(there: Path) -> None:
    """The server's end of a connection that was cut may hear of it a little later."""
    deadline = time.monotonic() + 20
    while not (there / PARTIAL).exists():
        assert time.monotonic() < deadline, "nothing was kept"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_is_stopped(
    server: SshServer, key: Path, there: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Shut down, it keeps what came; when it crashes, a temporary file of rsync's is left, which is no copy."""
    subject = subject_at(server.destination(key, there, bandwidth_limit_kib=SLOW_KIB), there, tmp_path)
    try:
        with pytest.raises(StorageError, match="has cut the connection"):
            store(subject, When(lambda: server.stop(number)))
        with pytest.raises(StorageError, match="refuses the connection"):
            store(subject, Silent())
    finally:
        server.start()
    if number == signal.SIGTERM:
        wait_until_kept(there)
    assert (there / PARTIAL).exists() == (number == signal.SIGTERM)
    assert_nothing_counts(subject)
    subject = subject_at(server.destination(key, there), there, tmp_path)
    store(subject, Silent())
    assert subject.get(PATH) == DATA
    left = subject.names(FOLDER) - {NAME}
    assert len(left) == (number == signal.SIGKILL)
    assert all(name.startswith(f".{NAME}.") for name in left)


def test_a_server_that_falls_silent(
    server: SshServer, key: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rsync_ssh, "_ALIVE_SECONDS", 1)
    monkeypatch.setattr(rsync_ssh, "_ALIVE_COUNT", 1)
    with ssh_server.way_to(server) as way:
        limits = {"port": way.port, "bandwidth_limit_kib": SLOW_KIB}
        subject = subject_at(server.destination(key, there, **limits), there, tmp_path)
        with pytest.raises(StorageError, match=r"does not answer|has cut the connection"):
            store(subject, When(lambda: setattr(way, "dead", True)))
        way.dead = False
    wait_until_kept(there)
    assert NAME not in subject.names(FOLDER)


def test_a_server_that_spoils_what_it_has_received(server: SshServer, there: Path, tmp_path: Path) -> None:
    spoil = f"printf X | dd of='{there}/{PATH}' bs=1 seek=4711 conv=notrunc 2>/dev/null"
    script = f'sh -c "$SSH_ORIGINAL_COMMAND"; code=$?; [ ! -e "{there}/{PATH}" ] || {spoil}; exit $code'
    subject = subject_at(server.destination(server.let_in_by_script("spoil", script), there), there, tmp_path)
    with pytest.raises(StorageError, match="gave back other bytes"):
        store(subject, Silent())
    assert subject.get(PATH) != DATA


def test_a_damaged_copy_is_mended_through_a_cut(server: SshServer, key: Path, there: Path, tmp_path: Path) -> None:
    """What is damaged stays where it is until what replaces it is whole."""
    damaged = DATA[:-1]
    with ssh_server.way_to(server) as way:
        subject = subject_at(server.destination(key, there, port=way.port), there, tmp_path)
        subject.put(PATH, os.urandom(1000) + damaged)
        before = subject.get(PATH)
        way.limit_bytes = 20_000
        with pytest.raises(StorageError):
            subject.store(os.urandom(MIB) + DATA, aside=ASIDE)
        assert subject.get(PATH) == before
        way.limit_bytes = None
        subject.store(DATA, aside=ASIDE)
    assert subject.get(PATH) == DATA
    assert subject.get(f"{FOLDER}/{ASIDE}") == before


KILLED = """
import os, signal, sys
from pathlib import Path
from pgkeep.adapters.destinations import Content
from pgkeep.adapters.destinations.rsync import Options, RsyncDestination

target, port, key, known, source, path, size, sha256, at = sys.argv[1:]

class Killed:
    sending = False
    def step(self, name):
        self.sending = name == "store.hashed"
        if name == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def advance(self, done, total):
        if self.sending and total // 4 < done < total and at == "advance":
            os.kill(os.getpid(), signal.SIGKILL)
    def note(self, text): pass
    warn = note

options = Options(target=target, port=int(port), key_file=Path(key), known_hosts_file=Path(known),
                  bandwidth_limit_kib=2048 if at == "advance" else None)
with RsyncDestination(options).opened() as place, open(source, "rb") as file:
    place.store(path, file.fileno(), Content(int(size), sha256), Killed())
"""


@pytest.mark.parametrize("at", STEPS)
def test_killed_at_every_step(server: SshServer, key: Path, there: Path, tmp_path: Path, at: str) -> None:
    subject = subject_at(server.destination(key, there), there, tmp_path)
    subject.source.write_bytes(DATA)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    content, options = content_of(DATA), server.options(key, there)
    files = [str(key), str(server.known_hosts), str(subject.source), PATH]
    command = [sys.executable, "-c", KILLED, options.target, str(options.port), *files]
    environment = os.environ | {"PYTHONPATH": str(PROJECT / "src"), "TMPDIR": str(temporary)}
    done = subprocess.run([*command, str(content.size_bytes), content.sha256, at], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while processes_of(str(temporary)):
        assert time.monotonic() < deadline, processes_of(str(temporary))
        time.sleep(0.02)
    if at == "advance":
        wait_until_kept(there)
    if at in ("store.hashed", "advance"):
        assert_nothing_counts(subject)
        store(subject, Silent())
    assert subject.get(PATH) == DATA
    assert subject.names(FOLDER) == {NAME}


def test_what_a_killed_run_leaves_here_is_removed(
    server: SshServer, key: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold a key. But not what somebody else holds, or has just made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, new = (tmp_path / f"pgkeep-rsync-{name}" for name in ("left", "new"))
    for directory in (left, new):
        directory.mkdir()
        (directory / "key").touch()
    os.utime(left, (1, 1))
    destination = server.destination(key, there)
    with destination.opened():
        (held,) = set(tmp_path.glob("pgkeep-rsync-*")) - {new}
        os.utime(held, (1, 1))
        with destination.opened():
            assert held.exists()
            assert len(list(tmp_path.glob("pgkeep-rsync-*"))) == 3
    assert set(tmp_path.glob("pgkeep-rsync-*")) == {new}
