"""Whatever cuts a run off at whatever named step: never half a backup to be seen, and the next run cleans up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests import clusters
from tests.faults.machine import Machine, is_flagged, names_in, processes_of, wait_for

COMMIT = "seal.linked.manifest.json"
EXPIRY = {"BACKUP_RETENTION_HOURLY_DAYS": "1", "BACKUP_RETENTION_KEEP_MINIMUM": "1"}


@pytest.fixture(scope="module")
def backup_steps(database: clusters.Database) -> list[str]:
    """Every step of a backup, once each: new ones are tested as soon as they are named."""
    with clusters.scratch_directory() as directory:
        names = Machine(directory / "root", database).steps("backup", "daily", record=directory / "steps")
    firsts = [name.removesuffix("#1") for name in names if name.endswith("#1")]
    assert len(firsts) > 15
    assert COMMIT in firsts
    return firsts


@pytest.fixture(scope="module")
def expiry_steps(database: clusters.Database) -> list[str]:
    with clusters.scratch_directory() as directory:
        machine = Machine(directory / "root", database, **EXPIRY)
        machine.backup()
        _age(machine)
        names = machine.steps("cleanup", record=directory / "steps")
    assert len(names) >= 4, names
    return names


@contextlib.contextmanager
def noted(text: str) -> Iterator[None]:
    """An assertion that fails in the body says at which step."""
    try:
        yield
    except BaseException as error:
        error.add_note(text)
        raise


def _age(machine: Machine) -> list[str]:
    """A backup and its globals that have expired since."""
    return [each["id"] for each in machine.backup("hourly", days_ago=10)["backups"]]


def _begun(machine: Machine) -> set[str]:
    """The identifiers that a killed run left in staging."""
    return {name.split(".")[0] for name in names_in(machine.layout.staging)}


def _assert_no_tools_left(machine: Machine) -> None:
    wait_for(lambda: not processes_of(str(machine.root)), 5.0)


def _assert_restores(machine: Machine, identifier: str) -> None:
    target = machine.database.cluster.conninfo("restored")
    try:
        shown = machine.run("restore", identifier, "--to", target, "--create", "--json").must().json
        assert shown["ok"]
        assert shown["rows"] == 2300
    finally:
        with psycopg.connect(machine.database.cluster.conninfo(), autocommit=True) as connection:
            connection.execute("DROP DATABASE IF EXISTS restored WITH (FORCE)")


def test_killed_at_every_step_the_next_run_mends_it(machine: Machine, backup_steps: list[str]) -> None:
    kept = {each["id"] for each in machine.backup()["backups"]}
    for place, step in enumerate(backup_steps):
        with noted(step):
            assert machine.run("backup", "daily", action="kill", at=step).code == -9
            _assert_no_tools_left(machine)
            between = set(machine.identifiers())
            begun = _begun(machine)
            committed = between - kept
            machine.assert_whole(protected=not committed)
            assert kept <= between
            assert bool(committed) == (place >= backup_steps.index(COMMIT))
            after = machine.backup("daily")
            machine.assert_at_rest()
            machine.assert_whole()
            assert set(machine.identifiers()) == between | {each["id"] for each in after["backups"]}
            for identifier in begun | committed:
                told = machine.events(identifier)
                assert told.count("sealed") == (identifier in committed), told
                assert told, f"the audit log says nothing of {identifier}"
            if step in (backup_steps[0], COMMIT, backup_steps[-1]):
                _assert_restores(machine, after["id"])
            kept = set(machine.identifiers())
    assert machine.run("verify", "--all", "--json").must().json["ok"]
    assert sorted(each["id"] for each in machine.run("list", "--json").must().json) == machine.identifiers()


def test_killed_run_after_run(machine: Machine, backup_steps: list[str]) -> None:
    """No run ever comes to its end: each has the former one's leavings to clear, and leaves its own."""
    machine.backup()
    kept = set(machine.identifiers())
    for step in backup_steps:
        with noted(step):
            assert machine.run("backup", "hourly", action="kill", at=step).code == -9
            machine.assert_whole(protected=False)
            assert kept <= set(machine.identifiers())
            kept = set(machine.identifiers())
    shown = machine.backup()
    machine.assert_at_rest()
    machine.assert_whole()
    _assert_restores(machine, shown["id"])
    for identifier in machine.identifiers():
        assert machine.events(identifier).count("sealed") == 1, machine.events(identifier)


@pytest.mark.parametrize("step", ["dump.globals-written", "seal.linked-dump", COMMIT])
def test_killed_at_the_globals(scratch: Path, database: clusters.Database, step: str) -> None:
    """The database's backup before them is sealed and stays."""
    machine = Machine(scratch / "root", database, BACKUP_GLOBALS="auto")
    assert machine.run("backup", action="kill", at=step, nth=1 if step.startswith("dump") else 2).code == -9
    assert [backup.directory for backup in machine.backups()] == (
        ["globals", "manual"] if step == COMMIT else ["manual"]
    )
    machine.backup()
    machine.assert_at_rest()
    machine.assert_whole()


