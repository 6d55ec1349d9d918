"""What tests stand on: real servers, databases of their own, real filesystems; and skips that can't go unnoticed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import psycopg
import pytest
from psycopg import sql

from pgkeep.adapters import pgbinaries, process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.demo import awkward

MAJORS = (15, 16, 18)
AWKWARD_TEMPLATE = "awkward_template"
# The awkward database of the tests: as large as the demo's, so that it still has tables of many chunks.
AWKWARD_ROWS = 200_000
REQUIRED_VARIABLE = "TESTS_REQUIRED"
SCRATCH_VARIABLE = "TESTS_SCRATCH"
FilesystemKind = Literal["ext4", "xfs", "btrfs", "tmpfs", "ntfs", "exfat"]
SMALLEST_MIB: dict[FilesystemKind, int] = {"ext4": 2, "xfs": 300, "btrfs": 110, "tmpfs": 1, "ntfs": 2, "exfat": 2}
_CAP_SYS_ADMIN = 21
_UNMOUNT_SECONDS = 5.0


def skip(reason: str, *, could_run_here: bool | None = None) -> NoReturn:
    """Skip this test and say why; with ``TESTS_REQUIRED=1`` fail instead, where it could have run.

    ``could_run_here`` None: it could, if we are root.
    """
    possible = os.geteuid() == 0 if could_run_here is None else could_run_here
    if possible and os.environ.get(REQUIRED_VARIABLE) == "1":
        pytest.fail(f"{REQUIRED_VARIABLE}=1, and this was about to be skipped: {reason}")
    pytest.skip(reason)


def need_root(what_for: str) -> None:
    """Skip, loudly, unless we are root."""
    if os.geteuid() != 0:
        skip(f"needs root: {what_for}")


class Clusters:
    """The session's servers, one a major, started when first asked for."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._started: dict[int, ScratchCluster] = {}
        self._with_template: set[int] = set()

    def get(self, major: int) -> ScratchCluster:
        if major not in self._started:
            if not any(each.major == major and each.has_server for each in pgbinaries.find_installations()):
                skip(f"needs a PostgreSQL {major} server", could_run_here=True)
            self._started[major] = self._stack.enter_context(ScratchCluster(major))
        return self._started[major]

    def get_with_awkward_template(self, major: int) -> ScratchCluster:
        """The server, with the awkward database in ``AWKWARD_TEMPLATE``: copy it, leave it as it is."""
        cluster = self.get(major)
        if major not in self._with_template:
            _execute(cluster, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(AWKWARD_TEMPLATE)))
            awkward.fill(cluster.conninfo(AWKWARD_TEMPLATE), rows=AWKWARD_ROWS)
            self._with_template.add(major)
        return cluster

    def close(self) -> None:
        self._stack.close()


@dataclasses.dataclass(frozen=True, slots=True)
class Database:
    """A test's own database, its server, and that server's programs."""

    cluster: ScratchCluster
    name: str

    @property
    def conninfo(self) -> str:
        return self.cluster.conninfo(self.name)

    def execute(self, statements: str) -> None:
        """Run SQL in autocommit mode."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(statements.encode())

    def value(self, query: str) -> Any:
        """The first column of the query's first row."""
        with psycopg.connect(self.conninfo) as connection:
            row = connection.execute(query.encode()).fetchone()
        assert row is not None, query
        return row[0]


@contextlib.contextmanager
def temporary_database(
    cluster: ScratchCluster, *, template: str = "template0", name: str | None = None
) -> Iterator[Database]:
    """A new database, dropped at the end with whoever is still connected."""
    chosen = name or f"test_{uuid.uuid4().hex[:12]}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    _execute(cluster, create.format(sql.Identifier(chosen), sql.Identifier(template)))
    try:
        yield Database(cluster, chosen)
    finally:
        _execute(cluster, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(chosen)))


