"""The agent's service against a clock that the test turns, and a stand-in for its runs: a real process each."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgkeep.adapters import clock
from pgkeep.agent import service, state
from pgkeep.agent.child import Ended
from pgkeep.agent.service import Service, Setup
from pgkeep.domain import health, mailbox, names
from pgkeep.domain.names import Tier

MINUTE, HOUR, DAY = dt.timedelta(minutes=1), dt.timedelta(hours=1), dt.timedelta(days=1)
GUIDE = {Tier.HOURLY: "0 */1 * * *", Tier.DAILY: "0 0 * * *", Tier.WEEKLY: "0 0 * * 0"}
# A Tuesday.
START = dt.datetime(2026, 11, 24, 10, 30, 5, tzinfo=dt.UTC)
# Called as pgkeep is: notes its arguments, says something, prints a document, ends as it is told; a run that ends well
# leaves a name in each tier.
STAND_IN = """\
cd "$(dirname "$0")"
echo "$*" >> calls
shift
if [ "$1" = check ]; then cat check.json 2>/dev/null; exit "$(cat check)"; fi
echo "pgkeep: dumping app" >&2
echo "pgkeep: warning: a warning" >&2
cat backup.json 2>/dev/null
[ -e linger ] && exec sleep 60
[ "$(cat backup)" = 0 ] || exit "$(cat backup)"
for tier in "$@"; do [ -d "active/$tier" ] && : > "active/$tier/$(cat now).sql.gz.manifest.json"; done
exit 0
"""


class Records:
    """A log."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def note(self, text: str) -> None:
        self.lines.append(("info", text))

    def warn(self, text: str) -> None:
        self.lines.append(("warning", text))

    def error(self, text: str) -> None:
        self.lines.append(("error", text))

    def of(self, level: str) -> list[str]:
        return [text for each, text in self.lines if each == level]


class Bench:
    """A service, its world below ``root``, and the time."""

    def __init__(self, root: Path, schedule: dict[Tier, str] | None = None) -> None:
        self.root = root
        self.now = START
        self.schedule = GUIDE if schedule is None else schedule
        self.records = Records()
        for directory in ("staging", "active/.outcomes", *(f"active/{tier}" for tier in Tier)):
            (root / directory).mkdir(parents=True)
        (root / "stand-in").write_text(STAND_IN)
        self.answers(check=0, backup=0)
        self.service = self.start()

    def answers(self, error: str = "", **codes: int) -> None:
        """How checks and runs end from now on, and what they give for a reason."""
        for name, code in codes.items():
            (self.root / name).write_text(str(code))
            (self.root / f"{name}.json").write_text(json.dumps({"error": error, "hint": "mend it"} if code else {}))

    def start(self) -> Service:
        """A new process's service, as after a restart."""
        setup = Setup(
            staging=self.root / "staging",
            active=self.root / "active",
            schedule=self.schedule,
            zone="UTC",
            vault_timeout=HOUR,
            command=["sh", os.fspath(self.root / "stand-in")],
            environment={},
        )
        self.service = Service(setup, self.records)
        self.service.begin()
        return self.service

    def settle(self) -> None:
        """Let happen what happens at this moment, to the end."""
        (self.root / "now").write_text(names.format_timestamp(self.now))
        deadline = time.monotonic() + 20
        self.service.tick()
        while self.service.is_busy:
            assert time.monotonic() < deadline
            time.sleep(0.001)
            self.service.tick()

    def tick_until_a_run_is_under_way(self) -> None:
        (self.root / "calls").unlink(missing_ok=True)
        deadline = time.monotonic() + 20
        while not (self.root / "calls").exists() or " backup " not in (self.root / "calls").read_text():
            assert time.monotonic() < deadline
            self.service.tick()
            time.sleep(0.002)

    def pass_time(self, duration: dt.timedelta, step: dt.timedelta) -> None:
        end = self.now + duration
        while self.now < end:
            self.now += step
            self.settle()

    def calls(self) -> list[str]:
        """What was started since the last time this was asked."""
        path = self.root / "calls"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    def runs(self) -> list[list[str]]:
        """The tiers of each run since the last time."""
        return [call.split(" --")[0].split()[2:] for call in self.calls() if call.startswith("agent backup")]

    def problems(self) -> tuple[str, ...]:
        data = (self.root / "staging" / service.HEALTH_NAME).read_bytes()
        return health.ailments(health.decode(data), self.now)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made: list[Bench] = []
    monkeypatch.setattr(clock, "now", lambda: made[0].now if made else START)
    made.append(Bench(tmp_path))
    yield made[0]
    made[0].service.stop()


