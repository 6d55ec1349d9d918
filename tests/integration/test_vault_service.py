"""The vault's service as a process: it seals, answers, expires, tells how it is, and ends when it is told to."""

from __future__ import annotations

import datetime as dt
import json
import os
import pwd
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pgkeep.adapters import clock, privileges
from pgkeep.domain import health, mailbox
from pgkeep.domain.mailbox import Outcome
from pgkeep.domain.names import Tier
from pgkeep.progress import Silent
from pgkeep.vault import condition, intake, outcomes
from pgkeep.vault.layout import IDENTITY_NAME, Layout, Vault
from tests import clusters
from tests.vault_daemon import USER, Daemon, daemon, system_python

IDLE_SECONDS = 3.0


@pytest.fixture
def vault() -> Iterator[Daemon]:
    clusters.need_root("becoming another user")
    with daemon() as own:
        yield own


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """Running, for tests that leave it as it is."""
    clusters.need_root("becoming another user")
    with daemon() as own:
        own.start()
        own.until(own.layout.health.exists)
        yield own


# ---------------------------------------------------------------- what it does


def test_a_dump_is_sealed_under_every_tier_that_is_due(shared: Daemon) -> None:
    identifier = shared.stage(Tier.HOURLY, Tier.DAILY, Tier.WEEKLY)
    outcome = shared.outcome(identifier)
    assert outcome.state == "sealed"
    assert [name.tier for name in outcome.names] == [Tier.HOURLY, Tier.DAILY, Tier.WEEKLY]
    paths = [shared.layout.active / name.path for name in outcome.names]
    assert len({path.stat().st_ino for path in paths}) == 1
    facts = paths[0].stat()
    assert (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (pwd.getpwnam(USER).pw_uid, 0o440)
    shared.assert_whole()
    shared.take_away(identifier)
    shared.until(lambda: identifier not in shared.outcomes())


def test_the_outcome_can_be_read_by_everybody_and_written_by_nobody_else(shared: Daemon) -> None:
    identifier = shared.stage()
    shared.outcome(identifier)
    path = shared.layout.outcomes / mailbox.outcome_name(identifier)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert stat.S_IMODE(shared.layout.outcomes.stat().st_mode) == 0o755
    assert shared.layout.outcomes.stat().st_uid == pwd.getpwnam(USER).pw_uid
    shared.take_away(identifier)


def test_what_exceeds_its_tier_is_sealed_as_manual_and_the_outcome_says_why(shared: Daemon) -> None:
    identifier = shared.stage(Tier.YEARLY)
    outcome = shared.outcome(identifier)
    assert [name.tier for name in outcome.names] == [Tier.MANUAL]
    assert outcome.message == "yearly: the vault's schedule has it switched off"
    shared.take_away(identifier)


def test_a_failure_of_the_agents_is_written_down_and_is_a_problem_until_a_backup_is_sealed(shared: Daemon) -> None:
    identifier = shared.report("pg_dump: \x1b[31merror\n")
    assert shared.outcome(identifier).state == "noted"
    (record,) = [each for each in shared.audit() if each.get("id") == identifier]
    assert (record["event"], record["of"], record["told_by"]) == ("backup failed", "app", "agent")
    shared.until(lambda: "pg_dump" in shared.problems())
    good = shared.stage()
    shared.outcome(good)
    shared.until(lambda: "pg_dump" not in shared.problems())
    assert "\x1b" not in shared.said()
    shared.take_away(identifier, mailbox.FAILED_SUFFIX)
    shared.take_away(good)


def test_an_interrupted_run_has_an_event_of_its_own(shared: Daemon) -> None:
    identifier = shared.report(interrupted=True)
    shared.outcome(identifier)
    assert [each["event"] for each in shared.audit() if each.get("id") == identifier] == ["backup interrupted"]
    shared.take_away(identifier, mailbox.FAILED_SUFFIX)


def test_the_agents_wish_for_a_clean_up(shared: Daemon) -> None:
    identifier = shared.ask()
    outcome = shared.outcome(identifier)
    assert outcome.state == "done"
    assert re.fullmatch(r"0 removed, \d+ kept", outcome.message)
    shared.take_away(identifier, mailbox.ASKED_SUFFIX)


def test_clean_up_beside_the_service_goes_through_its_inbox(shared: Daemon) -> None:
    """By root, as `docker exec` is: it becomes the vault's user, which has no right to lift a flag by itself."""
    shared.outcome(shared.stage())
    done = shared.run("cleanup", "--json")
    assert done.returncode == 0, done.stderr
    decisions = json.loads(done.stdout)
    assert sorted(each["id"] for each in decisions) == sorted(each.manifest.id for each in shared.backups())
    assert {each["keep"] for each in decisions} == {True}
    assert os.listdir(shared.layout.inbox) == []


def test_what_has_expired_goes_and_the_audit_log_says_so(vault: Daemon) -> None:
    vault.environment |= {"BACKUP_RETENTION_HOURLY_DAYS": "1", "BACKUP_RETENTION_KEEP_MINIMUM": "1"}
    vault.start(days_ago=10)
    old, newer = sorted((vault.stage(), vault.stage()))
    vault.outcome(old)
    vault.outcome(newer)
    vault.stop()
    vault.start()
    vault.until(lambda: vault.names_of(old) == [])
    vault.until(lambda: "is overdue" in vault.problems())
    assert vault.names_of(newer) == [Tier.HOURLY]
    assert [each["event"] for each in vault.audit() if each.get("id") == old] == ["sealed", "expiring", "expired"]
    vault.assert_whole()


def test_it_works_with_the_rights_that_it_says(shared: Daemon) -> None:
    shared.until(lambda: "is open" in shared.said())
    own = privileges.standing(shared.pid)
    assert set(own.uids) == {pwd.getpwnam(USER).pw_uid}
    assert own.permitted == own.effective == 1 << privileges.CAP_LINUX_IMMUTABLE
    assert (own.inheritable, own.ambient, own.bounding, own.no_new_privileges) == (0, 0, 0, True)
    (child,) = _children(shared.pid)
    inspector = privileges.standing(child)
    assert set(inspector.uids) == set(inspector.gids) == {privileges.NOBODY}
    assert inspector.groups == ()
    assert (inspector.permitted, inspector.effective, inspector.bounding, inspector.ambient) == (0, 0, 0, 0)


def test_at_rest_it_takes_next_to_nothing(shared: Daemon) -> None:
    shared.until(lambda: "is open" in shared.said())
    time.sleep(0.5)
    before = _ticks(shared.pid)
    time.sleep(IDLE_SECONDS)
    # Hundredths of a second: half a percent of a processor, and one for the clock's coarseness.
    assert _ticks(shared.pid) - before <= 0.5 * IDLE_SECONDS + 1
    assert _resident_bytes(shared.pid) < 50_000_000


# ---------------------------------------------------------------- its life


def test_told_to_end_at_rest_it_ends_at_once(vault: Daemon) -> None:
    vault.start()
    vault.until(lambda: "is open" in vault.said())
    (inspector,) = _children(vault.pid)
    code, seconds = vault.stop()
    assert code == 0
    assert seconds < 2
    assert vault.said().rstrip().endswith("stopped")
    assert not Path(f"/proc/{inspector}").exists()


@pytest.mark.parametrize("step", ["seal.copied", "seal.linked-dump", "seal.linked.manifest.json", "vault.decided"])
def test_told_to_end_in_the_middle_of_a_sealing(vault: Daemon, step: str) -> None:
    """What was begun is undone or finished on the way out; the next start comes to the same in the end."""
    gate = vault.root.parent / "gate"
    vault.root.parent.chmod(0o777)
    identifier = vault.stage(Tier.HOURLY, Tier.DAILY)
    vault.start(action="pause", at=step, gate=str(gate))
    vault.until(gate.exists)
    code, seconds = vault.stop()
    assert (code, seconds < 5) == (0, True), vault.said()
    gate.unlink()
    vault.assert_whole()
    assert os.listdir(vault.layout.journal) == []
    vault.start()
    assert {name.tier for name in vault.outcome(identifier).names} == {Tier.HOURLY, Tier.DAILY}
    assert sorted(vault.names_of(identifier)) == ["daily", "hourly"]
    vault.assert_whole()


def test_killed_the_inspector_goes_too(vault: Daemon) -> None:
    vault.start()
    vault.until(lambda: "is open" in vault.said())
    (inspector,) = _children(vault.pid)
    vault.stop(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{inspector}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_its_inspector_it_seals_nothing_and_ends_so_that_it_is_started_anew(vault: Daemon) -> None:
    vault.start()
    vault.until(lambda: "is open" in vault.said())
    (inspector,) = _children(vault.pid)
    os.kill(inspector, signal.SIGKILL)
    identifier = vault.stage()
    assert vault.wait() == 1
    assert "the process that looks into dumps is gone" in vault.said()
    assert vault.backups() == []
    vault.start()
    assert vault.outcome(identifier).state == "sealed"


def test_a_second_service_is_refused(vault: Daemon) -> None:
    vault.start(environment={"PGKEEP_LOG_FORMAT": "json"})
    vault.until(lambda: "is open" in vault.said())
    assert {json.loads(line)["role"] for line in vault.said().splitlines()} == {"vault"}
    done = vault.run("vault", "move", str(vault.root.parent / "elsewhere"))
    assert done.returncode == 9, done.stderr


def test_a_vault_of_a_newer_version_is_left_alone_and_can_be_read(vault: Daemon) -> None:
    vault.start()
    identifier = vault.stage()
    vault.outcome(identifier)
    vault.stop()
    identity = vault.layout.active / IDENTITY_NAME
    subprocess.run(["chattr", "-i", vault.layout.active, identity], check=True)
    identity.chmod(0o644)
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "format": 2}))
    vault.start()
    assert vault.wait() == 11
    assert "use a newer pgkeep" in vault.said()
    assert [each["id"] for each in json.loads(vault.run("list", "--json").stdout)] == [identifier]
    # As root: the tests' interpreter may lie where the vault's user can't read.
    assert vault.run("verify", "--all", "--json", environment={"PGKEEP_VAULT_USER": ""}).returncode == 0


