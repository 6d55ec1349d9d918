"""A dump for several tiers: one file under each tier's name, cut off anywhere, expiring name by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import clusters
from tests.faults.machine import Machine

TIERS = ("hourly", "daily", "weekly")
EXPIRY = {"BACKUP_RETENTION_HOURLY_DAYS": "1", "BACKUP_RETENTION_KEEP_MINIMUM": "1"}


def dumps(machine: Machine) -> list[Path]:
    return [machine.layout.active / backup.path_in_vault for backup in machine.backups()]


@pytest.fixture(scope="module")
def steps(database: clusters.Database) -> list[str]:
    """Every step with its number: each tier's linking and protecting is one of its own."""
    with clusters.scratch_directory() as directory:
        names = Machine(directory / "root", database).steps("backup", *TIERS, record=directory / "steps")
    assert [name for name in names if name.startswith("seal.linked.manifest")] == [
        f"seal.linked.manifest.json#{number}" for number in (1, 2, 3)
    ]
    return [name for name in names if name.startswith("seal.")]


def test_one_inode_under_each_tiers_name(machine: Machine) -> None:
    shown = machine.run("backup", *TIERS, "--json").must().json
    assert [each["tier"] for each in shown["backups"]] == list(TIERS)
    paths = dumps(machine)
    assert sorted(path.parent.name for path in paths) == sorted(TIERS)
    assert len({path.name for path in paths}) == 1
    assert len({path.stat().st_ino for path in paths}) == 1
    manifests = [backup.manifest for backup in machine.backups()]
    assert len({each.id for each in manifests}) == 3
    assert len({each.staged_id for each in manifests}) == 1
    ends = {each.type.value: each.retain_until for each in manifests}
    assert ends["hourly"] < ends["daily"] < ends["weekly"]  # type: ignore[operator]
    machine.assert_at_rest()
    machine.assert_whole()
    assert machine.run("verify", "--all", "--json").must().json["ok"]
    for each in manifests:
        assert machine.events(each.id) == ["sealed"]


@pytest.mark.parametrize("action", ["kill", "full"])
def test_cut_off_at_every_step_no_name_is_ever_half(machine: Machine, steps: list[str], action: str) -> None:
    machine.backup()
    for step in steps:
        name, _, number = step.partition("#")
        before = set(machine.identifiers())
        result = machine.run("backup", *TIERS, action=action, at=name, nth=int(number))
        assert result.code == {"kill": -9, "full": 6}[action], (step, result)
        machine.assert_whole(protected=action != "kill")
        if action == "full":
            machine.assert_at_rest()
        machine.backup()
        machine.assert_at_rest()
        machine.assert_whole()
        new = set(machine.identifiers()) - before
        for identifier in new:
            assert machine.events(identifier).count("sealed") == 1, step
    # Every name that a dump kept shares its inode with its sisters.
    by_digest = Counter(backup.manifest.sha256 for backup in machine.backups())
    inodes = {(backup.manifest.sha256, path.stat().st_ino) for backup, path in
              zip(machine.backups(), dumps(machine), strict=True)}  # fmt: skip
    assert len(inodes) == len(by_digest)


@pytest.mark.parametrize("step", ["expire.journal-written", "expire.unlinked", "expire.audited", "expire.removed"])
@pytest.mark.parametrize("action", ["kill", "full"])
def test_one_name_expires_and_the_others_stay_protected(
    scratch: Path, database: clusters.Database, step: str, action: str
) -> None:
    machine = Machine(scratch / "root", database, **EXPIRY)
    machine.backup()
    machine.run("backup", "hourly", "weekly", days_ago=3).must()
    machine.run("cleanup", action=action, at=step).must({"kill": -9, "full": 6}[action])
    machine.run("cleanup").must()
    machine.assert_at_rest()
    machine.assert_whole()
    assert sorted(backup.directory for backup in machine.backups()) == ["manual", "weekly"]


def test_killed_between_unlink_and_the_flags_return(scratch: Path, database: clusters.Database) -> None:
    """After any call of the removal: the weekly name may be bare for a moment, never after the next run."""
    for number in range(1, 60, 8):
        machine = Machine(scratch / f"root-{number}", database, **EXPIRY)
        machine.backup()
        machine.run("backup", "hourly", "weekly", days_ago=3).must()
        machine.run("cleanup", action="kill", at="call", nth=number)
        machine.run("cleanup").must()
        machine.assert_at_rest()
        assert sorted(backup.directory for backup in machine.backups()) == ["manual", "weekly"]


def test_where_a_file_has_one_name_only_each_tier_gets_a_copy(machine_on: Callable[..., Machine]) -> None:
    machine = machine_on("exfat", 64)
    machine.run("backup", *TIERS).must()
    paths = dumps(machine)
    assert sorted(path.parent.name for path in paths) == sorted(TIERS)
    assert len({path.read_bytes() for path in paths}) == 1
    machine.assert_whole()