def test_at_the_start_whatever_is_due_shares_one_run_and_a_restart_repeats_nothing(bench: Bench) -> None:
    bench.settle()
    assert bench.runs() == [["hourly", "daily", "weekly"]]
    for _ in range(5):
        bench.start()
        bench.pass_time(3 * MINUTE, MINUTE)
    assert bench.runs() == []
    assert bench.problems() == ()


def test_a_lost_memory_repeats_nothing_that_has_a_name(bench: Bench) -> None:
    bench.settle()
    bench.runs()
    (bench.root / "staging" / state.FILE_NAME).write_bytes(b"{torn")
    bench.start()
    bench.pass_time(10 * MINUTE, MINUTE)
    assert bench.runs() == []


def test_each_slot_has_its_run_and_slots_that_coincide_share_one(bench: Bench) -> None:
    bench.now = dt.datetime(2026, 11, 28, 20, 30, tzinfo=dt.UTC)  # a Saturday
    bench.settle()
    bench.runs()
    bench.pass_time(30 * HOUR, HOUR)
    runs = bench.runs()
    assert len(runs) == 30
    assert [(at, run) for at, run in enumerate(runs) if run != ["hourly"]] == [
        (3, ["hourly", "daily", "weekly"]),
        (27, ["hourly", "daily"]),
    ]
    assert bench.problems() == ()


def test_words_of_a_run_come_through_with_their_level(bench: Bench) -> None:
    bench.settle()
    assert ("info", "dumping app") in bench.records.lines
    assert ("warning", "a warning") in bench.records.lines


def test_a_failed_run_is_tried_again_ever_later_and_is_a_problem_until_one_goes_well(bench: Bench) -> None:
    bench.answers(backup=6, error="the disk is full")
    bench.settle()
    began = bench.now
    tries = [began]
    bench.runs()
    while bench.now < began + 29 * MINUTE:
        bench.pass_time(dt.timedelta(seconds=20), dt.timedelta(seconds=20))
        tries += [bench.now] * len(bench.runs())
    assert [round((later - began) / MINUTE) for later in tries] == [0, 1, 3, 7, 15]
    assert bench.problems() == ("the last run (hourly, daily, weekly) failed: the disk is full",)
    assert len(bench.records.of("error")) == 5
    bench.answers(backup=0)
    bench.now = dt.datetime(2026, 11, 24, 11, 0, 1, tzinfo=dt.UTC)
    bench.settle()
    assert bench.runs() == [["hourly", "daily", "weekly"]], "the next slot does not wait for the next try"
    bench.pass_time(MINUTE, MINUTE)
    assert bench.problems() == ()


def test_failing_goes_on_over_a_restart_and_a_good_run_ends_it(bench: Bench) -> None:
    bench.answers(backup=4, error="no such role")
    bench.settle()
    bench.start()
    bench.answers(check=0, backup=0)
    bench.pass_time(11 * dt.timedelta(seconds=1), 11 * dt.timedelta(seconds=1))
    assert bench.problems() == ()
    assert len(bench.runs()) == 2


@pytest.mark.parametrize("code", [2, 3, 11])
def test_what_would_fail_again_waits_for_the_next_slot_and_is_reported(bench: Bench, code: int) -> None:
    bench.answers(backup=code, error="too many today")
    bench.settle()
    bench.pass_time(29 * MINUTE, MINUTE)
    assert len(bench.runs()) == 1
    assert bench.problems() == ("the last run (hourly, daily, weekly) failed: too many today",)
    bench.pass_time(2 * MINUTE, MINUTE)
    assert bench.runs() == [["hourly"]]