def test_an_empty_directory_where_the_vault_was_is_not_taken_for_a_new_one(vault: Daemon) -> None:
    """The volume is not mounted: to begin anew would hide that, and the disk below would fill."""
    vault.start()
    vault.until(lambda: "is open" in vault.said())
    vault.stop()
    hidden = vault.root / "hidden"
    subprocess.run(["chattr", "-i", vault.layout.active], check=True)
    vault.layout.active.rename(hidden)
    vault._prepare()
    vault.start()
    assert vault.wait() == 11
    assert "holds no vault" in vault.said()
    assert "is it mounted?" in vault.said()
    assert os.listdir(vault.layout.active) == []


def test_a_vault_that_has_moved_is_served_at_its_new_place_only(vault: Daemon) -> None:
    vault.environment["PGKEEP_VAULT_USER"] = ""
    vault.start()
    identifier = vault.stage()
    vault.outcome(identifier)
    vault.stop()
    new = vault.root.parent / "new"
    moved = vault.run("vault", "move", str(new))
    assert moved.returncode == 0, moved.stderr
    vault.start()
    assert vault.wait() == 11
    assert f"was moved from here to {new}" in vault.said()
    with daemon(new, user=None) as there:
        there.start()
        other = there.stage()
        assert there.outcome(other).state == "sealed"
        assert there.names_of(identifier) == [Tier.HOURLY]


