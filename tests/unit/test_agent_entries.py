"""What lies in staging for the vault, and what the agent knows of the vault from names alone."""

from __future__ import annotations

import datetime as dt
import os
import stat
from pathlib import Path

import pytest

from pgkeep.adapters import clock
from pgkeep.agent import backups, cron_log, entries, state
from pgkeep.agent.cron_log import CronLog
from pgkeep.agent.handover import Staged
from pgkeep.domain import mailbox, names
from pgkeep.domain.mailbox import Ask, Failure, Outcome
from pgkeep.domain.names import Tier
from pgkeep.errors import FormatError, StorageError

NOW = dt.datetime(2026, 11, 23, 12, 0, tzinfo=dt.UTC)


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def step(self, name: str) -> None:
        pass

    def advance(self, done_bytes: int, total_bytes: int | None) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    path = tmp_path / "staging"
    path.mkdir()
    return path


@pytest.fixture
def active(tmp_path: Path) -> Path:
    path = tmp_path / "active"
    (path / mailbox.OUTCOMES_DIRECTORY).mkdir(parents=True)
    return path


def failure(identifier: str | None = None) -> Failure:
    return Failure(
        id=identifier or names.new_identifier(NOW), tiers=(Tier.DAILY,), subject="app", reason="gone", failed_at=NOW
    )


def answer(active: Path, identifier: str, state: str = "noted", message: str = "") -> None:
    outcome = Outcome(id=identifier, state=state, time=NOW, message=message)  # type: ignore[arg-type]
    path = active / mailbox.OUTCOMES_DIRECTORY / mailbox.outcome_name(identifier)
    path.write_bytes(mailbox.encode(outcome))


# ---------------------------------------------------------------- leaving and taking back


def test_a_report_is_what_the_vault_reads_with_the_modes_that_let_it(staging: Path) -> None:
    previous = os.umask(0o077)
    try:
        entries.report(staging, failure("20261123T120000Z-abcdef"), Listener())
    finally:
        os.umask(previous)
    entry = staging / "20261123T120000Z-abcdef.failed"
    assert stat.S_IMODE(entry.stat().st_mode) == 0o750
    assert stat.S_IMODE((entry / "failure.json").stat().st_mode) == 0o640
    assert mailbox.decode_failure((entry / "failure.json").read_bytes()) == failure(entry.stem)
    assert [path.name for path in staging.iterdir()] == [entry.name]


def test_a_report_that_can_not_be_left_is_said_and_leaves_nothing_half(staging: Path) -> None:
    (staging / "20261123T120000Z-abcdef.failed").mkdir()
    (staging / "20261123T120000Z-abcdef.failed" / "something").touch()
    listener = Listener()
    entries.report(staging, failure("20261123T120000Z-abcdef"), listener)
    assert len(listener.warnings) == 1
    assert not [path for path in staging.iterdir() if path.name.startswith(".")]


def test_reports_that_nobody_takes_are_bounded(staging: Path) -> None:
    listener = Listener()
    for _ in range(entries.REPORTS_WAITING_LIMIT + 5):
        entries.report(staging, failure(), listener)
    assert len(list(staging.iterdir())) == entries.REPORTS_WAITING_LIMIT
    assert len(listener.warnings) == 5


def test_only_the_agents_own_entries_count(staging: Path) -> None:
    good = "20261123T120000Z-abcdef.ready"
    (staging / good).mkdir()
    for name in (".lock", "20261123T120000Z-abcdeg.ready", "20261123T120000Z-abcdef.partial", "x.failed", "a.ready.b"):
        (staging / name).mkdir()
    (staging / "20261123T120001Z-abcdef.failed").touch()
    (staging / "20261123T120002Z-abcdef.asked").symlink_to(staging / good)
    assert [entry.path.name for entry in entries.waiting(staging)] == [good]


def test_what_was_answered_goes_and_the_rest_stays(staging: Path, active: Path) -> None:
    first, second = (
        entries.post(staging, f.id, ".failed", "failure.json", mailbox.encode(f)) for f in (failure(), failure())
    )
    answer(active, first.stem)
    assert [outcome.id for outcome in entries.collect(staging, active)] == [first.stem]
    assert (first.exists(), second.exists()) == (False, True)


def test_an_answer_that_somebody_waits_for_is_left_to_him(staging: Path, active: Path) -> None:
    ask = Ask(id=names.new_identifier(NOW), command="cleanup", asked_at=NOW)
    with entries.asked(staging, ask):
        answer(active, ask.id, "done")
        assert entries.collect(staging, active) == []
        assert entries.wait_for_outcome(active, ask.id, 1.0, Listener()).state == "done"
    assert list(staging.iterdir()) == []


def test_a_wish_whose_asker_was_killed_goes_with_its_answer(staging: Path, active: Path) -> None:
    ask = Ask(id=names.new_identifier(NOW), command="cleanup", asked_at=NOW)
    left = entries.post(staging, ask.id, ".asked", "ask.json", mailbox.encode(ask))
    answer(active, ask.id, "done")
    assert [outcome.state for outcome in entries.collect(staging, active)] == ["done"]
    assert not left.exists()


