"""Several destinations at once: each served, and none in the way of another; what leaves one by its own policy."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgkeep.adapters.scratch_cluster import ScratchCluster
from pgkeep.cli.log import ServiceLog
from pgkeep.extractor.worker import Worker
from pgkeep.progress import Silent
from tests import clusters, outside
from tests.faults.machine import wait_for
from tests.outside import Outside, Template, spoil

DAY = dt.timedelta(days=1)


@pytest.fixture(scope="module")
def made(cluster15: ScratchCluster) -> Iterator[Template]:
    with outside.template(cluster15) as made:
        yield made


@dataclasses.dataclass(frozen=True, slots=True)
class Two:
    """``own`` with its destination ``external``, and ``second`` as another of the same vault."""

    own: Outside
    second: Outside

    def once(self, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
        """By name, what the passes did."""
        shown = self.own.machine.run("extractor", "once", "--json", *arguments).must(code).json
        assert shown["ok"] == all(each["ok"] for each in shown["destinations"])
        return {each["name"]: each for each in shown["destinations"]}

    def events(self, name: str) -> list[str]:
        return [record["event"] for record in self.own.audit() if record["destination_name"] == name]


def two_in(made: Template, scratch: Path, place: Path | None = None, more: str = "") -> Two:
    own = Outside(made, scratch)
    place = place or scratch / "second"
    place.mkdir(exist_ok=True)
    own.configure(f'[destinations.second]\nkind = "directory"\npath = "{place}"\n{more}\n')
    second = object.__new__(Outside)
    second.__dict__.update(vars(own), external=place)
    return Two(own, second)


@pytest.fixture
def two(made: Template, scratch: Path) -> Two:
    return two_in(made, scratch)


# Passes


def test_every_destination_gets_everything(two: Two) -> None:
    found = two.once()
    assert {name: sorted(each["extracted"]) for name, each in found.items()} == dict.fromkeys(
        ("external", "second"), two.own.sources()
    )
    assert found["second"]["destination"] == str(two.second.external)
    two.own.assert_whole()
    two.second.assert_whole()
    assert two.events("external") == two.events("second") == ["destination adopted", *["extracted"] * 4]
    facts = [record for record in two.own.audit() if record["event"] == "extracted"]
    assert all({"path", "id", "sha256", "destination_name"} <= record.keys() for record in facts)
    markers = [(each.external / ".pgkeep-destination.json").read_text() for each in (two.own, two.second)]
    assert len({json.loads(text)["id"] for text in markers}) == 2
    assert {path.name for path in two.own.extracted.iterdir()} == {"external", "second"}


def test_each_looks_after_its_own_copies(two: Two) -> None:
    two.once()
    path = two.own.source("daily")
    shutil.rmtree(two.second.copy(path).parent)
    found = two.once()
    assert (found["external"]["repaired"], found["second"]["repaired"]) == ([], [path])
    two.second.assert_whole()


def test_one_that_is_dead_keeps_no_other_waiting(two: Two) -> None:
    two.own.external.rename(two.own.external.with_name("gone"))
    found = two.once(code=6)
    assert [trouble["path"] for trouble in found["external"]["troubles"]] == [None]
    assert "does not exist" in found["external"]["troubles"][0]["message"]
    assert found["second"]["ok"]
    two.second.assert_whole()
    stderr = two.own.run("once", code=6)
    assert f"{two.second.external}: nothing to do" in stderr
    assert f"{two.own.external}: the pass failed" in stderr


def test_the_first_trouble_s_code_is_the_exit_code(two: Two) -> None:
    spoil(two.own.active / two.own.source("hourly"))
    two.second.external.rename(two.second.external.with_name("gone"))
    found = two.once(code=7)
    assert [found[name]["troubles"][0]["exit_code"] for name in ("external", "second")] == [7, 6]


def test_some_can_be_chosen(two: Two) -> None:
    assert list(two.once("--destination", "second")) == ["second"]
    assert two.own.files() == set()
    assert list(two.once("--destination", "second", "--destination", "external")) == ["external", "second"]
    assert "configured: external, second" in two.own.run("once", "--destination", "third", code=10)


def test_without_any_destination_there_is_nothing_to_do(two: Two) -> None:
    two.own.machine.environment |= {"EXTERNAL_DIRECTORY": "off", "PGKEEP_CONFIG": "/dev/null"}
    assert "EXTERNAL_DIRECTORY" in two.own.run("once", code=10)
    assert "EXTERNAL_DIRECTORY" in two.own.run(code=10)


def test_one_is_adopted_by_name(two: Two) -> None:
    two.once()
    (two.second.external / ".pgkeep-destination.json").unlink()
    assert "pgkeep extractor adopt second" in two.own.run("once", code=6)
    assert "name the one" in two.own.run("adopt", code=2)
    shown = two.own.machine.run("extractor", "adopt", "second", "--json").must().json
    assert (shown["name"], shown["destination"]) == ("second", str(two.second.external))
    two.once()
    two.second.assert_whole()
    assert two.events("external").count("destination adopted") == 1


def test_anchors_go_to_every_destination(two: Two) -> None:
    two.once()
    for each in (two.own, two.second):
        (anchor,) = each.external.glob("anchors/*/*.json")
        assert anchor.stat().st_size > 0
    two.once()
    assert len(list(two.own.external.glob("anchors/*/*.json"))) == 1


def test_a_log_that_was_rewritten_is_an_alarm_until_it_is_accepted(made: Template, scratch: Path) -> None:
    two = two_in(made, scratch, more="required = false")
    two.once()
    log = two.own.machine.layout.audit
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-2]))
    for _ in range(2):
        found = two.once(code=7)
        for name in ("external", "second"):
            assert "not the one that was anchored" in found[name]["troubles"][0]["message"]
    assert two.events("second").count("extraction failed") == 1
    with two.own.serving():
        wait_for((two.own.extracted / ".health.json").exists)
        wait_for(lambda: any(problem.startswith("second: ") for problem in two.own.word().problems))
    for name in ("external", "second"):
        two.own.run("adopt", name)
    two.once()


# What leaves a destination by its own policy


POLICY = """
[destinations.second.retention]
daily_days = 30
hourly_days = 30
keep_minimum = 1
"""


def test_copies_whose_time_is_over_leave_that_destination_alone(made: Template, scratch: Path) -> None:
    two = two_in(made, scratch, more=POLICY)
    old = two.own.source("daily")
    two.own.sealed(old, 31 * DAY)
    found = two.once()
    assert found["second"]["expired"] == [old]
    assert found["external"]["expired"] == []
    others = [path for path in two.own.sources() if path != old]
    two.own.assert_whole()
    two.second.assert_whole(*others)
    told = next(record for record in two.own.audit() if record["event"] == "copy expired")
    assert (told["path"], told["destination_name"], told["in_vault"]) == (old, "second", True)
    assert "expired 24 h ago" in told["reason"]
    again = two.once()
    assert (again["second"]["extracted"], again["second"]["expired"]) == ([], []), "while the vault has it still"
    remembered = two.own.extracted / "second"
    assert len(list(remembered.rglob("daily/*.json"))) == 1
    two.own.expire(old)
    two.once()
    assert list(remembered.rglob("daily/*.json")) == []
    assert two.own.copy(old).exists()


def test_the_newest_stay_however_old_they_are(made: Template, scratch: Path) -> None:
    two = two_in(made, scratch, more=POLICY.replace("keep_minimum = 1", "manual_days = 1\nkeep_minimum = 2"))
    for path in two.own.sources():
        two.own.sealed(path, (40 if path.startswith("daily") else 30) * DAY + 2 * DAY)
    assert two.once()["second"]["expired"] == [two.own.source("daily")]
    assert two.once()["second"]["expired"] == []
    for path in two.own.sources():
        if not path.startswith("daily"):
            assert two.second.copy(path).exists(), "two good ones, and the globals that they need"


def test_without_a_policy_nothing_ever_leaves(two: Two) -> None:
    for path in two.own.sources():
        two.own.sealed(path, 4000 * DAY)
    assert two.once()["second"]["expired"] == []
    two.second.assert_whole()


def test_a_removed_copy_is_made_again_for_another_backup_of_its_name(made: Template, scratch: Path) -> None:
    two = two_in(made, scratch, more=POLICY)
    old = two.own.source("daily")
    two.own.sealed(old, 31 * DAY)
    two.once()
    manifest = two.own.active / f"{old}.manifest.json"
    facts = json.loads(manifest.read_text()) | {"id": "20260101T000000Z-aaaaaa"}
    manifest.unlink()
    manifest.write_text(json.dumps(facts))
    two.own.sealed(old, DAY)
    assert two.once(code=11)["second"]["extracted"] == [old]


def test_a_vault_that_was_moved_brings_nothing_back(made: Template, scratch: Path) -> None:
    two = two_in(made, scratch, more=POLICY)
    old = two.own.source("daily")
    two.own.sealed(old, 31 * DAY)
    two.once()
    shutil.copytree(two.own.active, scratch / "moved")
    shutil.rmtree(two.own.active)
    shutil.move(scratch / "moved", two.own.active)
    for _ in range(2):
        found = two.once()["second"]
        assert (found["extracted"], found["expired"]) == ([], [])
    assert not two.second.copy(old).exists()


@pytest.mark.parametrize("in_vault", [True, False])
def test_killed_at_every_step_of_a_removal(made: Template, scratch: Path, in_vault: bool) -> None:
    """What was begun is finished, nothing is taken for lost, and nothing is copied again."""
    for at in ("expire.remembered", "expire.audited", "expire.removed", "expire.removed#2", "expire.removed#3"):
        (scratch / at).mkdir()
        two = two_in(made, scratch / at, more=POLICY)
        old = two.own.source("daily")
        two.own.sealed(old, 31 * DAY)
        name, _, nth = at.partition("#")
        assert two.own.machine.run("extractor", "once", action="kill", at=name, nth=int(nth or 1)).code == -9
        if not in_vault:
            two.own.expire(old)
        found = two.once()["second"]
        assert (found["extracted"], found["repaired"], found["troubles"]) == ([], [], []), at
        assert two.second.files() & two.second.expected(old) == set(), at
        assert "copy expired" in two.events("second"), at
        assert two.once()["second"]["ok"], at


# The service


def test_the_service_serves_each_at_its_own_interval(made: Template, scratch: Path) -> None:
    two = two_in(made, scratch, more="interval_seconds = 3600")
    with two.own.serving() as service:
        wait_for(lambda: all(each.files() == each.expected(*each.sources()) for each in (two.own, two.second)))
        wait_for(two.own.is_well)
        new = two.own.bring_new(two.own.source("daily"), DAY)
        wait_for(lambda: two.own.copy(f"{new}.manifest.json").exists())
        time.sleep(2.5)
        assert not two.second.copy(new).exists()
        service.terminate()
        stdout, stderr = service.communicate(timeout=5)
    assert stderr == ""
    assert f"external: copied {new}" in stdout
    assert f"second: copying {two.own.active} to {two.second.external}, with a look every 3600 s" in stdout


def failing_for(two: Two, name: str, span: dt.timedelta) -> None:
    """Let it be remembered so; the destination is away."""
    memory = two.own.extracted / name / "memory.json"
    since = (dt.datetime.now(dt.UTC) - span).isoformat()
    memory.write_text(re.sub(r'"failing_since":[^,}]*', f'"failing_since":"{since}"', memory.read_text()))


@pytest.mark.parametrize("required", ["true", "false"])
def test_one_that_is_not_required_may_be_away_for_a_day(made: Template, scratch: Path, required: str) -> None:
    two = two_in(made, scratch, more=f"required = {required}")
    two.once()
    two.second.external.rename(scratch / "gone")
    with two.own.serving():
        wait_for(lambda: "extraction failed" in two.events("second"))
        new = two.own.bring_new(two.own.source("daily"), DAY)
        wait_for(lambda: two.own.copy(f"{new}.manifest.json").exists())
        if required == "true":
            wait_for(lambda: not two.own.is_well())
            assert two.own.word().problems[0].startswith("second: the destination ")
        else:
            time.sleep(2)
            assert two.own.is_well()
    failing_for(two, "second", 25 * dt.timedelta(hours=1))
    (two.own.extracted / ".health.json").unlink()
    with two.own.serving():
        wait_for((two.own.extracted / ".health.json").exists)
        wait_for(lambda: not two.own.is_well())
        assert "does not exist" in two.own.word().problems[0]
        (scratch / "gone").rename(two.second.external)
        wait_for(lambda: two.second.files() == two.second.expected(*two.own.sources()))
        wait_for(two.own.is_well)


def test_a_failing_one_is_tried_again_ever_more_rarely(made: Template, scratch: Path) -> None:
    two = two_in(made, scratch, more="interval_seconds = 300")
    two.second.external.rmdir()
    extractor = two.own.services().extractors(["second"])[0]
    worker = Worker(extractor, ServiceLog("extractor"), threading.Event(), threading.Event(), is_named=True)
    assert [worker._pass() for _ in range(7)] == [10, 20, 40, 80, 160, 300, 300]
    two.second.external.mkdir()
    assert worker._pass() == 300
    two.second.external.rename(scratch / "gone")
    assert worker._pass() == 10


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def programs_serving(place: Path) -> list[int]:
    found = subprocess.run(["pgrep", "-f", str(place)], capture_output=True, text=True, check=True).stdout
    return [int(line) for line in found.split()]


def test_a_share_that_hangs_keeps_neither_the_others_nor_the_end_waiting(
    made: Template, scratch: Path, loop_filesystem: clusters.LoopFilesystem
) -> None:
    """The program that serves it is stopped: every call to it waits, as with a server that is away."""
    share = loop_filesystem("ntfs", 32)
    two = two_in(made, scratch, share)
    two.once()
    with two.own.serving() as service, stopped(programs_serving(share)):
        wait_for(two.own.is_well)
        new = two.own.bring_new(two.own.source("daily"), DAY)
        wait_for(lambda: two.own.copy(f"{new}.manifest.json").exists())
        newer = two.own.bring_new(two.own.source("daily"), 2 * DAY)
        wait_for(lambda: two.own.copy(f"{newer}.manifest.json").exists())
        before = time.monotonic()
        service.terminate()
        assert service.wait(timeout=25) == 0
        assert time.monotonic() - before < 20
    found = two.once()["second"]
    assert sorted(found["extracted"]) == [new, newer]


def test_two_processes_may_write_to_two_destinations_at_once(two: Two) -> None:
    """Their records in the one log stay whole lines."""
    names = ("external", "second")
    running = [two.own.machine.start("extractor", "once", "--destination", name) for name in names]
    assert [each.wait(timeout=60) for each in running] == [0, 0]
    for each in running:
        each.communicate()
    assert len(two.own.audit()) == 10
    for extractor in two.own.services().extractors():
        assert extractor.run_pass(Silent()).extracted == []