def test_something_is_mounted_over_the_vault_while_it_runs(vault: Daemon) -> None:
    vault.start()
    vault.until(lambda: "is open" in vault.said())
    with clusters.mounted_filesystem("tmpfs", 4) as other:
        subprocess.run(["mount", "--bind", other, vault.layout.active], check=True)
        try:
            vault.stage()
            assert vault.wait() == 11
            assert "is not the directory any more that was opened" in vault.said()
            assert os.listdir(other) == []
        finally:
            subprocess.run(["umount", vault.layout.active], check=True)


def test_started_without_the_capability_it_names_the_line_to_mend(vault: Daemon) -> None:
    weaker = ("setpriv", "--bounding-set=-linux_immutable", "--inh-caps=-linux_immutable")
    command = [*weaker, *_command("vault")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=vault._environment(None))
    assert done.returncode == 6
    assert "cap_add: [LINUX_IMMUTABLE]" in done.stderr


def test_without_the_capability_the_weaker_protection_can_be_chosen(vault: Daemon) -> None:
    vault.environment["PGKEEP_PROTECTION"] = "mode"
    weaker = ("setpriv", "--bounding-set=-linux_immutable", "--inh-caps=-linux_immutable")
    with vault.log.open("ab") as log:
        command = [*weaker, *_command("vault")]
        vault._running = subprocess.Popen(command, stdout=log, stderr=log, env=vault._environment(None))
    identifier = vault.stage()
    assert vault.outcome(identifier).state == "sealed"
    assert [backup.manifest.protection for backup in vault.backups()] == ["mode"]
    assert "read-only, not immutable" in vault.said()
    assert vault.problems() == ""


