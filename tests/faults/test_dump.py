"""A server that dies, locks that are lost, tables that vanish, and what is wrong before a dump begins."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgkeep.adapters import pgbinaries
from pgkeep.adapters.scratch_cluster import ScratchCluster
from tests import clusters
from tests.faults.machine import TABLES, Machine, finish, names_in, processes_of, wait_for

DUMPING = "dump.pg_dump-started"
RACING = {"BACKUP_JOBS": "2", "BACKUP_LOCK_TIMEOUT": "20"}


@pytest.fixture
def own_database(cluster15: ScratchCluster, new_database: clusters.NewDatabase) -> clusters.Database:
    database = new_database(cluster15)
    database.execute(TABLES)
    return database


@pytest.fixture
def own_machine(scratch: Path, own_database: clusters.Database) -> Machine:
    return Machine(scratch / "root", own_database, **RACING)


@contextlib.contextmanager
def locked(database: clusters.Database, table: str = "shop.orders") -> Iterator[psycopg.Connection[Any]]:
    """A session that holds the table against everybody until the end of the block."""
    with psycopg.connect(database.conninfo) as connection:
        connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield connection


def _waiting_for_locks(database: clusters.Database) -> int:
    return int(database.value("SELECT count(*) FROM pg_locks WHERE NOT granted"))


def _copying(database: clusters.Database) -> list[int]:
    """The backends that are in the middle of a table's data."""
    with psycopg.connect(database.conninfo) as connection:
        query = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'COPY shop.%' AND state = 'active'"
        return [pid for (pid,) in connection.execute(query)]


