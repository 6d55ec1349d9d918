"""``show``, ``diff`` and ``doctor``, against real servers: what they print is run, and what they claim is tried."""

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
from typing import Any

import pytest

from pgkeep.adapters import fsflags, postgres, process
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.cli.show import createdb_command, quoted, writes_restrict
from pgkeep.domain.manifest import DatabaseFacts
from pgkeep.vault import store
from pgkeep.vault.layout import Layout
from pgkeep.watch import machine, server, storage
from tests import clusters
from tests.clusters import Clusters, Database, LoopFilesystem, NewDatabase
from tests.integration.keeper import Keeper, fresh_name, keeping, reach, shell

SOURCE = Path(__file__).parents[2] / "src"
FILL = """
    CREATE SCHEMA "odd schema";
    CREATE TABLE "odd schema".large AS SELECT g AS a, md5(g::text) AS b FROM generate_series(1, 5000) AS g;
    CREATE TABLE small (a int); INSERT INTO small VALUES (1), (2);
    CREATE TABLE leaving (a int); INSERT INTO leaving VALUES (3);
    SELECT lo_from_bytea(0, 'x');
"""
CHANGE = """
    DELETE FROM "odd schema".large WHERE a <= 1000;
    UPDATE small SET a = a + 1;
    DROP TABLE leaving; CREATE TABLE arriving (a int);
"""


@dataclasses.dataclass(frozen=True)
class Two:
    """A vault under a directory whose name needs quoting, with two backups of one database."""

    keeper: Keeper
    database: Database
    first: dict[str, Any]
    second: dict[str, Any]


@pytest.fixture(scope="module")
def two(session_clusters: Clusters) -> Iterator[Two]:
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(clusters.temporary_database(session_clusters.get(15)))
        directory = stack.enter_context(clusters.scratch_directory())
        environment = {**reach(database.cluster, database.name), "BACKUP_RETENTION_DAYS": "9"}
        keeper = Keeper(directory / "it's a root", environment)
        database.execute(FILL)
        database.execute(f"ALTER DATABASE {database.name} SET work_mem = '5MB'")
        first = keeper.json("backup", "daily")
        database.execute(CHANGE)
        yield Two(keeper, database, first, keeper.json("backup", "manual"))


# show


def test_show_says_everything_about_the_latest(two: Two) -> None:
    text = two.keeper.run("show").stdout
    for expected in (
        two.second["id"],
        two.second["sha256"],
        two.database.name,
        "manual",
        "5MB",
        "3 tables, 4002 rows, 1 large objects",
        two.database.cluster.installation.version,
        "sealed",
        str(two.keeper.file(two.second)),
        "UTF8",
    ):
        assert expected in text, expected
    tables = [line.split()[0] for line in text.splitlines() if line.startswith(("odd", "public."))]
    assert tables == ["odd", "public.small", "public.arriving"], "the largest comes first"


def test_show_in_json_has_the_lists_fields_the_manifest_and_the_commands(two: Two) -> None:
    shown = two.keeper.json("show", "latest:daily")
    listed = two.keeper.json("list", "--tier", "daily")[0]
    assert {key: shown[key] for key in listed} == listed
    assert shown["protection_in_force"] is True
    assert shown["ratio"] == pytest.approx(shown["size_bytes"] / shown["raw_bytes"])
    assert len(shown["manifest"]["tables"]) == shown["tables"] == 3
    assert shown["commands"]
    retained = dt.datetime.fromisoformat(shown["retain_until"]) - dt.datetime.fromisoformat(shown["sealed_at"])
    assert retained == dt.timedelta(days=9)


def test_the_table_list_is_cut_at_twenty_unless_all_are_wanted(
    cluster15: ScratchCluster, new_database: NewDatabase
) -> None:
    database = new_database(cluster15)
    database.execute(";".join(f"CREATE TABLE t{number} (a int)" for number in range(23)))
    with keeping(cluster15, database.name) as keeper:
        keeper.backup()
        short, long = keeper.run("show").stdout, keeper.run("show", "--all-tables").stdout
    assert (short.count("public.t"), long.count("public.t")) == (20, 23)
    assert "and 3 smaller ones" in short
    assert "smaller" not in long


def test_the_stock_commands_work_as_they_are_pasted(two: Two, scratch: Path) -> None:
    """Check, make a database, restore with gunzip and psql: into what the source held; then pgkeep's own."""
    commands = [each["command"] for each in two.keeper.json("show", "latest:manual")["commands"]]
    check, roles, make, load, restore = commands
    (scratch / "pgkeep").write_text(f'#!/bin/sh\nPYTHONPATH="{SOURCE}" exec "{sys.executable}" -m pgkeep "$@"\n')
    (scratch / "pgkeep").chmod(0o755)
    cluster = two.database.cluster
    paths = {"PATH": f"{scratch}:{cluster.installation.directory}:{os.environ['PATH']}"}
    servers = {"PGHOST": os.fspath(cluster.socket_directory), "PGUSER": "postgres", "HOME": os.fspath(scratch)}
    export = "export PATH PGHOST PGUSER HOME; "
    with fresh_name(cluster) as target:
        # The suggested name is the same for all: leave it to this test alone.
        for command in (roles, make, load):
            shell(f"{export}{command.replace(' restored', ' ' + target.name)}", **paths, **servers)
        assert target.value('SELECT count(*) FROM "odd schema".large') == 4000
        assert target.value("SELECT sum(a)::int FROM small") == 5
    assert shell(f"{export}{check}", **paths, **servers).stdout.endswith(b".sql.gz: OK\n")
    with fresh_name(cluster) as target:
        shell(f"{export}{restore.replace('=restored', '=' + target.name)}", **paths, **servers)
        assert target.value('SELECT count(*) FROM "odd schema".large') == 4000