def test_started_by_an_ordinary_user_it_works_and_says_what_is_weaker() -> None:
    clusters.need_root("becoming another user")
    person = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", system_python())
    with daemon(user=None, owner=USER, program=person) as own:
        own.root.parent.chmod(0o755)
        identifier = own.stage()
        own.start()
        assert own.outcome(identifier).state == "sealed"
        assert "not root: the process that looks into dumps has the same user" in own.said()
        assert [backup.manifest.protection for backup in own.backups()] == ["mode"]
        (inspector,) = _children(own.pid)
        assert privileges.standing(inspector).no_new_privileges


def test_as_the_images_run_it_service_and_inspector_take_little_memory() -> None:
    """With an interpreter that nobody may read, as in the images, the inspector loads what it needs when asked."""
    clusters.need_root("becoming another user")
    with daemon(program=(system_python(),)) as own:
        identifier = own.stage()
        own.start()
        assert own.outcome(identifier).state == "sealed"
        (inspector,) = _children(own.pid)
        assert _resident_bytes(inspector) < 20_000_000
        assert _resident_bytes(own.pid) + _resident_bytes(inspector) < 55_000_000
        assert own.stop()[0] == 0


# ---------------------------------------------------------------- what it says of itself


def test_it_is_healthy_and_says_so(shared: Daemon) -> None:
    shared.until(lambda: shared.health().role == "vault")
    assert shared.health().pid == shared.pid


def test_the_health_file_is_written_while_the_main_thread_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "INTERVAL_SECONDS", 0.05)
    layout = Layout(tmp_path)
    layout.state.mkdir()
    with condition.Heartbeat(layout, condition.Pulse(Silent())):
        before = health.decode(layout.health.read_bytes()).time
        time.sleep(0.3)
        assert health.decode(layout.health.read_bytes()).time > before
    time.sleep(0.1)
    ended = layout.health.read_bytes()
    time.sleep(0.1)
    assert layout.health.read_bytes() == ended


def test_a_tier_that_is_overdue() -> None:
    now = dt.datetime(2026, 7, 1, 12, 40, tzinfo=dt.UTC)
    hourly, daily = {Tier.HOURLY: "0 * * * *"}, {Tier.DAILY: "0 0 * * *"}
    made = now - dt.timedelta(days=3)
    assert list(condition.overdue(hourly, "UTC", [], now - dt.timedelta(minutes=41), now)) != []
    assert list(condition.overdue(hourly, "UTC", [], now - dt.timedelta(minutes=39), now)) == []
    assert "there is none" in next(condition.overdue(daily, "UTC", [], made, now))