def test_no_answer_in_time_is_an_error_of_its_own(active: Path) -> None:
    with pytest.raises(entries.VaultSilentError, match="has not answered") as caught:
        entries.wait_for_outcome(active, names.new_identifier(NOW), 0.3, Listener())
    assert caught.value.exit_code == 12
    assert "backup-vault" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"id": 1}', b"\xff", b" " * (mailbox.SIZE_LIMIT_BYTES + 1)])
def test_an_answer_that_is_none_is_refused(active: Path, data: bytes) -> None:
    identifier = names.new_identifier(NOW)
    (active / mailbox.OUTCOMES_DIRECTORY / mailbox.outcome_name(identifier)).write_bytes(data)
    with pytest.raises(FormatError):
        entries.read_outcome(active, identifier)


def test_a_link_is_no_answer(active: Path, tmp_path: Path) -> None:
    identifier = names.new_identifier(NOW)
    answer(active, identifier)
    path = active / mailbox.OUTCOMES_DIRECTORY / mailbox.outcome_name(identifier)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError):
        entries.read_outcome(active, identifier)


def test_leavings_of_killed_writers_are_swept_and_nothing_else(staging: Path) -> None:
    (staging / ".pgkeep-temporary-0123").mkdir()
    (staging / ".pgkeep-temporary-0123" / "failure.json").touch()
    (staging / ".pgkeep-temporary-4567").touch()
    (staging / ".lock").touch()
    entries.sweep_unfinished(staging)
    assert [path.name for path in staging.iterdir()] == [".lock"]


def test_what_is_foreseen_outlives_another_try_and_is_not_handed_over(staging: Path) -> None:
    identifier = names.new_identifier(NOW)
    staged = Staged(staging, identifier)
    staged.foresee(failure(identifier))
    (staged.directory / "raw").mkdir()
    (staged.directory / "pool").touch()
    staged.clear()
    assert [path.name for path in staged.directory.iterdir()] == ["failure.json"]


# ---------------------------------------------------------------- what there is


def test_the_newest_backup_is_read_from_the_names_that_have_a_manifest(active: Path) -> None:
    daily = active / "daily"
    daily.mkdir()
    for name in (
        "2026-11-20_00-00-05.sql.gz.manifest.json",
        "2026-11-21_00-00-05.shop%2Eeu.sql.gz.manifest.json",
        "2026-11-22_00-00-05.sql.gz",
        "2026-13-41_00-00-05.sql.gz.manifest.json",
        "*.sql.gz",
        "2026-11-23_00-00-05.sql.gz.sha256",
    ):
        (daily / name).touch()
    expected = dt.datetime(2026, 11, 21, 0, 0, 5, tzinfo=dt.UTC)
    assert backups.newest(active, (Tier.DAILY, Tier.WEEKLY)) == {Tier.DAILY: expected, Tier.WEEKLY: None}
    assert backups.is_backed_up(daily, "shop.eu", expected)
    assert not backups.is_backed_up(daily, "shop.eu", expected + dt.timedelta(seconds=1))
    assert not backups.is_backed_up(daily, "other", expected)
    assert backups.is_backed_up(daily, None, expected)


def test_a_directory_that_can_not_be_listed_is_an_error_and_not_an_empty_one(active: Path) -> None:
    (active / "daily").touch()
    with pytest.raises(StorageError):
        backups.newest(active, (Tier.DAILY,))


# ---------------------------------------------------------------- memory and log


@pytest.mark.parametrize("data", [None, b"", b"{", b"null", b'{"handled": {"hourly": "yesterday"}}', b"\xff\xfe"])
def test_a_lost_or_broken_memory_is_a_new_one(staging: Path, data: bytes | None) -> None:
    if data is not None:
        (staging / state.FILE_NAME).write_bytes(data)
    assert state.load(staging, NOW) == state.State(first_started_at=NOW)


def test_memory_survives(staging: Path) -> None:
    kept = state.State(first_started_at=NOW, handled={Tier.DAILY: NOW}, pending={Tier.HOURLY: NOW}, unended=2)
    state.save(staging, kept)
    assert state.load(staging, clock.now()) == kept


def test_the_log_is_cut_at_the_beginning_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "cron.log"
    path.write_bytes(b"".join(b"%07d\n" % number for number in range(cron_log.SIZE_LIMIT_BYTES // 8)))
    inode = path.stat().st_ino
    warnings: list[str] = []
    CronLog(path, warnings.append).append("the last")
    lines = path.read_text().splitlines()
    assert lines[-2:] == [f"{cron_log.SIZE_LIMIT_BYTES // 8 - 1:07d}", "the last"]
    assert all(len(line) == 7 for line in lines[:-1])
    assert cron_log.KEPT_BYTES - 8 <= path.stat().st_size <= cron_log.KEPT_BYTES + 16
    assert path.stat().st_ino == inode, "its directory is not ours to make another in"
    assert not warnings


def test_a_log_that_can_not_be_written_is_complained_of_once(tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "target").touch()
    (tmp_path / "cron.log").symlink_to(tmp_path / "target")
    log = CronLog(tmp_path / "cron.log", warnings.append)
    log.append("one")
    log.append("two")
    assert len(warnings) == 1
    assert (tmp_path / "target").read_bytes() == b""
    (tmp_path / "cron.log").unlink()
    log.append("three")
    assert (tmp_path / "cron.log").read_text() == "three\n"
