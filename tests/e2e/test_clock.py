"""Clocks that are set: one file moves what agent, vault and extractor are shown, all in real containers.

Python reads a module of ours at its start, in every process of theirs, which moves pgkeep's one source of the time.
Debian's libfaketime can't: under it, Python's ``time.sleep`` ends with "Invalid argument" as long as the clock that
nobody can set goes right. The database and the machine keep their own clocks.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import NewStack
from tests.e2e.stack import SERVICES, Stack, wait_until

DAY = dt.timedelta(days=1)
TIERS = ("hourly", "daily", "weekly")
# The agent looks every second and the vault every second: nothing would take longer to come.
SETTLED_SECONDS = 3.0
_SERVICE = """
  {service}:
    environment:
      PYTHONPATH: /clock
    volumes:
      - ./clock:/clock:ro
"""
_MOVED = """
import datetime as dt
from pathlib import Path

from pgkeep.adapters import clock

right = clock.now
clock.now = lambda: right() + dt.timedelta(seconds=int(Path("/clock/seconds").read_text()))
"""


class Clock:
    """The one that the stack's services are shown; it goes on by itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(_MOVED)
        self.shift = dt.timedelta()

    def set(self, moment: dt.datetime) -> None:
        self.move(moment - self.now())

    def move(self, span: dt.timedelta) -> None:
        self.shift += dt.timedelta(seconds=round(span.total_seconds()))
        (self._folder / "new").write_text(f"{self.shift.total_seconds():.0f}")
        (self._folder / "new").rename(self._folder / "seconds")

    def now(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + self.shift


def _wednesday() -> dt.datetime:
    """A week ahead, so that no real moment comes near; noon, far from every slot but the hours'."""
    noon = dt.datetime.now(dt.UTC).replace(hour=12, minute=10, second=0, microsecond=0) + 7 * DAY
    return noon + (2 - noon.weekday()) % 7 * DAY


@pytest.fixture
def clock_stack(new_stack: NewStack) -> tuple[Stack, Clock]:
    """Its first backups are of a Wednesday, ten past twelve."""
    stack = new_stack("clock", {"COMPOSE_FILE": "docker-compose.yml:clock.yaml"})
    services = "".join(_SERVICE.format(service=service) for service in SERVICES)
    (stack.directory / "clock.yaml").write_text(f"services:{services}")
    clock = Clock(stack.directory / "clock")
    clock.set(_wednesday())
    stack.start_application()
    stack.start()
    return stack, clock


def audit(stack: Stack) -> list[dict[str, Any]]:
    log = stack.volume("backup-logs") / "backup_audit.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def sealed_by_dump(stack: Stack) -> dict[int, set[str]]:
    """Each inode that is sealed, with the tiers of its names."""
    found: dict[int, set[str]] = {}
    for tier in TIERS:
        for name in stack.sealed(tier):
            found.setdefault((stack.volume("backup-active") / tier / name).stat().st_ino, set()).add(tier)
    return found


def sealed_since(stack: Stack, count: int, what: str) -> list[list[str]]:
    """Tiers of the database's dumps that were sealed beyond the first ``count`` names, once there is something new."""
    wait_until(lambda: len(_sealed(stack)) > count, what, say=stack.trouble)
    time.sleep(SETTLED_SECONDS)
    new = _sealed(stack)[count:]
    dumps = itertools.groupby(new, key=lambda record: record["sha256"])
    return [[record["path"].partition("/")[0] for record in of_dump] for _, of_dump in dumps]


def _sealed(stack: Stack) -> list[dict[str, Any]]:
    found = [record for record in audit(stack) if record["event"] == "sealed"]
    return [record for record in found if not record["path"].startswith("globals/")]


def moments(records: Sequence[dict[str, Any]]) -> list[dt.datetime]:
    return [dt.datetime.fromisoformat(record["time"]) for record in records]


def test_a_clock_set_forward_and_back_and_a_sunday_midnight(clock_stack: tuple[Stack, Clock]) -> None:
    stack, clock = clock_stack
    assert [set(tiers) for tiers in sealed_since(stack, 0, "the first backup")] == [set(TIERS)]
    count = len(_sealed(stack))

    clock.move(DAY)
    assert sealed_since(stack, count, "Thursday's") == [["hourly", "daily"]]
    count += 2
    clock.move(-DAY)
    assert sealed_since(stack, count, "Wednesday's again") == [["hourly", "daily"]]
    count += 2
    assert clock.now().weekday() == 2
    assert moments(audit(stack)) != sorted(moments(audit(stack))), "the log tells of it"
    assert not [record for record in audit(stack) if record["event"] == "expired"]

    saturday = (_wednesday() + 3 * DAY).replace(hour=23, minute=59, second=40)
    clock.set(saturday)
    assert sealed_since(stack, count, "what Saturday had missed") == [["hourly", "daily"]]
    count += 2
    midnight = saturday.replace(second=0) + dt.timedelta(minutes=1)
    clock.set(max(clock.now(), midnight - dt.timedelta(seconds=3)))
    dumps_before = sealed_by_dump(stack)
    assert sealed_since(stack, count, "Sunday's") == [list(TIERS)]
    count += 3
    (sunday,) = sealed_by_dump(stack).keys() - dumps_before.keys()
    assert sealed_by_dump(stack)[sunday] == set(TIERS), "one inode with a name in each"
    for tier in TIERS:
        assert stack.sealed(tier)[-1].startswith(f"{midnight:%Y-%m-%d}_00-00-")

    # Some seconds back, over midnight once more, as a time server might set it: nothing is made anew.
    clock.set(midnight - dt.timedelta(seconds=3))
    time.sleep(3 + SETTLED_SECONDS)
    assert clock.now() > midnight
    assert len(_sealed(stack)) == count
    assert_nothing_was_lost(stack)


def assert_nothing_was_lost(stack: Stack) -> None:
    records = audit(stack)
    assert {record["event"] for record in records} <= {"vault opened", "sealed", "expiring", "expired"}
    until = {record["id"]: record["retain_until"] for record in records if record["event"] == "sealed"}
    for record in records:
        if record["event"] == "expired":
            assert dt.datetime.fromisoformat(record["time"]) >= dt.datetime.fromisoformat(until[record["id"]])
    gone = {record["path"] for record in records if record["event"] == "expired"}
    present = {f"{tier}/{name}" for tier in TIERS for name in stack.sealed(tier)}
    assert present == {record["path"] for record in _sealed(stack)} - gone
    wait_until(lambda: {path.name for path in stack.extracted("weekly")} == set(stack.sealed("weekly")), "its copy")
    said = {service: json.loads(_asked(stack, service)) for service in SERVICES}
    assert {service: answer["problems"] for service, answer in said.items()} == {service: [] for service in SERVICES}
    wait_until(lambda: all(stack.health(service) == "healthy" for service in SERVICES), "health", say=stack.trouble)


def _asked(stack: Stack, service: str) -> str:
    role = service.removeprefix("backup-")
    return stack.execute(service, "pgkeep", "health", role, "--json", check=False).stdout.decode()
