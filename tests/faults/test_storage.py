"""Disks that fill up, filesystems of every kind, and rights that are missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import clusters
from tests.clusters import FilesystemKind, LoopFilesystem, NewDatabase
from tests.faults.machine import RESERVE, WITHOUT_CAPABILITY, Machine, Result, flags_of, is_flagged, names_in

MIB = 1 << 20
ROOM = "make room on it"


@contextlib.contextmanager
def filled(filesystem: Path, leave_bytes: int) -> Iterator[None]:
    """So many bytes are left in the body: root's reserve included, so nothing at all for 0."""
    ballast = filesystem / "ballast"
    with ballast.open("wb") as file:
        _leave(filesystem, file.fileno(), leave_bytes)
        if leave_bytes == 0:
            _write_until_full(file.fileno())
    try:
        yield
    finally:
        ballast.unlink()


def _leave(filesystem: Path, ballast: int, leave_bytes: int) -> None:
    """XFS gives back the room of removed files a moment later: until nothing more comes."""
    taken_bytes, quiet = 0, 0
    while quiet < 5:
        left = os.statvfs(filesystem)
        surplus_bytes = left.f_bfree * left.f_frsize - leave_bytes
        quiet += 1
        if surplus_bytes >= left.f_frsize:
            with contextlib.suppress(OSError):
                os.posix_fallocate(ballast, taken_bytes, surplus_bytes)
                taken_bytes, quiet = taken_bytes + surplus_bytes, 0
        time.sleep(0.02)


def _write_until_full(descriptor: int) -> None:
    os.lseek(descriptor, 0, os.SEEK_END)
    for block in (65536, 4096, 512, 1):
        with contextlib.suppress(OSError):
            while os.write(descriptor, b"\1" * block):
                pass


@pytest.fixture(scope="module")
def wide_database(session_clusters: clusters.Clusters) -> Iterator[clusters.Database]:
    """About 6 MiB of text that does not compress to less than 3."""
    with clusters.temporary_database(session_clusters.get(15)) as database:
        database.execute(
            "CREATE TABLE wide AS SELECT n, (SELECT string_agg(md5(n::text || k), '') FROM generate_series(1, 30) AS k)"
            " AS t FROM generate_series(1, 6000) AS n"
        )
        yield database


def _assert_full(result: Result, place: Path) -> None:
    assert result.code == 6, result
    assert "Traceback" not in result.stderr
    assert "bytes" in result.stderr
    assert "free" in result.stderr
    assert str(place) in result.stderr, result.stderr
    assert ROOM in result.stderr or "enlarge the disk" in result.stderr


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_full_disk_wherever_it_shows(
    loop_filesystem: LoopFilesystem, wide_database: clusters.Database, kind: FilesystemKind
) -> None:
    """From no space at all up to just too little: pg_dump, compression, assembly, the sealed copy fail in turn."""
    filesystem = loop_filesystem(kind, clusters.SMALLEST_MIB[kind] + 48)
    machine = Machine(filesystem / "root", wide_database)
    machine.backup()
    before = machine.identifiers()
    failed_at = set()
    for left in (0, 256 * 1024, MIB, 3 * MIB, 5 * MIB, 7 * MIB, 8 * MIB, 9 * MIB, 10 * MIB):
        with filled(filesystem, left):
            result = machine.run("backup", "daily")
            if result.code:
                _assert_full(result, machine.root)
                failed_at.add(left)
            assert names_in(machine.layout.staging) == []
            assert set(names_in(machine.layout.incoming)) <= set(RESERVE)
            machine.assert_whole()
            assert set(before) <= set(machine.identifiers())
            assert (len(machine.identifiers()) > len(before)) == (result.code == 0)
            before = machine.identifiers()
        machine.audit()
    assert {0, MIB} <= failed_at
    machine.backup()
    machine.assert_at_rest()
    machine.assert_whole()


