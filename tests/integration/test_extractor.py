"""One-way copies through the real command line: what is copied, and what befalls the sources and the copies."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import clock
from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.progress import Silent
from tests import outside
from tests.faults.machine import finish, paused
from tests.outside import SUFFIXES, Outside, Template, digest, spoil

DAY = dt.timedelta(days=1)
EXTRACTOR_USER, VAULT_GROUP = 10003, 10002
AS_EXTRACTOR = ("setpriv", f"--reuid={EXTRACTOR_USER}", f"--regid={EXTRACTOR_USER}", "--inh-caps=-all")


@pytest.fixture(scope="module")
def made(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made


@pytest.fixture
def own(made: Template, scratch: Path) -> Outside:
    return Outside(made, scratch)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> dict[str, dt.timedelta]:
    """What this process takes for the time: so much later than it is."""
    ahead = {"by": dt.timedelta(0)}
    real = clock.now
    monkeypatch.setattr(clock, "now", lambda: real() + ahead["by"])
    return ahead


# Copying


def test_every_backup_is_copied_once_and_by_day(own: Outside) -> None:
    first = own.once()
    assert sorted(first["extracted"]) == own.sources()
    own.assert_whole()
    assert len(own.sources()) == 4
    assert {path.stat().st_mode & 0o777 for path in own.external.rglob("*.sql.gz*")} == {0o444}
    inodes = {path: path.stat().st_ino for path in own.external.rglob("*")}
    again = own.once()
    assert again | {"ok": True} == {**first, "extracted": []}
    assert {path: path.stat().st_ino for path in own.external.rglob("*")} == inodes
    assert own.events() == ["destination adopted", *["extracted"] * 4]
    shown = next(record for record in own.audit() if record["event"] == "extracted")
    assert shown["copy"] == str(own.copy(shown["path"]))
    assert shown["sha256"] == digest(own.copy(shown["path"]))


def test_the_mode_is_a_setting(own: Outside) -> None:
    own.once(environment={"EXTERNAL_MODE": "0400"})
    assert {path.stat().st_mode & 0o777 for path in own.external.rglob("*.sql.gz*")} == {0o400}


def test_a_new_backup_is_all_that_is_copied_next(own: Outside) -> None:
    own.once()
    new = own.bring_new(own.source("daily"), DAY)
    assert own.once()["extracted"] == [new]
    own.assert_whole()


def test_a_copy_outlives_its_backup(own: Outside) -> None:
    own.once()
    expected = own.expected(*own.sources())
    for path in own.sources():
        own.expire(path)
    assert own.once()["ok"]
    assert own.files() == expected


def test_before_there_is_a_vault_the_pass_says_so(scratch: Path, made: Template) -> None:
    own = Outside(made, scratch)
    (own.active / "vault.json").unlink()
    assert "no vault" in own.run("once", code=10)
    assert own.files() == set()
    assert own.audit() == []


# Sources that are not what they should be


def test_a_damaged_source_is_never_copied_and_the_others_are(own: Outside) -> None:
    bad = own.source("hourly")
    spoil(own.active / bad)
    shown = own.once(7)
    assert [trouble["path"] for trouble in shown["troubles"]] == [bad]
    assert "not what its manifest says" in shown["troubles"][0]["message"]
    own.assert_whole(*(path for path in own.sources() if path != bad))
    for _ in range(2):
        own.once(7)
    assert own.events(bad) == ["extraction failed"]


def test_the_service_reads_a_damaged_source_once_a_day(own: Outside, later: dict[str, dt.timedelta]) -> None:
    bad = own.source("manual")
    spoil(own.active / bad)
    # The spread of looks at the good copies must not come between.
    extractor, read = own.extractor(EXTERNAL_RECHECK_DAYS="365"), []

    class Counting(Silent):
        def advance(self, done_bytes: int, total_bytes: int | None) -> None:
            if (total_bytes or 0) > 1000:  # the daily anchor is no backup
                read.append(done_bytes)

    assert [failure.path for failure in extractor.run_pass(Counting(), try_all=False).failures] == [bad]
    for hours, reads in ((1, False), (23, False), (25, True)):
        read.clear()
        later["by"] = dt.timedelta(hours=hours)
        assert [failure.path for failure in extractor.run_pass(Counting(), try_all=False).failures] == [bad]
        assert bool(read) == reads, hours
    assert own.events(bad) == ["extraction failed"] * 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_incomplete_source_is_told_of(own: Outside, suffix: str) -> None:
    bad = own.source("hourly")
    (own.active / (bad + suffix)).unlink()
    shown = own.machine.run("extractor", "once", "--json")
    # Without its manifest it is no backup (any more).
    assert shown.code == (0 if suffix == ".manifest.json" else 7)
    assert own.events(bad) == ([] if suffix == ".manifest.json" else ["extraction failed"])
    own.assert_whole(*(path for path in own.sources() if path != bad))


def test_links_and_pipes_in_the_vault_are_not_followed(own: Outside) -> None:
    link, pipe = own.source("hourly"), own.source("daily")
    shutil.move(own.active / link, own.root / "elsewhere")
    (own.active / link).symlink_to(own.root / "elsewhere")
    (own.active / pipe).unlink()
    os.mkfifo(own.active / pipe)
    shown = own.once(11)
    assert {trouble["path"] for trouble in shown["troubles"]} == {link, pipe}
    assert not own.copy(link).exists()
    assert not own.copy(pipe).exists()


def test_a_source_that_changed_after_it_was_copied_never_reaches_the_copy(own: Outside) -> None:
    """Whoever takes the vault over can rewrite what is in it: not what is outside."""
    own.once()
    path = own.source("daily")
    before = digest(own.copy(path))
    other = own.bring_new(own.source("hourly"), DAY)
    for suffix in SUFFIXES:
        text = (own.active / (other + suffix)).read_bytes()
        name, theirs = path.partition("/")[2].encode(), other.partition("/")[2].encode()
        (own.active / (path + suffix)).unlink()
        (own.active / (path + suffix)).write_bytes(text.replace(theirs, name))
    own.expire(other)
    shown = own.once(11)
    assert "no longer what was copied" in shown["troubles"][0]["message"]
    assert digest(own.copy(path)) == before
    assert own.events(path)[-1] == "extraction failed"


def test_a_vault_that_was_moved_is_recognised_without_reading_the_copies(own: Outside) -> None:
    own.once()
    moved = own.root.with_name("moved")
    shutil.copytree(own.active, moved)
    shutil.rmtree(own.active)
    shutil.move(moved, own.active)
    for path in own.external.rglob("*.sql.gz"):
        spoil(path)  # would be found, if it were read
    shown = own.once()
    assert (shown["ok"], shown["extracted"], shown["adopted"], shown["repaired"]) == (True, [], [], [])


# Copies that are not what they should be


def test_a_missing_copy_is_made_anew(own: Outside) -> None:
    own.once()
    gone, partly = own.source("daily"), own.source("hourly")
    shutil.rmtree(own.copy(gone).parent)
    own.copy(partly).with_name(own.copy(partly).name + ".sha256").unlink()
    shown = own.once()
    assert sorted(shown["repaired"]) == [gone, partly]
    own.assert_whole()
    for path in (gone, partly):
        assert own.events(path) == ["extracted", "copy missing", "repaired"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_copy_of_the_wrong_size_is_moved_aside_and_replaced(own: Outside, suffix: str) -> None:
    own.once()
    path = own.source("daily")
    damaged = own.copy(path + suffix)
    half = damaged.read_bytes()[:50]
    damaged.chmod(0o644)
    damaged.write_bytes(half)
    assert own.once()["repaired"] == [path]
    (aside,) = (name for name in own.files() if ".damaged-" in name)
    assert aside.startswith(f"{damaged.relative_to(own.external)}.damaged-")
    assert (own.external / aside).read_bytes() == half
    (own.external / aside).unlink()
    own.assert_whole()
    assert own.events(path) == ["extracted", "copy damaged", "repaired"]
    told = next(record for record in own.audit() if record["event"] == "copy damaged")
    assert told["moved_to"] == str(own.external / aside)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_wrong_bit_is_found_within_the_days_of_the_setting(
    own: Outside, later: dict[str, dt.timedelta], suffix: str
) -> None:
    """A pass every four hours; the state is the service's, and that of a service started anew each time."""
    extractor = own.extractor(EXTERNAL_RECHECK_DAYS="3")
    extractor.run_pass(Silent())
    path = own.source("hourly")
    spoil(own.copy(path + suffix))
    checked: list[str] = []
    for passes in range(1, 19):
        later["by"] = passes * dt.timedelta(hours=4)
        report = (extractor if passes % 2 else own.extractor(EXTERNAL_RECHECK_DAYS="3")).run_pass(Silent())
        checked += report.rechecked
        if report.repaired:
            break
    assert own.events(path) == ["extracted", "copy damaged", "repaired"]
    assert passes >= 3, "all was read at once"
    assert len(own.files()) == 3 * 4 + 1


