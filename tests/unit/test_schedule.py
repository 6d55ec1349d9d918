"""When backups are due, whatever clocks and zones do."""

from __future__ import annotations

import datetime as dt
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgkeep.domain import schedule
from pgkeep.domain.names import Tier

# Shifts of an hour and of half an hour, at night and at midnight, on both halves of the globe, and none at all.
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana", "Asia/Kolkata")
EVERY_HOUR, MIDNIGHT, SUNDAY = "0 */1 * * *", "0 0 * * *", "0 0 * * 0"
EXPRESSIONS = (
    *(EVERY_HOUR, MIDNIGHT, SUNDAY, "30 2 * * *", "15 1,13 * * *", "*/15 * * * *", "0 4 1 * *", "0 3 29 2 *"),
    *("59 23 31 12 *", "0 */6 * * *", "30 0 * * 1-5"),
)
MINUTE, HOUR, DAY = dt.timedelta(minutes=1), dt.timedelta(hours=1), dt.timedelta(days=1)

START = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
moments = st.timedeltas(min_value=0 * DAY, max_value=15 * 365 * DAY).map(lambda since: START + since)
# Around the changes of season, where the trouble is.
changes = st.sampled_from(
    [
        dt.datetime(2026, 3, 29, 1, tzinfo=dt.UTC),
        dt.datetime(2026, 10, 25, 1, tzinfo=dt.UTC),
        dt.datetime(2026, 3, 8, 7, tzinfo=dt.UTC),
        dt.datetime(2026, 11, 1, 6, tzinfo=dt.UTC),
        dt.datetime(2026, 4, 4, 15, tzinfo=dt.UTC),
        dt.datetime(2026, 10, 3, 15, 30, tzinfo=dt.UTC),
        dt.datetime(2026, 3, 8, 5, tzinfo=dt.UTC),
        dt.datetime(2026, 11, 1, 5, tzinfo=dt.UTC),
    ]
).flatmap(lambda change: st.timedeltas(min_value=-6 * HOUR, max_value=6 * HOUR).map(lambda distance: change + distance))
any_moment = moments | changes
zones = st.sampled_from(ZONES)
expressions = st.sampled_from(EXPRESSIONS)


def utc(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def local(text: str, zone: str, *, second_time: bool = False) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=int(second_time)).astimezone(dt.UTC)


@given(expressions, zones, any_moment)
def test_now_lies_between_the_latest_slot_and_the_next(expression: str, zone: str, now: dt.datetime) -> None:
    latest, coming = schedule.latest_slot(expression, zone, now), schedule.next_slot(expression, zone, now)
    assert latest <= now < coming
    assert latest.tzinfo is dt.UTC


@given(expressions, st.sampled_from([zone for zone in ZONES if zone != "Australia/Lord_Howe"]), any_moment)
def test_no_slot_lies_between_two_neighbours(expression: str, zone: str, now: dt.datetime) -> None:
    """Whoever goes forward and whoever looks back see the same slots."""
    coming = schedule.next_slot(expression, zone, now)
    assert schedule.latest_slot(expression, zone, coming) == coming
    assert schedule.latest_slot(expression, zone, coming - dt.timedelta(microseconds=1)) == schedule.latest_slot(
        expression, zone, now
    )
    assert schedule.next_slot(expression, zone, schedule.latest_slot(expression, zone, now)) == coming


@given(st.sampled_from([MIDNIGHT, "30 2 * * *", "0 1 * * *", "15 2 * * *"]), zones, any_moment)
def test_a_daily_slot_comes_once_on_each_day_of_the_calendar(expression: str, zone: str, start: dt.datetime) -> None:
    slots = [schedule.next_slot(expression, zone, start)]
    while len(slots) < 10:
        slots.append(schedule.next_slot(expression, zone, slots[-1]))
    days = [slot.astimezone(ZoneInfo(zone)).date() for slot in slots]
    assert all(later - earlier == DAY for earlier, later in pairwise(days)), days


@given(st.sampled_from([EVERY_HOUR, "*/15 * * * *"]), any_moment)
def test_what_runs_every_hour_leaves_no_gap_when_the_clocks_change(expression: str, now: dt.datetime) -> None:
    for zone in ("Europe/Berlin", "America/New_York"):
        distance = schedule.next_slot(expression, zone, now) - schedule.latest_slot(expression, zone, now)
        assert distance <= HOUR


def test_a_slot_in_the_skipped_hour_comes_at_its_end() -> None:
    assert schedule.next_slot("30 2 * * *", "Europe/Berlin", utc("2026-03-28T12:00")) == utc("2026-03-29T01:00")
    assert schedule.latest_slot("30 2 * * *", "Europe/Berlin", utc("2026-03-29T08:00")) == utc("2026-03-29T01:00")


def test_a_slot_in_the_repeated_hour_comes_the_first_time_only() -> None:
    first = local("2026-10-25T02:30", "Europe/Berlin")
    again = local("2026-10-25T02:30", "Europe/Berlin", second_time=True)
    assert again - first == HOUR
    for now in (first, again - 15 * MINUTE, again, again + 15 * MINUTE):
        assert schedule.latest_slot("30 2 * * *", "Europe/Berlin", now) == first
    tomorrow = local("2026-10-26T02:30", "Europe/Berlin")
    assert schedule.next_slot("30 2 * * *", "Europe/Berlin", again - 15 * MINUTE) == tomorrow