def test_staging_alone_is_full(
    scratch: Path, loop_filesystem: LoopFilesystem, wide_database: clusters.Database
) -> None:
    """Staging on a filesystem of its own; the vault beside it is on another, and works."""
    root = scratch / "root"
    root.mkdir()
    small = loop_filesystem("ext4", 24)
    (root / "staging").symlink_to(small)
    machine = Machine(root, wide_database)
    shutil.rmtree(small / "lost+found")
    machine.backup()
    for spool in ("never", "always"):
        for left in (0, 2 * MIB, 4 * MIB):
            with filled(small, left):
                result = machine.run("backup", environment={"BACKUP_SPOOL_COMPRESSION": spool})
                _assert_full(result, machine.layout.staging)
                assert names_in(small) == ["ballast"]
            machine.assert_at_rest()
    assert len(machine.identifiers()) == 1
    machine.backup()
    assert machine.events(machine.identifiers()[0]) == ["sealed"]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_active_is_a_filesystem_of_its_own(
    scratch: Path, loop_filesystem: LoopFilesystem, wide_database: clusters.Database, kind: FilesystemKind
) -> None:
    """Staging, logs and state are elsewhere; what mkfs leaves there (lost+found) is no stranger."""
    volume = loop_filesystem(kind, max(32, clusters.SMALLEST_MIB[kind]))
    machine = Machine(scratch / "root", wide_database)
    (machine.root / "active").mkdir(parents=True)
    subprocess.run(["mount", "--bind", volume, machine.layout.active], check=True)
    try:
        machine.backup()
        for left in (0, 64 * 1024, 2 * MIB):
            subprocess.run(["chattr", "-i", volume], check=True)
            with filled(volume, left):
                _assert_full(machine.run("backup", environment={"PGKEEP_RESERVE": "1MiB"}), machine.layout.active)
                subprocess.run(["chattr", "-i", volume], check=True)
            assert names_in(machine.layout.staging) == []
            assert len(machine.identifiers()) == 1
        assert "reserve" in machine.run("backup", environment={"PGKEEP_RESERVE": "10GiB"}).must(6).stderr
        machine.backup()
        machine.assert_whole()
        assert is_flagged(machine.layout.active)
        assert names_in(machine.layout.incoming) == RESERVE
        assert names_in(machine.layout.journal) == []
    finally:
        subprocess.run(["umount", machine.layout.active], check=True)


def test_the_audit_log_has_no_room(scratch: Path, loop_filesystem: LoopFilesystem, database: clusters.Database) -> None:
    """A record that is cut off by a full disk spoils nothing that is written after it."""
    machine = Machine(scratch / "root", database)
    machine.root.mkdir()
    logs = loop_filesystem("ext4", 2)
    subprocess.run(["mount", "--bind", logs, _made(machine.layout.logs)], check=True)
    try:
        machine.backup()
        with filled(logs, 0):
            result = next(run for run in (machine.run("backup") for _ in range(40)) if run.code)
        _assert_full(result, machine.layout.audit)
        assert "is whole and sealed all the same" in result.stderr or "the next run will" in result.stderr
        machine.assert_whole()
        machine.backup()
        assert names_in(machine.layout.journal) == []
        lines = machine.layout.audit.read_text().splitlines()
        sealed = [line for line in lines if '"event":"sealed"' in line and line.endswith("}")]
        assert len(sealed) == len(machine.identifiers())
    finally:
        subprocess.run(["umount", machine.layout.logs], check=True)


def test_logs_on_a_filesystem_without_flags(
    scratch: Path, loop_filesystem: LoopFilesystem, database: clusters.Database
) -> None:
    """The backups are as protected as ever, the log is not, and that is said."""
    machine = Machine(scratch / "root", database)
    logs = loop_filesystem("exfat", 8)
    subprocess.run(["mount", "--bind", logs, _made(machine.layout.logs)], check=True)
    try:
        result = machine.run("backup", "--json").must()
        assert "the audit log can't be made append-only" in result.stderr
        assert result.json["protection"] == "chattr"
        assert [record["event"] for record in machine.audit()] == ["sealed"]
    finally:
        subprocess.run(["umount", machine.layout.logs], check=True)


def test_cleanup_makes_room_on_a_full_disk(loop_filesystem: LoopFilesystem, wide_database: clusters.Database) -> None:
    settings = {"BACKUP_RETENTION_HOURLY_DAYS": "1", "BACKUP_RETENTION_KEEP_MINIMUM": "1"}
    filesystem = loop_filesystem("xfs", 300)
    machine = Machine(filesystem / "root", wide_database, **settings)
    machine.backup()
    aged = machine.backup("hourly", days_ago=5)["id"]
    with filled(filesystem, 0):
        machine.run("cleanup").must()
        assert aged not in machine.identifiers()
        assert machine.events(aged)[-1] == "expired"
        machine.assert_at_rest()


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


# ---------------------------------------------------------------- kinds of filesystem


def _attacks(path: Path) -> dict[str, Callable[[], object]]:
    other = path.with_name("another-name")
    return {
        "write": lambda: path.open("r+b").close(),
        "truncate": lambda: os.truncate(path, 0),
        "append": lambda: path.open("ab").close(),
        "rename": lambda: path.rename(other),
        "unlink": path.unlink,
        "link": lambda: other.hardlink_to(path),
        "chmod": lambda: path.chmod(0o666),
        "new name": lambda: path.with_name("new").touch(),
        "rename directory": lambda: path.parent.rename(path.parent.with_name("moved")),
    }