def test_roles_have_their_own_stock_command(two: Two) -> None:
    shown = two.keeper.json("show", "latest:globals")
    check, load = (each["command"] for each in shown["commands"])
    assert check.startswith("cd ")
    assert load.endswith("| psql -X -d postgres")
    assert "ON_ERROR_STOP" not in load, "a role that is there already would stop it"
    assert "(roles and tablespaces)" in two.keeper.run("show", "latest:globals").stdout


def test_a_copy_elsewhere_is_described_by_its_manifest(two: Two, scratch: Path) -> None:
    original = two.keeper.file(two.first)
    for name in (original.name, f"{original.name}.manifest.json"):
        shutil.copyfile(original.with_name(name), scratch / name)
    shown = two.keeper.json("show", scratch / original.name)
    assert shown["protection_in_force"] is None
    assert shown["manifest"]["id"] == two.first["id"]
    assert f"pgkeep restore {scratch / original.name} " in shown["commands"][-1]["command"]
    (scratch / f"{original.name}.manifest.json").unlink()
    assert "copy it too" in two.keeper.fails(10, "show", scratch / original.name)


def test_a_path_into_the_vault_is_a_sealed_backup(two: Two) -> None:
    assert two.keeper.json("show", two.keeper.file(two.first))["protection_in_force"] is True


def test_lost_protection_is_shown_and_exits_with_seven(two: Two) -> None:
    clusters.need_root("clearing the immutable flag")
    file = two.keeper.file(two.first)
    fsflags.set_path_flag(file, fsflags.IMMUTABLE, False)
    try:
        answer = two.keeper.run("show", two.first["id"])
        assert answer.code == 7
        assert "NO LONGER in force" in answer.stdout
        assert "has lost its immutable flag" in answer.stderr
        doctor = two.keeper.run("doctor", "--json")
        assert doctor.code == 1
        assert any(each["name"] == "backups" and each["status"] == "fail" for each in doctor.json()["checks"])
    finally:
        fsflags.set_path_flag(file, fsflags.IMMUTABLE, True)
    assert two.keeper.run("show", two.first["id"]).code == 0


@pytest.mark.parametrize(
    ("version", "expected"),
    [("15.13", False), ("15.14", True), ("15.20", True), ("16.9", False), ("16.10", True), ("17.5", False),
     ("17.6", True), ("18.0", True), ("18beta1", True), ("14.18", False), ("14.19", True), ("12.22", False)],
)  # fmt: skip
def test_which_versions_write_restrict(version: str, expected: bool) -> None:
    assert writes_restrict(version) is expected


def test_the_installed_versions_do_as_the_table_says(any_cluster: ScratchCluster) -> None:
    installation = any_cluster.installation
    done = process.run([installation.tool("pg_dump"), "--schema-only", f"--dbname={any_cluster.conninfo()}"])
    assert (b"\n\\restrict " in done.stdout) is writes_restrict(installation.version)


def test_createdb_is_told_the_whole_locale() -> None:
    facts = DatabaseFacts(encoding="UTF8", collate="C", ctype="de_DE.UTF-8", locale_provider="icu", icu_locale="de-AT",
                          icu_rules="&V << w <<< W")  # fmt: skip
    assert createdb_command(facts, "16.1") == (
        "createdb --template=template0 --encoding=UTF8 --lc-collate=C --lc-ctype=de_DE.UTF-8 --locale-provider=icu"
        " --icu-locale=de-AT --icu-rules='&V << w <<< W' restored"
    )
    assert "provider" not in createdb_command(DatabaseFacts(encoding="UTF8", collate="C", ctype="C"), "14.1")


@pytest.mark.parametrize("name", ["plain", "it's", "two\nlines", "\x1b[31mred", "$(touch x)", "-n", "ü", "\udcff"])
def test_quoting_survives_the_shell_and_steers_no_terminal(name: str) -> None:
    assert quoted(name).isprintable()
    done = process.run(["bash", "-c", f"printf %s {quoted('/' + name)}"])
    assert done.stdout == os.fsencode("/" + name)


# diff


def test_diff_names_what_changed(two: Two) -> None:
    found = two.keeper.json("diff", "latest:daily", "latest:manual")
    assert [table["name"] for table in found["added"]] == ["arriving"]
    assert [table["name"] for table in found["gone"]] == ["leaving"]
    changed = {table["name"]: table for table in found["changed"]}
    assert changed["large"]["rows_delta"] == -1000
    assert changed["small"]["digest_only"] is True
    assert found["rows_delta"] == -1001
    text = two.keeper.run("diff", two.first["id"], "latest").stdout
    assert "1 added, 1 gone, 2 changed, 0 unchanged; rows -1001" in text
    assert text.splitlines()[1].split()[:2] == ["added", "public.arriving"]


def test_diff_the_other_way_round_says_so(two: Two) -> None:
    answer = two.keeper.run("diff", "latest:manual", "latest:daily")
    assert answer.code == 0
    assert "the first is the newer one" in answer.stderr
    assert "rows +1001" in answer.stdout


def test_diff_with_itself_finds_nothing(two: Two) -> None:
    assert two.keeper.json("diff", "latest", "latest")["tables_identical"] is True
    assert two.keeper.run("diff", "latest", "latest").stdout.startswith("the tables are identical\n")


def test_diff_needs_two_that_exist(two: Two) -> None:
    two.keeper.fails(2, "diff", "latest")
    two.keeper.fails(10, "diff", "latest", "19990101T000000Z-000000")


# doctor


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
        entry = {"id": "20260101T000000Z-aaaaaa", "action": "seal", "directory": "daily", "filename": "x", "inodes": {}}
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