@pytest.mark.parametrize(
    ("expression", "expected"),
    [(EVERY_HOUR, HOUR), (MIDNIGHT, DAY), (SUNDAY, 7 * DAY), ("*/7 * * * *", 4 * MINUTE), ("0 1,13 * * *", 12 * HOUR)],
)
def test_the_interval_is_the_shortest_distance(expression: str, expected: dt.timedelta) -> None:
    assert schedule.interval(expression, "UTC", utc("2026-11-23T12:34:56")) == expected


class Tower:
    """A scheduler around the functions, as the agent is one: what it runs has a name of the moment it began."""

    def __init__(self, expressions: dict[Tier, str], zone: str) -> None:
        self.expressions = expressions
        self.zone = zone
        self.handled: dict[Tier, dt.datetime] = {}
        self.backups: dict[Tier, list[dt.datetime]] = {tier: [] for tier in expressions}

    def look(self, now: dt.datetime) -> dict[Tier, dt.datetime]:
        newest = {tier: max(made, default=None) for tier, made in self.backups.items()}
        found = schedule.due(self.expressions, self.zone, newest, self.handled, now)
        for tier, slot in found.items():
            self.handled[tier] = slot
            self.backups[tier].append(now)
        return found


GUIDE = {Tier.HOURLY: EVERY_HOUR, Tier.DAILY: MIDNIGHT, Tier.WEEKLY: SUNDAY}


def test_tiers_that_coincide_are_due_together() -> None:
    tower = Tower(GUIDE, "UTC")
    assert set(tower.look(utc("2026-11-21T23:30"))) == set(GUIDE)
    assert set(tower.look(utc("2026-11-21T23:59"))) == set()
    assert set(tower.look(utc("2026-11-22T00:00:01"))) == set(GUIDE)
    assert set(tower.look(utc("2026-11-22T01:00"))) == {Tier.HOURLY}


def test_missed_runs_are_caught_up_once() -> None:
    tower = Tower(GUIDE, "UTC")
    tower.look(utc("2026-11-01T00:00"))
    assert set(tower.look(utc("2026-11-20T12:34"))) == set(GUIDE)
    assert not tower.look(utc("2026-11-20T12:35"))


@given(zones, any_moment, st.lists(st.timedeltas(min_value=MINUTE, max_value=3 * DAY), max_size=40))
@settings(max_examples=50)
def test_looking_often_or_seldom_makes_each_slot_at_most_once(
    zone: str, now: dt.datetime, pauses: list[dt.timedelta]
) -> None:
    tower = Tower(GUIDE, zone)
    seen: set[tuple[Tier, dt.datetime]] = set()
    for pause in pauses:
        found = set(tower.look(now).items())
        assert not found & seen
        assert not tower.look(now), "the same moment twice"
        seen |= found
        now += pause


@given(zones, any_moment, st.lists(st.timedeltas(min_value=-40 * DAY, max_value=40 * DAY), min_size=1, max_size=15))
@settings(max_examples=50)
def test_a_clock_set_back_and_forth_never_loops_and_never_loses_a_backup(
    zone: str, now: dt.datetime, jumps: list[dt.timedelta]
) -> None:
    """After any jump: one run at the most, and then a backup that is as new as the latest slot."""
    tower = Tower(GUIDE, zone)
    for jump in jumps:
        now += jump
        tower.look(now)
        assert not tower.look(now), "again at the same moment"
        for tier, expression in GUIDE.items():
            slot = schedule.latest_slot(expression, zone, now)
            newest = max(tower.backups[tier])
            assert tower.handled[tier] >= slot or slot <= newest <= now + schedule.FUTURE_TOLERANCE


def test_hours_that_the_clock_shows_twice_have_their_backups_twice() -> None:
    """What was made the first time says nothing of the second, in which the database went on changing."""
    tower = Tower(GUIDE, "UTC")
    start = utc("2026-11-23T00:00:10")
    assert all(Tier.HOURLY in tower.look(start + hour * HOUR) for hour in range(24))
    assert all(Tier.HOURLY in tower.look(start + hour * HOUR) for hour in range(23))
    assert [moment.day for moment in tower.backups[Tier.DAILY]] == [23], "the day itself came once"


def test_a_year_ahead_by_mistake_costs_no_slot_afterwards() -> None:
    tower = Tower(GUIDE, "UTC")
    now = utc("2026-11-23T08:00:10")
    tower.look(now)
    tower.look(now + 365 * DAY)
    assert set(tower.look(now + 2 * MINUTE)) == set(GUIDE)
    assert [set(tower.look(now + hour * HOUR)) for hour in range(1, 5)] == [{Tier.HOURLY}] * 4


@pytest.mark.parametrize(
    ("expression", "newest", "now", "expected"),
    [
        (EVERY_HOUR, "2026-11-23T09:00:05", "2026-11-23T11:14", False),
        (EVERY_HOUR, "2026-11-23T09:00:05", "2026-11-23T11:16", True),
        (EVERY_HOUR, "2026-11-23T10:00:00", "2026-11-23T11:16", False),
        (MIDNIGHT, "2026-11-21T00:00:05", "2026-11-23T00:14", False),
        (MIDNIGHT, "2026-11-21T00:00:05", "2026-11-23T00:16", True),
    ],
)
def test_a_tier_is_overdue_an_interval_and_a_grace_after_a_slot_without_a_backup(
    expression: str, newest: str, now: str, expected: bool
) -> None:
    assert schedule.is_overdue(expression, "UTC", utc(newest), utc(now)) is expected


def test_retries_come_ever_later_but_within_the_hour() -> None:
    assert [schedule.retry_delay(failures) / MINUTE for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
