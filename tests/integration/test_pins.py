"""A required destination that has not got the newest backups: they stay, some of them, until it has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.names import Tier
from pgkeep.extractor import audit
from tests import clusters
from tests.vault_daemon import Daemon, daemon

PINS: dict[str, Any] = {
    "PGKEEP_REQUIRED_DESTINATIONS": "external",
    "BACKUP_RETENTION_MANUAL_DAYS": "1",
    "BACKUP_RETENTION_KEEP_MINIMUM": "2",
}


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Daemon]:
    """Not running; it holds six dumps whose time was over nine days ago, the oldest first."""
    clusters.need_root("becoming another user")
    with daemon(EXTERNAL_DIRECTORY=str(tmp_path), **PINS) as own:
        seal(own, *[Tier.MANUAL] * 6)
        assert len(own.backups()) == 6
        yield own


def seal(vault: Daemon, *tiers: Tier) -> None:
    """A dump for each, ten days ago."""
    vault.start(days_ago=10)
    for tier in tiers:
        identifier = vault.stage(tier)
        assert [name.tier for name in vault.outcome(identifier).names] == [tier]
        shutil.rmtree(vault.entry(identifier))
    vault.stop()


def say(vault: Daemon, event: Any, backup: SealedBackup, **more: Any) -> None:
    """What the extractor writes down."""
    manifest = backup.manifest
    details = {"path": backup.path_in_vault, "id": manifest.id, "sha256": manifest.sha256} | more
    audit.record(vault.layout.extraction_audit, event, destination_name="external", **details)


def held(vault: Daemon, before: list[SealedBackup]) -> list[int]:
    """Which of those of before are left, counted from the oldest."""
    left = {each.path_in_vault for each in vault.backups()}
    return [number for number, each in enumerate(before, 1) if each.path_in_vault in left]


def until_expired(vault: Daemon, count: int) -> None:
    vault.until(lambda: len(expired(vault)) >= count)


def expired(vault: Daemon) -> list[str]:
    return [each["path"] for each in vault.audit() if each["event"] == "expired"]


def oldest_first(vault: Daemon) -> list[SealedBackup]:
    return sorted(vault.backups(), key=lambda backup: backup.manifest.sealed_at)


def clean_up(vault: Daemon, *arguments: str) -> dict[str, str]:
    """The rules by path below ``active/``."""
    done = vault.run("cleanup", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {os.path.relpath(each["path"], vault.layout.active): each["rule"] for each in json.loads(done.stdout)}


def test_the_service_keeps_what_is_not_confirmed(vault: Daemon) -> None:
    backups = oldest_first(vault)
    for backup in backups[3:]:
        say(vault, "extracted", backup)
    vault.start()
    until_expired(vault, 2)
    assert held(vault, backups) == [2, 3, 5, 6]
    say(vault, "adopted", backups[2])
    say(vault, "extracted", backups[1], sha256="0" * 64)
    rules = clean_up(vault)
    assert rules[backups[1].path_in_vault] == "not-yet-copied"
    assert held(vault, backups) == [2, 5, 6]
    say(vault, "repaired", backups[1])
    clean_up(vault)
    assert held(vault, backups) == [5, 6]
    assert expired(vault) == [backups[number].path_in_vault for number in (0, 3, 2, 1)]


def test_a_log_that_can_not_be_read_is_a_problem_and_holds_up_no_more_than_that(vault: Daemon) -> None:
    """The newest two stay, and the service runs."""
    backups = oldest_first(vault)
    for backup in backups:
        say(vault, "extracted", backup)
    vault.layout.extraction_audit.unlink()
    os.mkfifo(vault.layout.extraction_audit)
    vault.start()
    until_expired(vault, 4)
    assert held(vault, backups) == [5, 6]
    vault.until(lambda: "no copy counts as confirmed" in vault.problems())
    identifier = vault.stage(Tier.MANUAL)
    assert vault.outcome(identifier).state == "sealed"


def test_cleanup_without_a_service(vault: Daemon) -> None:
    backups = oldest_first(vault)
    for backup in (backups[0], backups[3], backups[4], backups[5]):
        say(vault, "extracted", backup)
    done = vault.run("cleanup", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "kept: not yet at external (one of the newest 2 manual backups of app that are not)" in done.stdout
    assert "2 would be removed, 4 kept" in done.stderr
    assert len(vault.backups()) == 6
    clean_up(vault)
    assert held(vault, backups) == [2, 3, 5, 6]
    without = vault.run("cleanup", environment={"PGKEEP_REQUIRED_DESTINATIONS": ""})
    assert without.returncode == 0, without.stderr
    assert held(vault, backups) == [5, 6]


def test_what_the_extractor_has_copied_goes(vault: Daemon) -> None:
    """With the real one. Newer backups of another tier are what stays in any case."""
    vault.environment |= {"BACKUP_RETENTION_HOURLY_DAYS": "100"}
    backups = oldest_first(vault)
    seal(vault, Tier.HOURLY, Tier.HOURLY)
    assert sorted(clean_up(vault, "--dry-run").values()) == ["expired"] * 4 + ["not-yet-copied"] * 2 + ["retained"] * 2
    # In the deployment it has a user of its own.
    done = vault.run("extractor", "once", environment={"PGKEEP_VAULT_USER": ""})
    assert done.returncode == 0, done.stderr
    assert sorted(clean_up(vault, "--dry-run").values()) == ["expired"] * 6 + ["retained"] * 2
    clean_up(vault)
    assert held(vault, backups) == []
    # The head of the audit log went there too, and what was written since follows it.
    done = vault.run("audit", "verify", "--against", "external", environment={"PGKEEP_VAULT_USER": ""})
    assert done.returncode == 0, done.stderr
    assert "1 anchors at external; the log contradicts 0" in done.stderr