def test_what_is_read_again_in_a_period_is_each_copy_about_once(own: Outside, later: dict[str, dt.timedelta]) -> None:
    extractor = own.extractor()
    extractor.run_pass(Silent())
    checked: list[str] = []
    for hours in range(12, 15 * 24, 12):
        later["by"] = dt.timedelta(hours=hours)
        checked += extractor.run_pass(Silent()).rechecked
    assert {path: checked.count(path) for path in own.sources()} == dict.fromkeys(own.sources(), 2)


def test_a_lost_copy_is_told_of_until_it_is_accepted(own: Outside, later: dict[str, dt.timedelta]) -> None:
    own.once()
    gone, bad, back = own.source("daily"), own.source("hourly"), own.source("manual")
    for path in (gone, bad, back):
        own.expire(path)
    shutil.move(own.copy(back), own.root / "kept")
    own.copy(gone).unlink()
    spoil(own.copy(bad))
    later["by"] = 8 * DAY
    extractor = own.extractor()
    report = extractor.run_pass(Silent())
    for _ in range(4):  # a quarter of all is read in each, the largest alone
        later["by"] += dt.timedelta(hours=1)
        report = extractor.run_pass(Silent())
    assert sorted(failure.path for failure in report.lost) == [gone, bad, back]
    assert own.events(gone) == ["extracted", "copy missing"]
    assert own.events(bad) == ["extracted", "copy damaged"]
    assert {record["in_vault"] for record in own.audit() if "copy" in record["event"]} == {False}
    later["by"] += 2 * DAY
    extractor.run_pass(Silent())
    assert own.events(gone) == ["extracted", "copy missing", "copy missing"]
    assert own.copy(bad).exists()
    later["by"] = dt.timedelta(0)
    shutil.move(own.root / "kept", own.copy(back))
    shown = own.once(7)
    assert sorted(trouble["path"] for trouble in shown["troubles"]) == [gone, bad]
    assert all(trouble["lost"] for trouble in shown["troubles"])
    assert own.events(back)[-1] == "adopted"
    own.run("adopt")
    assert own.audit()[-1]["forgotten"] == 2
    assert own.once()["ok"]
    assert own.copy(bad).exists()