def test_another_try_leaves_out_what_went_well(bench: Bench) -> None:
    bench.answers(backup=4)
    bench.settle()
    bench.pass_time(2 * MINUTE, MINUTE)
    first, again = [call for call in bench.calls() if " backup " in call]
    assert "--since" not in first
    assert again.endswith(f"--since {START.isoformat()}")
    bench.pass_time(30 * MINUTE, MINUTE)
    later = [call for call in bench.calls() if " backup " in call]
    # The slot of 11:00 needs a backup of its own.
    assert any("--since" not in call for call in later)


def test_a_database_that_has_its_backup_does_not_hide_one_that_has_none(bench: Bench) -> None:
    """The run failed, but left a name in each tier: that of a database that went well."""
    bench.answers(backup=4)
    bench.settle()
    for tier in GUIDE:
        (bench.root / "active" / tier / "2026-11-24_10-30-06.app.sql.gz.manifest.json").touch()
    bench.start()
    bench.pass_time(MINUTE, MINUTE)
    assert len(bench.runs()) == 2


def test_the_database_is_waited_for_then_reported_then_greeted(bench: Bench) -> None:
    bench.answers(check=4, error="connection refused", backup=4)
    second = dt.timedelta(seconds=1)
    bench.pass_time(58 * second, second)
    calls = bench.calls()
    assert calls == ["agent check"] * 6, "after 0, 1, 3, 7, 15, 31 s"
    assert any("connection refused" in problem for problem in bench.problems())
    bench.pass_time(30 * second, second)
    assert len(bench.runs()) == 1, "so that the vault hears of it"
    bench.answers(check=0, backup=0)
    bench.pass_time(62 * second, second)
    assert bench.runs() == [["hourly", "daily", "weekly"]], "at once when it answers"
    bench.pass_time(11 * second, second)
    assert bench.problems() == ()


def test_a_clock_set_back_costs_one_run_and_no_slot(bench: Bench) -> None:
    bench.pass_time(DAY, HOUR)
    bench.runs()
    bench.now -= DAY
    bench.settle()
    bench.settle()
    assert bench.runs() == [["hourly", "daily"]]
    bench.pass_time(6 * HOUR, 20 * MINUTE)
    assert bench.runs() == [["hourly"]] * 6


def test_a_clock_set_a_year_ahead_and_back(bench: Bench) -> None:
    bench.settle()
    bench.now += 365 * DAY
    bench.settle()
    bench.runs()
    bench.now -= 365 * DAY
    bench.pass_time(3 * HOUR, 20 * MINUTE)
    runs = bench.runs()
    assert runs[0] == ["hourly", "daily", "weekly"]
    assert runs[1:] == [["hourly"]] * 3
    assert bench.problems() == ()


def test_what_was_made_ahead_of_time_is_no_backup_of_that_time(bench: Bench) -> None:
    """The vault's names say tomorrow; when tomorrow comes after all, its slots are served."""
    bench.settle()
    bench.now += DAY
    bench.settle()
    for tier in GUIDE:
        name = f"{bench.now:%Y-%m-%d_%H-%M-%S}.sql.gz.manifest.json"
        (bench.root / "active" / tier / name).touch()
    bench.now -= DAY
    bench.settle()
    bench.runs()
    bench.pass_time(25 * HOUR, 20 * MINUTE)
    runs = bench.runs()
    assert sum("hourly" in run for run in runs) == 25
    assert sum("daily" in run for run in runs) == 1


def test_a_first_start_with_the_clock_ahead_hides_no_overdue_tier(bench: Bench) -> None:
    bench.now += 30 * DAY
    bench.start()
    bench.settle()
    bench.now -= 30 * DAY
    bench.answers(backup=4)
    bench.settle()
    bench.pass_time(6 * HOUR, 20 * MINUTE)
    assert any("the hourly backup is overdue" in problem for problem in bench.problems())