def _survivors(path: Path) -> list[str]:
    """The attacks by root that were not refused."""
    went_through = []
    for name, attack in _attacks(path).items():
        try:
            attack()
        except PermissionError:
            continue
        went_through.append(name)
    return went_through


PROMISES = {"ext4": "chattr", "xfs": "chattr", "btrfs": "chattr", "tmpfs": "chattr", "ntfs": "none", "exfat": "none"}


@pytest.mark.parametrize("kind", PROMISES)
def test_every_kind_of_filesystem(
    machine_on: Callable[..., Machine], new_database: NewDatabase, kind: FilesystemKind
) -> None:
    settings = {"BACKUP_RETENTION_HOURLY_DAYS": "1", "BACKUP_RETENTION_KEEP_MINIMUM": "1"}
    machine = machine_on(kind, max(32, clusters.SMALLEST_MIB[kind]), BACKUP_GLOBALS="auto", **settings)
    result = machine.run("backup", "daily", "--json").must()
    assert result.json["protection"] == PROMISES[kind]
    assert ("not protected at all" in result.stderr) == (PROMISES[kind] == "none")
    assert [each["protection"] for each in machine.run("list", "--json").must().json] == [PROMISES[kind]]
    assert machine.run("verify", "--all", "--json").must().json["ok"]
    target = new_database(machine.database.cluster)
    machine.run("restore", "latest", "--to", target.conninfo).must()
    assert target.value("SELECT count(*) FROM shop.orders") == 2000
    machine.backup("hourly", days_ago=5)
    shown = machine.run("cleanup", "--json").must().json
    assert [Path(each["path"]).parent.name for each in shown if not each["keep"]].count("hourly") == 1
    assert names_in(machine.layout.active / "hourly") == []
    machine.assert_whole()
    if PROMISES[kind] == "chattr":
        machine.assert_at_rest()
        for suffix in ("", ".sha256", ".manifest.json"):
            assert _survivors(Path(result.json["path"] + suffix)) == []
    assert machine.run("backup", action="kill", at="seal.linked.manifest.json").code == -9
    assert machine.run("backup", action="kill", at="seal.linked-dump").code == -9
    machine.backup()
    machine.assert_whole()
    assert names_in(machine.layout.journal) == []
    assert names_in(machine.layout.incoming) == RESERVE
    assert names_in(machine.layout.quarantine) == []


def test_mode_is_what_it_says(machine: Machine) -> None:
    """Weaker by wish: said each time, listed as such, and modes are as promised."""
    wish = {"PGKEEP_PROTECTION": "mode"}
    result = machine.run("backup", "--json", environment=wish).must()
    assert result.json["protection"] == "mode"
    assert "weaker" in result.stderr
    machine.environment |= wish
    machine.run("backup").must()
    machine.assert_at_rest(chattr=False)
    for directory in (machine.layout.active, machine.layout.active / "manual"):
        assert directory.stat().st_mode & 0o777 == 0o555
        assert "i" not in flags_of(directory)
    dump = Path(result.json["path"])
    dump.chmod(0o660)
    shown = machine.run("list", "--json").must(7)
    assert "has become writable" in shown.stderr
    assert shown.json[0]["state"] == "unprotected"


def test_a_read_only_root(machine: Machine) -> None:
    """Reading goes on; whatever would change something says why it can't."""
    machine.backup()
    subprocess.run(["mount", "--bind", machine.root, machine.root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", machine.root], check=True)
        for verb in ("backup", "cleanup"):
            assert "read-only" in machine.run(verb).must(6).stderr
        assert len(machine.run("list", "--json").must().json) == 1
        assert machine.run("verify", "latest", "--json").must().json["ok"]
    finally:
        subprocess.run(["umount", machine.root], check=True)
    machine.backup()
    machine.assert_at_rest()


def test_root_without_the_capability(machine: Machine) -> None:
    result = machine.run("backup", under=WITHOUT_CAPABILITY).must(6)
    assert "CAP_LINUX_IMMUTABLE" in result.stderr
    assert "cap_add: [LINUX_IMMUTABLE]" in result.stderr
    # Nothing was begun that stands in the way of going on with less, or with the capability.
    wish = {"PGKEEP_PROTECTION": "mode"}
    shown = machine.run("backup", "--json", under=WITHOUT_CAPABILITY, environment=wish).must().json
    assert shown["protection"] == "mode"
    assert machine.backup()["protection"] == "chattr"
    for environment in ({}, wish):
        assert "cap_add" in machine.run("backup", under=WITHOUT_CAPABILITY, environment=environment).must(6).stderr
    assert len(machine.identifiers()) == 2
    machine.assert_at_rest(chattr=False)