def test_a_good_copy_put_back_by_hand_ends_the_trouble(own: Outside, later: dict[str, dt.timedelta]) -> None:
    own.once()
    path = own.source("daily")
    whole = own.copy(path).read_bytes()
    for each in own.sources():
        if each != path:
            own.expire(each)
            shutil.rmtree(own.copy(each).parent.parent)
    own.expire(path)
    own.run("adopt")
    spoil(own.copy(path))
    extractor = own.extractor()
    later["by"] = 8 * DAY
    assert [failure.path for failure in extractor.run_pass(Silent()).lost] == [path]
    own.copy(path).chmod(0o600)
    own.copy(path).write_bytes(whole)
    later["by"] = 16 * DAY
    extractor.run_pass(Silent())
    assert own.events(path)[-1] == "adopted"
    assert extractor.run_pass(Silent()).troubles == []


def test_the_copy_of_another_vault_s_backup_is_never_touched(own: Outside) -> None:
    """Two vaults with one destination, and backups made in the same second."""
    own.once()
    path = own.source("daily")
    theirs = {suffix: own.copy(path + suffix).read_bytes() for suffix in SUFFIXES}
    shutil.rmtree(own.extracted)
    manifest = own.active / f"{path}.manifest.json"
    text = manifest.read_text()
    identifier = text.partition('"id": "')[2].partition('"')[0]
    manifest.unlink()
    manifest.write_text(text.replace(identifier, "20260101T000000Z-aaaaaa"))
    shown = own.once(11)
    assert "copy of another backup" in shown["troubles"][0]["message"]
    assert {suffix: own.copy(path + suffix).read_bytes() for suffix in SUFFIXES} == theirs


# The state, lost and shared


def test_copies_are_recognised_when_the_state_is_lost(own: Outside) -> None:
    own.once()
    bad = own.source("hourly")
    spoil(own.copy(bad))
    inodes = {path: own.copy(path).stat().st_ino for path in own.sources()}
    shutil.rmtree(own.extracted)
    shown = own.once()
    assert (shown["extracted"], shown["repaired"]) == ([], [bad])
    assert sorted(shown["adopted"]) == [path for path in own.sources() if path != bad]
    changed = [path for path in own.sources() if own.copy(path).stat().st_ino != inodes[path]]
    assert changed == [bad]


def test_unreadable_records_are_made_anew(own: Outside) -> None:
    own.once()
    for file in own.extracted.rglob("*.json"):
        file.write_bytes(b'{"id": ')
    shown = own.machine.run("extractor", "once", "--json").must()
    assert sorted(outside.only(shown.json)["adopted"]) == own.sources()
    assert "unreadable" in shown.stderr


def test_two_processes_share_what_they_know(own: Outside) -> None:
    extractor = own.extractor()
    extractor.run_pass(Silent())
    new = own.bring_new(own.source("daily"), DAY)
    assert own.once()["extracted"] == [new]
    report = extractor.run_pass(Silent())
    assert (report.extracted, report.adopted) == ([], [])


def test_a_second_pass_waits_for_the_first(own: Outside, scratch: Path) -> None:
    with paused(own.machine, scratch / "gate", "extractor", "once", at="extract.opened") as running:
        assert "is held by process" in own.run("once", "--wait", "0", code=9)
        waiting = own.machine.start("extractor", "once", "--json")
        time.sleep(0.5)
        assert waiting.poll() is None
    finish(running).must()
    assert outside.only(finish(waiting).must().json)["extracted"] == []
    own.assert_whole()
