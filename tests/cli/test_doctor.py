"""``doctor``, against real servers and filesystems: what it claims is tried."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import postgres, process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.vault import store
from pgkeep.vault.layout import Layout
from pgkeep.watch import machine, server, storage
from tests import clusters
from tests.cli.pair import Two
from tests.clusters import Clusters, Database, LoopFilesystem, NewDatabase
from tests.integration.keeper import Keeper, keeping


def examined(keeper: Keeper) -> tuple[int, list[dict[str, str]]]:
    answer = keeper.run("doctor", "--json")
    assert "Traceback" not in answer.stderr, answer.stderr
    return answer.code, answer.json()["checks"]


def of(checks: list[dict[str, str]], name: str) -> dict[str, str]:
    """The worst finding of that name."""
    found = sorted(
        (each for each in checks if each["name"] == name), key=lambda each: "fail warn ok".index(each["status"])
    )
    assert found, f"no check {name} in {checks}"
    return found[0]


def everything_in(directory: Path) -> dict[str, tuple[int, int, int, str]]:
    """Inode, mode, size and digest of every name below; of directories no times, because a canary came and went."""
    found = {}
    for path in sorted(directory.rglob("*")):
        facts = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (facts.st_ino, facts.st_mode, 0 if path.is_dir() else facts.st_size, digest)
    return found


def test_doctor_is_content_with_a_healthy_vault_and_leaves_it_alone(two: Two) -> None:
    before = everything_in(two.keeper.root)
    code, checks = examined(two.keeper)
    assert everything_in(two.keeper.root) == before
    assert [each for each in checks if each["status"] == "fail"] == []
    assert code == 0
    names = {each["name"] for each in checks}
    assert names >= {"configuration", "version", "tools", "setpriv", "boundary", "server", "pg_dump", "globals",
                     "privileges", "root", "vault", "protection", "journal", "quarantine", "newest backup", "space",
                     "clock"}  # fmt: skip
    assert all(each["remedy"] for each in checks if each["status"] != "ok"), "each line has its remedy"
    assert of(checks, "boundary")["status"] == "warn"


def test_doctor_for_people(two: Two) -> None:
    answer = two.keeper.run("doctor")
    lines = answer.stdout.splitlines()
    assert all(line.startswith(("ok    ", "warn  ", "fail  ", "      ")) for line in lines)
    assert "      -> keep copies on a machine that this one can't write to" in lines
    assert " 0 failures" in answer.stderr


def test_doctor_before_the_first_backup_makes_nothing(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    with keeping(cluster15, new_database(cluster15).name) as keeper:
        code, checks = examined(keeper)
        assert not keeper.root.exists()
        assert list(keeper.root.parent.iterdir()) == []
    assert code == 0
    assert of(checks, "newest backup")["status"] == "warn"
    assert str(keeper.root.parent) in of(checks, "protection")["message"]


def test_without_a_server_the_rest_is_still_looked_at(two: Two) -> None:
    code, checks = examined(two.keeper.of(DB_HOST="/nonexistent"))
    assert code == 1
    assert "/nonexistent" in of(checks, "server")["message"]
    assert of(checks, "server")["remedy"]
    assert of(checks, "protection")["status"] != "fail"
    assert of(checks, "newest backup")["status"] == "ok"
    assert of(checks, "space")["status"] == "warn"


def test_a_wrong_configuration_is_told_in_full(two: Two) -> None:
    code, checks = examined(two.keeper.of(DB_PORT="x", PGKEEP_FOO="1"))
    assert code == 1
    assert "DB_PORT" in of(checks, "configuration")["message"]
    assert "PGKEEP_FOO" in of(checks, "configuration")["message"]
    assert of(checks, "tools")["status"] == "ok"


HOLES = {
    "table": ("REVOKE SELECT ON secret FROM {role}", "public.secret", "GRANT SELECT ON secret TO {role}"),
    "schema": ("REVOKE USAGE ON SCHEMA inner_s FROM {role}", "inner_s.t", "GRANT USAGE ON SCHEMA inner_s TO {role}"),
    "sequence": ("REVOKE SELECT ON SEQUENCE s FROM {role}", "public.s", "GRANT SELECT ON SEQUENCE s TO {role}"),
    "large object": ("SELECT lo_create(4242)", "4242", "GRANT SELECT ON LARGE OBJECT 4242 TO {role}"),
    "row security": ("ALTER TABLE secret ENABLE ROW LEVEL SECURITY", "BYPASSRLS", "ALTER ROLE {role} BYPASSRLS"),
}  # fmt: skip


# 18 tells sequences and large objects in a way of its own.
@pytest.mark.parametrize(("major", "hole"), [*((15, hole) for hole in HOLES), (18, "sequence"), (18, "large object")])
def test_doctor_and_pg_dump_agree_on_what_a_role_may_read(
    major: int, hole: str, session_clusters: Clusters, new_database: NewDatabase
) -> None:
    """With the hole doctor fails and so does the backup; with the remedy neither does."""
    database = new_database(session_clusters.get(major))
    with new_role(database) as role:
        make, named, mend = (text.format(role=role) for text in HOLES[hole])
        database.execute(
            "CREATE TABLE secret (a int); CREATE SCHEMA inner_s; CREATE TABLE inner_s.t (a int); CREATE SEQUENCE s;"
            f"GRANT USAGE ON SCHEMA inner_s TO {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public, inner_s TO {role};"
            f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO {role};"
        )
        with keeping(database.cluster, database.name, DB_USER=role) as keeper:
            database.execute(make)
            code, checks = examined(keeper)
            finding = of(checks, "privileges")
            assert (code, finding["status"]) == (1, "fail")
            assert named in finding["message"] + finding["remedy"]
            keeper.fails(4, "backup")
            database.execute(mend)
            assert of(examined(keeper)[1], "privileges")["status"] == "ok"
            assert keeper.run("backup").code == 0


@contextlib.contextmanager
def new_role(database: Database) -> Iterator[str]:
    """A role that may log in and no more. Roles belong to the whole server, so its name is its own."""
    role = f"weak_{os.urandom(4).hex()}"
    database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        yield role
    finally:
        database.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_role_that_reads_all_data_suffices(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    database = new_database(cluster15)
    database.execute("CREATE TABLE t (a int)")
    with new_role(database) as role, keeping(cluster15, database.name, DB_USER=role) as keeper:
        assert of(examined(keeper)[1], "privileges")["status"] == "fail"
        database.execute(f"GRANT pg_read_all_data TO {role}")
        assert of(examined(keeper)[1], "privileges")["status"] == "ok"


def test_roles_without_passwords_are_a_warning(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    database = new_database(cluster15)
    variables = {"BACKUP_GLOBALS": "auto"}
    with new_role(database) as role, keeping(cluster15, database.name, DB_USER=role, **variables) as keeper:
        code, checks = examined(keeper)
    assert (code, of(checks, "globals")["status"]) == (0, "warn")


def test_every_configured_database_is_looked_at(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    names = [new_database(cluster15).name, new_database(cluster15, name='we"ird, name').name]
    with keeping(cluster15, DB_NAMES=json.dumps(names)) as keeper:
        found = [each["message"] for each in examined(keeper)[1] if each["name"] == "privileges"]
    assert [text.split(": ")[0] for text in found] == names


def test_a_pooler_in_transaction_mode_is_named(cluster15: ScratchCluster, scratch: Path) -> None:
    if shutil.which("pgbouncer") is None:
        clusters.skip("needs pgbouncer", could_run_here=False)
    with pooler(cluster15, scratch) as port, keeping(cluster15, "postgres") as keeper:
        code, checks = examined(keeper.of(DB_HOST="127.0.0.1", DB_PORT=str(port)))
    assert code == 1
    assert "transaction mode" in of(checks, "pooler")["message"]
    assert "session mode" in of(checks, "pooler")["remedy"]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def pooler(cluster: ScratchCluster, scratch: Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    (scratch / "users").write_text('"postgres" ""\n')
    (scratch / "pgbouncer.ini").write_text(
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\nauth_file = {scratch}/users\n"
        "pool_mode = transaction\nignore_startup_parameters = extra_float_digits\n"
        "[databases]\npostgres = host="
        f"{cluster.socket_directory} port=5432 user=postgres dbname=postgres\n"
    )
    with process.start(["pgbouncer", scratch / "pgbouncer.ini"], identity=cluster.identity) as running:
        deadline = time.monotonic() + 20
        while not listens(port):
            assert running.poll() is None, running.messages()
            assert time.monotonic() < deadline, running.messages()
            time.sleep(0.05)
        yield port


def test_pg_dump_is_held_against_the_servers_major() -> None:
    """No real server is of these majors; the programs are the machine's own."""
    older = postgres.Server("9.9", 9, "1", "x", in_recovery=False, data_bytes=0)
    newer = dataclasses.replace(older, version="99.1", major=99)
    (too_old,) = server._pg_dump(newer)
    assert (too_old.status, "99 or newer" in too_old.message) == ("fail", True)
    (too_new,) = server._pg_dump(older)
    assert (too_new.status, "may not restore" in too_new.message) == ("warn", True)