def _stop(pids: list[int], stopped: list[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
    return bool(stopped)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ended_in_the_middle_of_a_table(own_machine: Machine, number: signal.Signals) -> None:
    """pg_dump and its workers end with us: an orphan would go on for hours, holding space and a snapshot."""
    own_machine.backup()
    database = own_machine.database
    database.execute(
        "CREATE TABLE shop.large AS SELECT n, repeat(md5(n::text), 30) AS t FROM generate_series(1, 90000) AS n"
    )
    stopped: list[int] = []
    running = own_machine.start("backup", "daily")
    try:
        wait_for(lambda: _stop(_copying(database), stopped))
        running.send_signal(number)
        result = finish(running)
        assert result.code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert result.seconds < 8
        wait_for(lambda: not processes_of(str(own_machine.root)), 3.0)
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    if number != signal.SIGKILL:
        own_machine.assert_at_rest()
    wait_for(lambda: not _copying(database))
    assert len(own_machine.identifiers()) == 1
    own_machine.backup()
    own_machine.assert_at_rest()


def test_a_lock_is_lost_in_the_middle(own_machine: Machine, scratch: Path) -> None:
    """An ALTER TABLE queued behind pg_dump's first lock keeps its workers from theirs: again, with one job."""
    database = own_machine.database
    stop = threading.Event()

    def queue_behind_the_dump() -> None:
        with psycopg.connect(database.conninfo) as watcher, psycopg.connect(database.conninfo) as other:
            mine = "SELECT count(*) FROM pg_locks WHERE relation = 'shop.orders'::regclass AND granted"
            while not stop.is_set():
                row = watcher.execute(mine.encode()).fetchone()
                watcher.rollback()
                if row is not None and row[0]:
                    other.execute(b"ALTER TABLE shop.orders ADD COLUMN late int")
                    other.commit()
                    return

    thread = threading.Thread(target=queue_behind_the_dump)
    thread.start()
    try:
        result = own_machine.run("backup", "--json").must()
    finally:
        stop.set()
        thread.join()
    assert "lost a lock" in result.stderr
    assert any("made again with one job" in note for note in result.json["notes"])
    manifest = own_machine.backups()[0].manifest
    assert manifest.notes == tuple(result.json["notes"])
    assert manifest.rows == 2300
    own_machine.assert_at_rest()
    own_machine.assert_whole()


def test_a_table_is_dropped_while_pg_dump_waits_for_it(own_machine: Machine) -> None:
    """It saw the table in the catalog, and finds it gone when it gets the lock: again, without that table."""
    database = own_machine.database
    database.execute("CREATE TABLE shop.doomed (id int)")
    with psycopg.connect(database.conninfo) as connection:
        connection.execute(b"DROP TABLE shop.doomed")
        running = own_machine.start("backup", "--json")
        wait_for(lambda: _waiting_for_locks(database) or running.poll() is not None)
        connection.commit()
    result = finish(running).must()
    assert result.json["tables"] == 3
    assert any("repeated" in note for note in result.json["notes"]), result.json["notes"]
    own_machine.assert_at_rest()


def test_a_lock_that_is_never_given(own_machine: Machine) -> None:
    own_machine.backup()
    with locked(own_machine.database):
        settings = {"BACKUP_LOCK_TIMEOUT": "1", "BACKUP_RETRIES": "0"}
        result = own_machine.run("backup", environment=settings).must(4)
    assert "shop.orders" in result.stderr
    assert "BACKUP_LOCK_TIMEOUT" in result.stderr
    own_machine.assert_at_rest()
    assert [record["event"] for record in own_machine.audit()] == ["sealed", "backup failed"]


@pytest.fixture(scope="module")
def mortal() -> Iterator[ScratchCluster]:
    """A server of this module's own, to kill, with passwords over its socket for one role."""
    with ScratchCluster(15, durable=True) as cluster:
        with psycopg.connect(cluster.conninfo(), autocommit=True) as connection:
            connection.execute(b"CREATE ROLE app LOGIN PASSWORD 'right' IN ROLE pg_read_all_data")
            connection.execute(b"CREATE DATABASE app_db")
        with psycopg.connect(cluster.conninfo("app_db"), autocommit=True) as connection:
            connection.execute(TABLES.encode())
        rules = cluster.data_directory / "pg_hba.conf"
        rules.write_text("local all app scram-sha-256\nlocal all all trust\n")
        cluster.stop()
        cluster.start()
        yield cluster


def test_the_server_is_killed_in_the_middle(scratch: Path, mortal: ScratchCluster) -> None:
    machine = Machine(scratch / "root", clusters.Database(mortal, "app_db"))
    machine.backup()
    with locked(machine.database) as connection:
        running = machine.start("backup")
        wait_for(lambda: _waiting_for_locks(machine.database) or running.poll() is not None)
        mortal.stop(immediate=True)
        connection.close()
    result = finish(running).must(4)
    assert result.seconds < 10
    assert "pg_dump failed" in result.stderr
    machine.assert_at_rest()
    machine.assert_whole()
    assert "socket" in machine.run("backup").must(4).stderr
    mortal.start()
    machine.backup()
    machine.assert_at_rest()
    assert len(machine.identifiers()) == 2


def test_a_wrong_password_and_a_right_one(scratch: Path, mortal: ScratchCluster) -> None:
    machine = Machine(scratch / "root", clusters.Database(mortal, "app_db"), DB_USER="app")
    secret = scratch / "password"
    secret.write_text("wrong-and-secret\n")
    secret.chmod(0o600)
    named = {"DB_PASSWORD_FILE": str(secret)}
    result = machine.run("backup", environment=named).must(4)
    assert "password authentication failed" in result.stderr
    assert "DB_PASSWORD_FILE" in result.stderr
    assert "wrong-and-secret" not in result.stderr + machine.layout.audit.read_text()
    assert "no password supplied" in machine.run("backup").must(4).stderr
    assert names_in(machine.layout.staging) == []
    secret.write_text("right\n")
    assert "lo_compat_privileges" in machine.run("backup", environment=named).must(4).stderr
    machine.database.execute("ALTER DATABASE app_db SET lo_compat_privileges = on")
    shown = machine.run("backup", "--json", environment={**named, "BACKUP_GLOBALS": "auto"}).must().json
    assert [each["kind"] for each in shown["backups"]] == ["database", "globals"]
    machine.assert_at_rest()


def test_no_such_database_and_no_server(machine: Machine, scratch: Path) -> None:
    result = machine.run("backup", environment={"DB_NAME": "not-there"}).must(4)
    assert 'database "not-there" does not exist' in result.stderr
    assert "DB_NAME" in result.stderr
    result = machine.run("backup", environment={"DB_HOST": str(scratch)}).must(4)
    assert "is the server up" in result.stderr
    result = machine.run("backup", environment={"DB_HOST": "localhost", "DB_PORT": "1"}).must(4)
    assert "is the server up" in result.stderr
    machine.assert_at_rest()
    assert [record["event"] for record in machine.audit()] == ["backup failed"] * 3


def test_one_of_several_databases_fails(scratch: Path, database: clusters.Database) -> None:
    """The others are backed up all the same; the run fails."""
    machine = Machine(scratch / "root", database, DB_NAME="", DB_NAMES=f"not-there,{database.name}")
    result = machine.run("backup").must(4)
    assert "not-there" in result.stderr
    assert [backup.manifest.database for backup in machine.backups()] == [database.name]
    machine.assert_at_rest()


def test_pg_dump_is_older_than_the_server(scratch: Path, cluster18: ScratchCluster) -> None:
    with clusters.temporary_database(cluster18) as database:
        older = next(each for each in pgbinaries.find_installations() if each.major == 15)
        machine = Machine(scratch / "root", database, PATH="/usr/bin:/bin")
        environment = {"PGKEEP_PG_BIN": str(older.directory)}
        result = machine.run("backup", environment=environment, without_embedded=True).must(5)
        assert "needs pg_dump 18 or newer, found 15" in result.stderr
        assert "postgresql-client-18" in result.stderr
        machine.assert_at_rest()
        # With the right one beside it, the preferred directory is passed over.
        assert machine.run("backup", "--json", environment=environment).must().json["state"] == "sealed"


def test_two_at_once(own_machine: Machine) -> None:
    with locked(own_machine.database):
        first = own_machine.start("backup", "hourly", "--json")
        wait_for(lambda: _waiting_for_locks(own_machine.database) or first.poll() is not None)
        refused = own_machine.run("backup", "--wait", "0").must(9)
        assert f"process {first.pid} on " in refused.stderr
        assert "backup" in refused.stderr
        busy = own_machine.run("cleanup", "--wait", "0.2").must(9)
        assert f"process {first.pid} on " in busy.stderr
        assert own_machine.run("list", "--json").must().json == []
        second = own_machine.start("backup", "daily", "--json")
        wait_for(lambda: len(processes_of(f"{own_machine.root}")) == 0 or second.poll() is None)
    done = [finish(first).must().json, finish(second).must().json]
    assert [each["tier"] for each in done] == ["hourly", "daily"]
    assert done[0]["sealed_at"] < done[1]["created_at"]
    own_machine.assert_at_rest()
    own_machine.assert_whole()


def test_two_in_one_second(machine: Machine) -> None:
    """The name of a second that is taken is never touched: the next free one is."""
    shown = [machine.backup() for _ in range(3)]
    assert len({each["path"] for each in shown}) == 3
    machine.assert_at_rest()
    machine.assert_whole()
