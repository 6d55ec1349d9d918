"""A run of the agent killed, ended or starved at every step: nothing lost, nothing half, and the next one goes well."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgkeep.vault import store
from tests import clusters
from tests.faults.machine import Machine, finish, names_in, paused, processes_of, wait_for
from tests.integration.services import Service, serving_vault

# Where a killed run leaves nothing to report: it had not begun, or the dump was the vault's already.
BEFORE = ("run.cleared",)
HANDED_OVER = ("dump.handed-over", "run.answered", "run.removed")


def environment_of(machine: Machine) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[2]), **machine.environment}


@pytest.fixture
def vault(machine: Machine) -> Iterator[Service]:
    clusters.need_root("the vault sets flags")
    machine.root.mkdir()
    with serving_vault(environment_of(machine), machine.root) as running:
        yield running


def staged(machine: Machine) -> list[str]:
    return [name for name in names_in(machine.layout.staging) if not name.startswith(".")]


def told(machine: Machine) -> list[str]:
    """What the audit log has of failures by now."""
    records = machine.audit() if machine.layout.audit.exists() else []
    return [each["event"] for each in records if each["event"] in ("backup failed", "backup interrupted")]


def dumps(machine: Machine) -> dict[str, set[str]]:
    """Each dump's tiers, by the name that it has in all of them."""
    found: dict[str, set[str]] = {}
    for backup in machine.backups():
        found.setdefault(backup.manifest.filename, set()).add(backup.directory)
    return found


def has_dumps(machine: Machine, count: int) -> bool:
    return len(dumps(machine)) >= count


def is_left_alone(machine: Machine) -> bool:
    """No pg_dump and none of its sessions are left."""
    return processes_of(machine.database.name) == []


def is_settled(machine: Machine) -> bool:
    """After one more run nothing waits in staging."""
    machine.run("agent", "backup").must()
    return staged(machine) == []


def test_killed_at_any_step_a_run_loses_nothing_and_the_next_goes_well(
    machine: Machine, vault: Service, tmp_path: Path
) -> None:
    steps = machine.steps("agent", "backup", "hourly", "daily", record=tmp_path / "steps")
    assert {"run.began#1", "dump.handed-over#1", "run.answered#1"} <= set(steps)
    for number, step in enumerate(steps, start=1):
        at, _, nth = step.partition("#")
        tiers = ("hourly", "manual") if number % 2 else ("hourly",)
        before = dumps(machine)
        assert machine.run("agent", "backup", *tiers, action="kill", at=at, nth=int(nth)).code == -9
        wait_for(functools.partial(is_left_alone, machine))
        assert machine.run("agent", "backup", "hourly", "--json").must().json["backups"], step
        # The second run's own; and the killed one's too, in its tiers and once, if it came so far as to hand it over.
        expected = [{"hourly"}, set(tiers)] if at in HANDED_OVER else [{"hourly"}]
        wait_for(functools.partial(has_dumps, machine, len(before) + len(expected)))
        made = [found for name, found in dumps(machine).items() if name not in before]
        assert sorted(made, key=len) == sorted(expected, key=len), step
    machine.assert_whole()
    # What a killed run could not say itself, the next has said for it.
    machine.run("agent", "backup").must()
    wait_for(functools.partial(is_settled, machine))
    assert len(told(machine)) == sum(step.partition("#")[0] not in (*BEFORE, *HANDED_OVER) for step in steps)


@pytest.mark.parametrize("step", ["run.began", "dump.pg_dump-ended", "dump.assembled"])
def test_ended_in_its_course_a_run_clears_up_and_reports(machine: Machine, vault: Service, step: str) -> None:
    result = machine.run("agent", "backup", "daily", action="term", at=step)
    assert result.code == 143, result.stderr
    assert result.seconds < 5
    assert [name for name in staged(machine) if not name.endswith(".failed")] == []
    wait_for(lambda: "backup interrupted" in told(machine))


def test_killed_in_staging_that_is_swept_by_nobody_else(machine: Machine, tmp_path: Path) -> None:
    """A run that waits its turn leaves the one under way alone."""
    machine.root.mkdir()
    gate = tmp_path / "gate"
    with paused(machine, gate, "agent", "backup", at="dump.pg_dump-started") as running:
        (partial,) = staged(machine)
        assert machine.run("agent", "backup", "--wait", "0").code == 9
        assert staged(machine) == [partial]
        running.terminate()
    assert finish(running).code == 143


def test_a_full_staging_area_is_reported_and_left_empty(
    machine_on: Callable[..., Machine], scratch: Path, loop_filesystem: clusters.LoopFilesystem
) -> None:
    small = machine_on("ext4", 24, BACKUP_SPOOL_COMPRESSION="never", PGKEEP_RESERVE="0")
    small.root.mkdir()
    with clusters.temporary_database(small.database.cluster) as large:
        large.execute("CREATE TABLE noise AS SELECT sha512(n::text::bytea) AS one FROM generate_series(1, 300000) AS n")
        before = shutil.disk_usage(small.root).free
        result = small.run("agent", "backup", "daily", environment={"DB_NAME": large.name})
    assert result.code == 6, result.stderr
    assert "Traceback" not in result.stderr
    assert [name.partition(".")[2] for name in staged(small)] == ["failed"], "its data is gone, the report is there"
    assert before - shutil.disk_usage(small.root).free < 100_000
    with serving_vault(environment_of(small), small.root):
        wait_for(lambda: told(small) == ["backup failed"])
        wait_for(functools.partial(is_settled, small))