def test_without_the_capability_the_line_of_the_compose_file_is_named(two: Two) -> None:
    clusters.need_root("dropping a capability")
    variables = [f"{name}={value}" for name, value in two.keeper.environment.items()]
    drop = ["setpriv", "--bounding-set=-linux_immutable", "--inh-caps=-linux_immutable", "env", "-i", *variables]
    done = process.run([*drop, sys.executable, "-m", "pgkeep", "doctor", "--json"])
    finding = of(json.loads(done.stdout)["checks"], "protection")
    assert (done.return_code, finding["status"]) == (1, "fail")
    assert "cap_add: [LINUX_IMMUTABLE]" in finding["remedy"]


def test_a_filesystem_that_protects_nothing_is_a_warning_with_the_reason(
    loop_filesystem: LoopFilesystem, two: Two
) -> None:
    place = loop_filesystem("exfat", 8)
    checks = examined(two.keeper.of(PGKEEP_ROOT=str(place / "backups")))[1]
    finding = of(checks, "protection")
    assert finding["status"] == "warn"
    assert finding["message"].startswith("none: backups are not protected at all")
    assert "exfat" in finding["message"] or "fuse" in finding["message"]


def test_too_small_a_disk_fails(loop_filesystem: LoopFilesystem, two: Two) -> None:
    place = loop_filesystem("ext4", 8)
    code, checks = examined(two.keeper.of(PGKEEP_ROOT=str(place)))
    assert (code, of(checks, "space")["status"]) == (1, "fail")
    assert of(checks, "protection")["status"] == "ok"


