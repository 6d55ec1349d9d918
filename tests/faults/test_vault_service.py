"""The vault's service cut off at every step: the next start recovers, and a dump is sealed once in each tier."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from pgkeep.domain.names import Tier
from tests import clusters
from tests.vault_daemon import Daemon, daemon

TWO = (Tier.HOURLY, Tier.DAILY)
THREE = (*TWO, Tier.WEEKLY)
PROTECTED = "seal.protected.manifest.json"


@pytest.fixture
def vault() -> Iterator[Daemon]:
    clusters.need_root("becoming another user")
    with daemon(user=None) as own:
        yield own


def steps_of(tiers: Sequence[Tier], root: Path | None = None) -> list[str]:
    """Every step of taking a dump in, with its number: ``seal.linked-dump#2``."""
    with daemon(root, user=None) as own:
        record = own.root.parent / "steps"
        identifier = own.stage(*tiers)
        own.start(record=str(record))
        own.outcome(identifier)
        own.until(lambda: "vault.answered" in record.read_text())
        own.stop()
        names = record.read_text().splitlines()
    names = names[: names.index("vault.answered") + 1]
    return [f"{name}#{names[: place + 1].count(name)}" for place, name in enumerate(names)]


def assert_sealed_once(own: Daemon, identifier: str, tiers: Sequence[Tier], step: str) -> None:
    outcome = own.outcome(identifier)
    assert outcome.state == "sealed", (step, outcome)
    assert sorted(name.tier for name in outcome.names) == sorted(tiers), step
    assert sorted(own.names_of(identifier)) == sorted(tiers), step
    sealed = [backup.manifest.id for backup in own.backups() if backup.manifest.staged_id == identifier]
    assert len(set(sealed)) == len(tiers), step
    for each in sealed:
        assert [record["event"] for record in own.audit() if record.get("id") == each].count("sealed") == 1, (
            step,
            each,
        )


def cut_off_at(own: Daemon, steps: Sequence[str], tiers: Sequence[Tier]) -> None:
    """Each step with a dump and a database of its own, so that no quota is met."""
    for number, step in enumerate(steps):
        name, _, nth = step.partition("#")
        identifier = own.stage(*tiers, database=f"d{number}")
        own.start(action="kill", at=name, nth=int(nth))
        assert own.wait() == -9, (step, own.said())
        own.start()
        assert_sealed_once(own, identifier, tiers, step)
        own.take_away(identifier)
        own.close()
    own.start()
    own.until(lambda: own.outcomes() == [])
    own.assert_whole()
    assert own.stop()[0] == 0
    assert os.listdir(own.layout.journal) == []
    assert sorted(os.listdir(own.layout.quarantine)) == []
    assert len(own.backups()) == len(steps) * len(tiers)


def test_killed_at_every_step_with_two_tiers(vault: Daemon) -> None:
    steps = steps_of(TWO)
    assert steps.count("seal.linked.manifest.json#2") == 1
    assert len(steps) > 20
    cut_off_at(vault, steps, TWO)


def test_killed_between_the_names_of_three_tiers(vault: Daemon) -> None:
    """What two tiers do not have: the second name is committed, the third is not yet."""
    cut_off_at(vault, ["seal.linked.manifest.json#2", "seal.linked.sha256#3", "seal.linked.manifest.json#3"], THREE)


def test_killed_again_and_again_with_one_dump(vault: Daemon) -> None:
    """Each start recovers what the one before left, and is cut off in its turn."""
    identifier = vault.stage(*TWO)
    for step in ("seal.linked-dump", "seal.linked.manifest.json", PROTECTED, "seal.audited"):
        vault.start(action="kill", at=step)
        assert vault.wait() == -9, step
    vault.start()
    assert_sealed_once(vault, identifier, TWO, "all")
    vault.assert_whole()


def test_killed_where_a_name_needs_a_copy(loop_filesystem: clusters.LoopFilesystem) -> None:
    """exFAT has neither links nor flags: every tier's name is a file of its own."""
    place = loop_filesystem("exfat", 16)
    steps = [step for step in steps_of(TWO, place / "trial") if "linked" in step or step.endswith("audited#1")]
    assert "seal.linked.manifest.json#2" in steps
    with daemon(place / "root", user=None) as own:
        cut_off_at(own, steps, TWO)
        assert {backup.manifest.protection for backup in own.backups()} == {"none"}


def test_a_disk_that_is_full_for_a_moment_leaves_nothing_and_costs_no_second_dump(vault: Daemon) -> None:
    for number, step in enumerate(("seal.copied", "seal.linked-dump", "seal.journal-written")):
        identifier = vault.stage(*TWO, database=f"d{number}")
        vault.start(action="full", at=step)
        vault.until(lambda: "could not be sealed" in vault.said())
        assert "disk is full" in vault.said()
        assert vault.names_of(identifier) == []
        assert subprocess.run(["lsattr", "-d", vault.layout.active / "hourly"], capture_output=True).stdout[4:5] == b"i"
        assert identifier not in vault.outcomes(), "the agent would make the dump anew"
        assert_sealed_once(vault, identifier, TWO, step)
        assert [each["event"] for each in vault.audit() if each.get("id") == identifier].count("sealing failed") == 1
        vault.until(lambda: vault.problems() == "")
        vault.stop()
        vault.log.unlink()
        vault.take_away(identifier)


def test_an_error_after_the_commit_is_no_failure(vault: Daemon) -> None:
    """The dump is sealed, whatever went wrong after; the outcome must say so, or the agent would make it again."""
    identifier = vault.stage(*TWO)
    vault.start(action="full", at="seal.audited")
    assert_sealed_once(vault, identifier, TWO, "seal.audited")
    vault.assert_whole()