def test_killed_while_it_recovers(machine: Machine) -> None:
    """The clearing up is cut off again and again, at each of its own steps."""
    machine.backup()
    assert machine.run("backup", action="kill", at=COMMIT).code == -9
    for step in ("seal.protected-dump", "seal.protected.manifest.json", "seal.settled"):
        with noted(step):
            assert machine.run("backup", action="kill", at=step).code == -9
            machine.assert_whole(protected=False)
    assert len(machine.identifiers()) == 2
    machine.backup()
    machine.assert_at_rest()
    for identifier in machine.identifiers():
        assert machine.events(identifier).count("sealed") == 1


def test_asked_to_end_at_every_step(machine: Machine, backup_steps: list[str]) -> None:
    """By SIGTERM and Ctrl-C in turn. It ends at once and leaves nothing at all: there is no need of a next run."""
    machine.backup()
    kept = set(machine.identifiers())
    for place, step in enumerate(backup_steps):
        with noted(step):
            action, code = ("term", 143) if place % 2 else ("int", 130)
            result = machine.run("backup", "daily", action=action, at=step).must(code)
            assert result.seconds < 5
            assert processes_of(str(machine.root)) == []
            machine.assert_at_rest()
            machine.assert_whole()
            sealed = set(machine.identifiers()) - kept
            assert bool(sealed) == (place >= backup_steps.index(COMMIT))
            for identifier in sealed:
                assert machine.events(identifier) in (["sealed"], ["sealed", "backup interrupted"])
            kept |= sealed
    machine.backup()
    machine.assert_at_rest()


def test_an_error_at_every_step(machine: Machine, backup_steps: list[str]) -> None:
    """The system's (no space) and pgkeep's own in turn: nothing half remains, and no next run is needed."""
    machine.backup()
    kept = set(machine.identifiers())
    for place, step in enumerate(backup_steps):
        with noted(step):
            action, code = ("full", 6) if place % 2 else ("error", 4)
            result = machine.run("backup", "daily", action=action, at=step).must(code)
            if action == "full":
                assert "the disk is full (" in result.stderr
                assert str(machine.root) in result.stderr
            machine.assert_at_rest()
            machine.assert_whole()
            assert kept <= set(machine.identifiers())
            kept = set(machine.identifiers())
            for identifier in kept:
                assert machine.events(identifier).count("sealed") == 1
    machine.backup()
    machine.assert_at_rest()


@pytest.mark.parametrize("action", ["kill", "term", "full"])
def test_cut_off_while_it_expires(
    scratch: Path, database: clusters.Database, expiry_steps: list[str], action: str
) -> None:
    machine = Machine(scratch / "root", database, **EXPIRY)
    machine.backup()
    kept = set(machine.identifiers())
    for step in expiry_steps:
        name, _, number = step.partition("#")
        with noted(step):
            aged = _age(machine)
            result = machine.run("cleanup", action=action, at=name, nth=int(number))
            assert result.code == {"kill": -9, "term": 143, "full": 6}[action], result
            machine.assert_whole(protected=False)
            assert kept <= set(machine.identifiers())
            if action != "kill":
                machine.assert_at_rest()
            machine.run("cleanup").must()
            machine.assert_at_rest()
            assert set(machine.identifiers()) == kept
            for identifier in aged:
                assert machine.events(identifier)[-2:] == ["expiring", "expired"], machine.events(identifier)


def test_killed_after_any_call_of_the_first_run(scratch: Path, database: clusters.Database) -> None:
    """While the vault itself is being made, between the steps that have names; each time in a new place."""
    for number in range(4, 100, 16):
        machine = Machine(scratch / f"root-{number}", database)
        with noted(f"after call {number}"):
            assert machine.run("backup", action="kill", at="call", nth=number).code == -9
            machine.backup()
            machine.assert_at_rest()
            machine.assert_whole()


def test_killed_after_any_call(machine: Machine) -> None:
    """In one vault, without a run between that comes to its end."""
    machine.backup()
    for number in range(6, 300, 23):
        with noted(f"after call {number}"):
            assert machine.run("backup", action="kill", at="call", nth=number).code in (-9, 0)
            machine.assert_whole(protected=False)
    machine.backup()
    machine.assert_at_rest()
    for identifier in machine.identifiers():
        assert machine.events(identifier).count("sealed") == 1, machine.events(identifier)


def test_asked_to_end_after_any_call(machine: Machine) -> None:
    """Between the named steps too: nothing half, nothing left in staging, and every directory is closed again."""
    machine.backup()
    active = machine.layout.active
    kept = set(machine.identifiers())
    for number in range(8, 300, 21):
        with noted(f"after call {number}"):
            action, code = ("term", 143) if number % 2 else ("int", 130)
            assert machine.run("backup", action=action, at="call", nth=number).code in (code, 0)
            machine.assert_whole()
            assert kept <= set(machine.identifiers())
            assert names_in(machine.layout.staging) == names_in(machine.layout.journal) == []
            assert [path for path in (active, *active.iterdir()) if path.name[:1] != "." and not is_flagged(path)] == []
            kept = set(machine.identifiers())
    machine.backup()
    machine.assert_at_rest()