def test_overlayfs_fails(two: Two, scratch: Path) -> None:
    clusters.need_root("mounting overlayfs")
    for name in ("lower", "upper", "work", "merged"):
        (scratch / name).mkdir()
    options = f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work"
    if process.run(["mount", "-t", "overlay", "overlay", "-o", options, scratch / "merged"]).return_code != 0:
        clusters.skip("needs to mount overlayfs", could_run_here=False)
    try:
        code, checks = examined(two.keeper.of(PGKEEP_ROOT=str(scratch / "merged" / "backups")))
    finally:
        assert process.run(["umount", scratch / "merged"]).return_code == 0
    assert (code, of(checks, "protection")["status"]) == (1, "fail")
    assert "is on overlay" in of(checks, "protection")["message"]


def test_a_root_that_is_no_vault_or_no_directory(two: Two, scratch: Path) -> None:
    (scratch / "file").write_text("")
    assert of(examined(two.keeper.of(PGKEEP_ROOT=str(scratch / "file")))[1], "root")["status"] == "fail"
    (scratch / "active" / "daily").mkdir(parents=True)
    (scratch / "active" / "daily" / "stranger").write_text("")
    finding = of(examined(two.keeper.of(PGKEEP_ROOT=str(scratch)))[1], "vault")
    assert "was a volume swapped?" in finding["remedy"]


def test_unfinished_work_and_quarantine_are_warnings(cluster15: ScratchCluster, new_database: NewDatabase) -> None:
    with keeping(cluster15, new_database(cluster15).name) as keeper:
        keeper.backup()
        entry = {"id": "20260101T000000Z-aaaaaa", "action": "seal", "places": []}
        journal = keeper.root / "state" / "journal" / f"{entry['id']}.json"
        journal.write_text(json.dumps(entry))
        (keeper.root / "active" / ".quarantine" / "stranger").write_text("")
        code, checks = examined(keeper)
        assert code == 0
        assert "20260101T000000Z-aaaaaa" in of(checks, "journal")["message"]
        assert "stranger" in of(checks, "quarantine")["message"]
        journal.write_text("{")
        code, checks = examined(keeper)
        assert (code, of(checks, "journal")["status"]) == (1, "fail")


def test_an_old_backup_is_a_warning(two: Two) -> None:
    catalog = store.read_catalog(Layout(two.keeper.root))
    now = dt.datetime.now(dt.UTC)
    assert [check.status for check in storage.backups(catalog, now)] == ["ok"]
    assert [check.status for check in storage.backups(catalog, now + dt.timedelta(days=3))] == ["warn"]


@pytest.mark.parametrize(("free", "status"), [(99, "fail"), (100, "warn"), (199, "warn"), (200, "ok")])
def test_space_is_weighed_at_the_borders(free: int, status: str) -> None:
    assert storage.weigh_space("/x", free, 100, 200).status == status


def test_the_newest_backup_tells_the_next_ones_size(two: Two) -> None:
    sealed = store.read_catalog(Layout(two.keeper.root)).backups
    identifier = next(each.manifest.system_identifier for each in sealed)
    facts = server.Facts(identifier, {two.database.name: 10**9, "another": 1000})
    expected = int(two.second["size_bytes"] * storage.GROWTH) + int(1000 * storage.EXPECTED_RATIO)
    assert storage.expected_artifact_bytes(facts, sealed) == expected
    elsewhere = dataclasses.replace(facts, system_identifier="another cluster")
    assert storage.expected_artifact_bytes(elsewhere, sealed) > 10**8


@pytest.mark.parametrize(
    ("now", "newest", "status"),
    [
        (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), None, "ok"),
        (dt.datetime(1970, 1, 1, tzinfo=dt.UTC), None, "fail"),
        (dt.datetime(2101, 1, 1, tzinfo=dt.UTC), None, "fail"),
        (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1, 0, 0, 30, tzinfo=dt.UTC), "ok"),
        (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1, 0, 2, tzinfo=dt.UTC), "fail"),
    ],
)
def test_the_clock(now: dt.datetime, newest: dt.datetime | None, status: str) -> None:
    assert machine.clock(now, newest, "UTC").status == status