def test_what_kills_the_service_in_its_runs_is_not_tried_at_once_for_ever(bench: Bench) -> None:
    (bench.root / "linger").touch()
    for pause in (1, 61, 61):
        bench.tick_until_a_run_is_under_way()
        _abandon(bench.service)
        bench.now += dt.timedelta(seconds=pause)
        bench.start()
    (bench.root / "linger").unlink()
    bench.calls()
    bench.settle()
    assert bench.runs() == []
    bench.pass_time(5 * MINUTE, MINUTE)
    assert len(bench.runs()) == 1


def _abandon(running: Service) -> None:
    """As if the process were gone, its child with it."""
    child = running._child
    assert child is not None
    child.stop()
    running._child = None


def test_a_stop_ends_the_run_and_is_no_failure(bench: Bench) -> None:
    (bench.root / "linger").touch()
    bench.tick_until_a_run_is_under_way()
    started = time.monotonic()
    bench.service.stop()
    assert time.monotonic() - started < 2
    (bench.root / "linger").unlink()
    bench.calls()
    bench.start()
    bench.settle()
    assert len(bench.runs()) == 1
    assert bench.problems() == ()


def test_a_tier_without_a_backup_for_too_long_is_a_problem(bench: Bench) -> None:
    bench.settle()
    (bench.root / "stand-in").write_text("cat backup.json; exit 0\n")  # says that all is well, and leaves nothing
    bench.pass_time(2 * HOUR, 10 * MINUTE)
    assert bench.problems() == ("the hourly backup is overdue: the last is of 2026-11-24 10:30 UTC",)


def test_a_silent_vault_is_a_problem(bench: Bench) -> None:
    bench.settle()
    (bench.root / "staging" / f"{names.new_identifier(START)}.ready").mkdir()
    os.utime(next((bench.root / "staging").glob("*.ready")), (START.timestamp(), START.timestamp()))
    bench.pass_time(55 * MINUTE, 5 * MINUTE)
    assert bench.problems() == ()
    bench.pass_time(10 * MINUTE, 5 * MINUTE)
    assert bench.problems() == ("the vault is silent: what was handed over waits since 2026-11-24 10:30 UTC (1)",)


def test_what_the_vault_answers_late_is_cleared_between_the_runs(bench: Bench) -> None:
    bench.settle()
    identifier = names.new_identifier(START)
    left = bench.root / "staging" / f"{identifier}.ready"
    left.mkdir()
    outcome = mailbox.Outcome(
        id=identifier,
        state="sealed",
        time=START,
        names=(mailbox.SealedName(id=identifier, path="daily/x", tier=Tier.DAILY),),
    )
    (bench.root / "active" / ".outcomes" / f"{identifier}.json").write_bytes(mailbox.encode(outcome))
    bench.pass_time(2 * MINUTE, MINUTE)
    assert not left.exists()
    assert any("daily/x" in text for text in bench.records.of("info"))


def test_a_run_longer_than_the_time_between_two_is_a_problem(bench: Bench) -> None:
    bench.settle()
    slow = Ended(0, {}, 4000.0)
    bench.service._state.pending = {Tier.HOURLY: START}
    bench.service._end_run(slow, bench.now)
    bench.pass_time(MINUTE, MINUTE)
    assert bench.problems() == ("the last run took 4000 s, longer than the 3600 s between two that are due",)
    bench.pass_time(HOUR, 30 * MINUTE)
    assert bench.problems() == ()


def test_trouble_with_the_disk_is_a_problem_and_not_the_end(bench: Bench) -> None:
    bench.settle()
    hourly = bench.root / "active" / "hourly"
    hourly.rename(bench.root / "hourly")
    hourly.touch()
    bench.pass_time(2 * MINUTE, MINUTE)
    assert any(problem.startswith("listing the backups failed") for problem in bench.problems())
    hourly.unlink()
    (bench.root / "hourly").rename(hourly)
    bench.pass_time(2 * MINUTE, MINUTE)
    assert bench.problems() == ()


def test_nothing_scheduled_is_nothing_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Bench] = []
    monkeypatch.setattr(clock, "now", lambda: made[0].now if made else START)
    made.append(Bench(tmp_path, {}))
    made[0].pass_time(2 * HOUR, 10 * MINUTE)
    assert made[0].calls() == ["agent check"]
    assert made[0].problems() == ()
    made[0].service.stop()