def _execute(cluster: ScratchCluster, statement: sql.Composed) -> None:
    with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
        connection.execute(statement)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory on a filesystem that is not overlayfs; whatever flags were set in it are cleared at the end."""
    directory = Path(tempfile.mkdtemp(prefix="pgkeep-test-", dir=_scratch_parent()))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        remove_with_flags(directory)


def remove_with_flags(directory: Path) -> None:
    """Clear immutable and append-only flags (or closed modes), then remove. Raises where something stays."""
    if os.geteuid() == 0:
        # Its code says nothing: it is non-zero for sockets and for filesystems without flags.
        process.run(["chattr", "-R", "-f", "-i", "-a", directory])
    else:
        # A vault's directories are closed to their owner too, where the mode is the protection.
        for path in (directory, *(each for each in directory.rglob("*") if each.is_dir() and not each.is_symlink())):
            path.chmod(0o700)
    shutil.rmtree(directory)


def filesystem_type(path: Path) -> str:
    """E.g. ``ext4``, ``overlay``, ``tmpfs``: of the mount that holds this path, from /proc/self/mountinfo."""
    best = ("", "")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        mount = fields[4].encode().decode("unicode_escape")
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, fields[fields.index("-") + 1])
    return best[1]


def _scratch_parent() -> Path:
    named = os.environ.get(SCRATCH_VARIABLE)
    for parent in [Path(named)] if named else [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]:
        if filesystem_type(parent) not in ("overlay", "tmpfs"):
            return parent
    skip(f"needs a directory on ext4, xfs or btrfs: name one in {SCRATCH_VARIABLE}", could_run_here=False)


@contextlib.contextmanager
def mounted_filesystem(kind: FilesystemKind, size_mib: int) -> Iterator[Path]:
    """A small filesystem of its own, mounted; unmounted and gone at the end. Skips where we may not mount."""
    _need_mounting()
    if size_mib < SMALLEST_MIB[kind]:
        raise ValueError(f"{kind} needs at least {SMALLEST_MIB[kind]} MiB")
    with contextlib.ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="pgkeep-mount-"))
        base.chmod(0o755)
        stack.callback(shutil.rmtree, base)
        mount = base / "mount"
        mount.mkdir()
        if kind == "tmpfs":
            _must("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", mount)
        else:
            _mount_device(kind, _loop_device(base / "image", size_mib, stack), mount)
        stack.callback(_unmount, mount)
        yield mount


def _need_mounting() -> None:
    need_root("mounting a filesystem")
    status = Path("/proc/self/status").read_text()
    effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    if not effective >> _CAP_SYS_ADMIN & 1 or not Path("/dev/loop-control").exists():
        skip("needs CAP_SYS_ADMIN and loop devices: mounting a filesystem", could_run_here=False)


def _loop_device(image: Path, size_mib: int, stack: contextlib.ExitStack) -> str:
    with image.open("wb") as opened:
        opened.truncate(size_mib << 20)
    device = _must("losetup", "--find", "--show", image).strip()
    stack.callback(_must, "losetup", "--detach", device)
    return device


def _mount_device(kind: FilesystemKind, device: str, mount: Path) -> None:
    makers = {"ext4": ["-q", "-F"], "xfs": ["-q", "-f"], "btrfs": ["-q", "-f"], "ntfs": ["-F", "-Q", "-q"], "exfat": []}
    maker = f"mkfs.{kind}"
    mounter = {"ntfs": "ntfs-3g", "exfat": "mount.exfat-fuse"}.get(kind, "mount")
    for program in (maker, mounter):
        if shutil.which(program) is None:
            skip(f"needs {program}: a {kind} filesystem", could_run_here=False)
    if mounter == "mount" and kind not in Path("/proc/filesystems").read_text().split():
        skip(f"needs {kind} in the kernel", could_run_here=False)
    _must(maker, *makers[kind], device)
    # A FUSE filesystem lives in a daemon: in a session of its own, or it would end with the program that we ran.
    _must(*([mounter, "-t", kind] if mounter == "mount" else ["setsid", "--wait", mounter]), device, mount)


def _unmount(mount: Path) -> None:
    deadline = time.monotonic() + _UNMOUNT_SECONDS
    while process.run(["umount", mount]).return_code != 0:
        if time.monotonic() > deadline:
            _must("umount", "--lazy", mount)
            pytest.fail(f"{mount} was still in use at the end of the test")
        time.sleep(0.1)


def _must(*arguments: str | Path) -> str:
    completed = process.run(arguments)
    assert completed.return_code == 0, f"{arguments}: {completed.stderr}"
    return completed.stdout.decode()


NewDatabase = Callable[..., Database]
LoopFilesystem = Callable[[FilesystemKind, int], Path]