def test_what_nobody_moves_is_a_problem(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.state.mkdir()
    pulse = condition.Pulse(Silent())
    heart = condition.Heartbeat(layout, pulse)
    heart.beat()
    assert b"nothing has moved" not in layout.health.read_bytes()
    pulse.last -= condition.SILENCE_SECONDS + 1
    heart.beat()
    assert b"nothing has moved for 15 minutes" in layout.health.read_bytes()


def test_a_full_disk_is_said_at_once_and_the_same_dump_tried_again(loop_filesystem: clusters.LoopFilesystem) -> None:
    place = loop_filesystem("ext4", 16)
    with daemon(place / "root", PGKEEP_RESERVE="8MiB") as own:
        own.start()
        own.until(own.layout.health.exists)
        filler = place / "filler"
        filler.write_bytes(b"x" * 9 * 1024 * 1024)
        identifier = own.stage()
        own.until(lambda: "could not be sealed" in own.problems() and "bytes free" in own.problems())
        assert own.outcomes() == []
        filler.unlink()
        assert own.outcome(identifier).state == "sealed"
        own.until(lambda: own.problems() == "")
        own.assert_whole()
        subprocess.run(["chattr", "-R", "-f", "-i", "-a", place])


def test_a_failure_is_told_after_some_tries_and_tried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    entry = layout.staging / "20260101T000000Z-aaaaaa.ready"
    for directory in (entry, layout.outcomes):
        directory.mkdir(parents=True)
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    own = outcomes.Outcomes(Vault(layout, "none"))
    failed = Outcome(id=entry.stem, state="failed", time=clock.now())
    published = layout.outcomes / f"{entry.stem}.json"
    for seconds in outcomes.QUICK_RETRIES_SECONDS:
        assert own.is_open(entry.stem)
        own.publish(failed)
        assert not published.exists()
        now[0] += seconds - 0.1
        assert not own.is_open(entry.stem), "it is not time yet"
        now[0] += 0.2
    own.publish(failed)
    assert published.exists()
    again = outcomes.Outcomes(Vault(layout, "none"))
    now[0] += 59
    assert not own.is_open(entry.stem)
    assert not again.is_open(entry.stem), "another start remembers that it was told"
    now[0] += 2
    assert own.is_open(entry.stem)
    assert again.is_open(entry.stem)
    own.publish(msgspec.structs.replace(failed, state="sealed"))
    assert mailbox.decode_outcome(published.read_bytes()).state == "sealed"
    now[0] += 7200
    assert not own.is_open(entry.stem)
    entry.rmdir()
    own.tidy()
    assert not published.exists()


def test_what_is_tried_again_counts_as_answered(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.outcomes.mkdir(parents=True)
    own = outcomes.Outcomes(Vault(layout, "none"))
    for number in range(outcomes.LIMIT):
        assert not own.is_full
        own.publish(Outcome(id=f"20260101T000000Z-{number:06x}", state="failed", time=clock.now()))
    assert own.is_full
    own.tidy()
    assert not own.is_full


def test_pauses_between_tries_grow_to_an_hour() -> None:
    quick = len(outcomes.QUICK_RETRIES_SECONDS)
    assert sum(outcomes.QUICK_RETRIES_SECONDS) < 60, "the agent waits, and holds its lock"
    assert [outcomes._delay_seconds(quick + tries) for tries in (1, 2, 3, 7, 100)] == [60, 120, 240, 3600, 3600]


def test_work_that_breaks_the_whole_service_off_is_given_up_in_the_end(vault: Daemon) -> None:
    identifier = vault.stage()
    vault.start(action="kill", at="seal.copied")
    assert vault.wait() == -9
    attempts = vault.layout.state / "attempts.json"
    assert json.loads(attempts.read_text()) == {identifier: 1}
    attempts.write_text(json.dumps({identifier: intake.ATTEMPTS}))
    good = vault.stage(id="20991231T235959Z-000000")
    vault.start()
    outcome = vault.outcome(identifier)
    assert outcome.state == "refused"
    assert "broke off 5 times" in outcome.message
    assert vault.outcome(good).state == "sealed"


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pgkeep", *arguments]


def _children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
