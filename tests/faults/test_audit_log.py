"""The audit log on real disks: crashes, torn writes, full disks, and files that are not what they should be."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgkeep.domain import audit
from pgkeep.errors import RefusedError, StorageError
from pgkeep.vault import audit_log
from pgkeep.vault.layout import Layout, Vault
from tests import clusters
from tests.clusters import LoopFilesystem
from tests.faults.machine import PROJECT, flags_of

# Run in a process of its own: the n-th call that changes something is its last.
DIES = """
import fcntl, os, signal, sys
from pathlib import Path
from pgkeep.vault import audit_log
from pgkeep.vault.layout import Layout, Vault

root, nth, tear, identifier = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
calls = 0

def told_of(call):
    def wrapped(*arguments, **more):
        global calls
        result = call(*arguments, **more)
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def torn(descriptor, data, write=os.write):
    write(descriptor, bytes(data)[:tear])
    os.kill(os.getpid(), signal.SIGKILL)

if tear >= 0:
    os.write = torn
else:
    for module, name in ((os, "open"), (fcntl, "ioctl"), (os, "write"), (os, "fsync")):
        setattr(module, name, told_of(getattr(module, name)))
audit_log.record(Vault(Layout(root), "chattr"), "sealed", id=identifier)
print(calls)
"""


@pytest.fixture
def vault(scratch: Path) -> Vault:
    """Only its logs/ exists: the audit log asks for no more."""
    clusters.need_root("append-only flags")
    return made(scratch / "root")


def made(root: Path) -> Vault:
    vault = Vault(Layout(root), "chattr")
    vault.layout.logs.mkdir(parents=True)
    return vault


def record_and_die(vault: Vault, identifier: str, *, nth: int = 0, tear: int = -1) -> subprocess.CompletedProcess[str]:
    arguments = [str(vault.layout.root), str(nth), str(tear), identifier]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", DIES, *arguments],
        env=os.environ | {"PYTHONPATH": str(PROJECT / "src")},
        capture_output=True,
        text=True,
        timeout=30,
    )


def identifiers(vault: Vault) -> list[str]:
    """Of the whole records, in order; the chain must hold."""
    found = audit_log.examine(vault.layout.audit)
    assert found.problems == ()
    lines = [line for line in vault.layout.audit.read_bytes().split(b"\n") if line[-1:] == b"}"]
    assert found.records == len(lines)
    return [json.loads(line)["id"] for line in lines]


def appended(vault: Vault, data: bytes) -> None:
    """As a write leaves it that was cut off."""
    with vault.layout.audit.open("ab") as file:
        file.write(data)


def test_killed_after_every_call(vault: Vault) -> None:
    done = record_and_die(vault, "first")
    assert done.returncode == 0, done.stderr
    calls = int(done.stdout)
    assert calls >= 4
    for number in range(1, calls + 3):
        (ended,) = {record_and_die(vault, f"killed {number}", nth=number).returncode}
        assert ended in (-signal.SIGKILL, 0)
        audit_log.record(vault, "sealed", id=f"after {number}")
        assert "a" in flags_of(vault.layout.audit)
    found = identifiers(vault)
    assert [each for each in found if each.startswith("after")] == [f"after {n}" for n in range(1, calls + 3)]
    assert len(found) == len(set(found)) > calls + 3


def test_killed_after_every_call_of_the_first_record(scratch: Path) -> None:
    clusters.need_root("append-only flags")
    for number in range(1, 8):
        vault = made(scratch / f"root-{number}")
        record_and_die(vault, "killed", nth=number)
        audit_log.record(vault, "sealed", id="after")
        assert identifiers(vault) in (["after"], ["killed", "after"])
        assert "a" in flags_of(vault.layout.audit)


def test_torn_anywhere(vault: Vault) -> None:
    """A prefix of any length stays as a line of its own, and the next record says what it is."""
    audit_log.record(vault, "sealed", id="first")
    line = vault.layout.audit.read_bytes().replace(b"first", b"torn!")
    for length in [*range(1, 12), *range(12, len(line) - 2, 17), len(line) - 2]:
        appended(vault, line[:length])
        audit_log.record(vault, "sealed", id=f"after {length}")
        last = json.loads(vault.layout.audit.read_bytes().splitlines()[-1])
        assert last["torn"] is True
        assert last["previous"] == audit.line_digest(line[:length])
    assert "torn!" not in identifiers(vault)


def test_killed_in_the_middle_of_the_write(vault: Vault) -> None:
    audit_log.record(vault, "sealed", id="first")
    for tear in (0, 1, 40, 10_000):
        assert record_and_die(vault, f"torn at {tear}", tear=tear).returncode == -signal.SIGKILL
        assert not audit_log.holds(vault, "sealed", "torn at 40")
        audit_log.record(vault, "sealed", id=f"after {tear}")
    assert identifiers(vault) == ["first", "after 0", "after 1", "after 40", "torn at 10000", "after 10000"]


def test_a_whole_record_that_lacks_only_its_newline_is_not_called_torn(vault: Vault) -> None:
    audit_log.record(vault, "sealed", id="first")
    line = audit.encode(audit.link([vault.layout.audit.read_bytes()[:-1]]), {"event": "sealed"}, {"id": "second"})
    appended(vault, line[:-1])
    audit_log.record(vault, "sealed", id="third")
    assert identifiers(vault) == ["first", "second", "third"]
    assert audit_log.examine(vault.layout.audit).notes == ()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_full_disk_leaves_a_chain_that_can_be_mended(
    scratch: Path, loop_filesystem: LoopFilesystem, kind: clusters.FilesystemKind
) -> None:
    vault = Vault(Layout(loop_filesystem(kind, clusters.SMALLEST_MIB[kind]) / "root"), "chattr")
    vault.layout.logs.mkdir(parents=True)
    audit_log.record(vault, "sealed", id="first")
    ballast = vault.layout.root / "ballast"
    for reason_bytes in (3000, 10, 700):
        # ext4 takes as much of a write as fits into the page that it has room for.
        while vault.layout.audit.stat().st_size % 4096 < 3300:
            audit_log.record(vault, "sealed", id="filling")
        with ballast.open("wb") as file:
            fill(file.fileno())
        kept = identifiers(vault)
        error = recorded_until_it_fails(vault, "x" * reason_bytes)
        assert error.message.endswith("are free)")
        assert "the disk is full" in error.message
        ballast.unlink()
        audit_log.record(vault, "sealed", id=f"after {reason_bytes}")
        found = identifiers(vault)
        assert found[: len(kept)] == kept
        assert found[-1] == f"after {reason_bytes}"
    assert "a" in flags_of(vault.layout.audit)
    assert audit_log.examine(vault.layout.audit).notes, "no write was ever torn: the test tries nothing"


def recorded_until_it_fails(vault: Vault, reason: str) -> StorageError:
    for number in range(10_000):
        try:
            audit_log.record(vault, "sealed", id=f"{len(reason)}-{number}", reason=reason)
        except StorageError as error:
            return error
    pytest.fail("it never failed")


def fill(descriptor: int) -> None:
    """Until not one byte more is taken."""
    for block in (1 << 20, 65536, 4096, 512, 1):
        with contextlib.suppress(OSError):
            while os.write(descriptor, b"\1" * block):
                pass


def test_a_log_from_before_the_chain(vault: Vault) -> None:
    old = b"".join(b'{"time":"2026-01-31T23:59:59Z","event":"sealed","id":"old %d"}\n' % n for n in range(3000))
    vault.layout.audit.write_bytes(old)
    assert audit_log.holds(vault, "sealed", "old 2999")
    audit_log.record(vault, "sealed", id="new")
    audit_log.record(vault, "sealed", id="newer")
    found = audit_log.examine(vault.layout.audit)
    assert (found.problems, found.lines, found.records, found.sequence) == ((), 3002, 2, 2)
    assert vault.layout.audit.read_bytes().startswith(old)


def test_a_large_log_costs_no_more_than_a_small_one(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    audit_log.record(vault, "sealed", id="first")
    line = vault.layout.audit.read_bytes()
    subprocess.run(["chattr", "-a", vault.layout.audit], check=True)
    with vault.layout.audit.open("ab") as file:
        for _ in range(200):
            file.write(line * 2000)
    read_bytes = 0
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal read_bytes
        data = pread(descriptor, length, offset)
        read_bytes += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    assert vault.layout.audit.stat().st_size > 50_000_000
    audit_log.record(vault, "sealed", id="last")
    assert 0 < read_bytes <= 70_000
    assert audit_log.holds(vault, "sealed", "last")
    assert read_bytes <= 140_000
    read_bytes = 0
    assert not audit_log.holds(vault, "sealed", "never")
    assert read_bytes <= audit_log.SEARCHED_BYTES + 70_000


def test_a_line_of_many_megabytes_is_one_torn_line(vault: Vault) -> None:
    audit_log.record(vault, "sealed", id="first")
    appended(vault, b"{" * 5_000_000)
    audit_log.record(vault, "sealed", id="second")
    appended(vault, b"[" * 3_000_000 + b"\n")
    audit_log.record(vault, "sealed", id="third")
    assert identifiers(vault) == ["first", "second", "third"]
    assert [note.line for note in audit_log.examine(vault.layout.audit).notes] == [2, 4]


LINES = st.lists(
    st.one_of(
        st.binary(max_size=5).map(lambda data: data.replace(b"\n", b"")),
        st.sampled_from([0, 1, 65_534, 65_535, 65_536, 65_537, 131_072]).map(lambda length: b"y" * length),
    ),
    max_size=6,
)


@settings(max_examples=60)
@given(lines=LINES, ends_with_newline=st.booleans())
def test_backwards_is_forwards_turned_round(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends_with_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_bytes(b"\n".join(lines) + b"\n" * (ends_with_newline and bool(lines)))
    forwards = [line.removesuffix(b"\n") for line in audit_log.lines_of(path)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert list(audit_log._newest_first(descriptor)) == forwards[::-1]
    finally:
        os.close(descriptor)
    assert b"\n".join(forwards) == path.read_bytes().removesuffix(b"\n")


# what is not our log


def make_link(path: Path) -> Path:
    target = path.parent.parent / "outside"
    target.write_text("mine")
    path.symlink_to(target)
    return target


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        # A socket's path is short: bound from its own directory.
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir(path.parent)
            server.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)


STRANGERS: dict[str, Callable[[Path], Any]] = {
    "link": make_link,
    "dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "FIFO": os.mkfifo,
    "directory": Path.mkdir,
    "socket": make_socket,
    "device": lambda path: os.mknod(path, 0o20666, os.makedev(1, 3)),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_is_no_file_is_refused_at_once(vault: Vault, kind: str) -> None:
    outside = STRANGERS[kind](vault.layout.audit)
    for attempt in (
        lambda: audit_log.record(vault, "sealed", id="x"),
        lambda: audit_log.holds(vault, "sealed", "x"),
        lambda: audit_log.examine(vault.layout.audit),
    ):
        with pytest.raises(RefusedError, match=r"backup_audit\.jsonl") as caught:
            attempt()
        assert "move it away" in caught.value.hint
    assert not (vault.layout.logs / "nowhere").exists()
    if isinstance(outside, Path):
        assert outside.read_text() == "mine"


def test_another_users_file_is_refused(vault: Vault) -> None:
    """Root could write to it, and so could its owner."""
    vault.layout.audit.write_bytes(b"")
    os.chown(vault.layout.audit, 10001, 10001)
    with pytest.raises(RefusedError, match="belongs to uid 10001"):
        audit_log.record(vault, "sealed", id="x")
    assert vault.layout.audit.read_bytes() == b""
    # Where the whole directory is theirs, root works on their vault.
    os.chown(vault.layout.logs, 10001, 10001)
    audit_log.record(vault, "sealed", id="x")
    assert identifiers(vault) == ["x"]


def test_no_log_is_an_empty_one(vault: Vault) -> None:
    assert not audit_log.holds(vault, "sealed", "x")
    assert audit_log.examine(vault.layout.audit).lines == 0


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KiB: a write stops there half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_no_descriptor_is_left_open_by_a_failure(vault: Vault, small_files: None) -> None:
    before = len(os.listdir("/proc/self/fd"))
    recorded_until_it_fails(vault, "")
    assert vault.layout.audit.stat().st_size == 4096
    assert len(os.listdir("/proc/self/fd")) == before


def test_others_may_hold_any_lock_on_it(vault: Vault) -> None:
    """The log is readable to all: a lock that a reader holds must not stop the vault."""
    audit_log.record(vault, "sealed", id="first")
    with vault.layout.audit.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_EX)
        audit_log.record(vault, "sealed", id="second")
    assert identifiers(vault) == ["first", "second"]
