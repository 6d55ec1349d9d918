"""Whose time at a destination is over, and whose lock there is to be extended: tables."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from pgkeep.domain import retention
from pgkeep.domain.names import Tier
from pgkeep.extractor import expiry, plan
from pgkeep.extractor.plan import File, Locked, Origin, Record

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
YEAR = 365 * DAY
FOREVER = dict.fromkeys(Tier, None)


def record(
    age_days: int, *, tier: Tier = Tier.DAILY, database: str = "app", problem: plan.Problem = "", doubted: bool = False
) -> Record:
    sealed_at = NOW - age_days * DAY
    return Record(
        id=f"{sealed_at:%Y%m%dT%H%M%SZ}-aaaaaa",
        path=f"x/{age_days}",
        files={"": File(10, f"{age_days:064}")},
        source=(1, 2, 3),
        copied_at=sealed_at,
        checked_at=sealed_at,
        problem=problem,
        origin=Origin(
            kind="database",
            type=tier,
            database=database,
            system_identifier="1",
            created_at=sealed_at,
            sealed_at=sealed_at,
            # Of no account here: another place's promise.
            retain_until=None,
            is_doubted=doubted,
        ),
    )


def due(records: dict[str, Record], keep_minimum: int = 1, **days: int) -> list[str]:
    policy = retention.Policy({**FOREVER, **{Tier(name): count for name, count in days.items()}}, keep_minimum)
    return [each.path for each in expiry.due(records, policy, NOW)]


def of_ages(*ages: int) -> dict[str, Record]:
    return {f"daily/2026-01-01_00-00-00.{age}.sql.gz": record(age) for age in ages}


def test_what_is_older_than_the_policy_goes_the_oldest_first() -> None:
    found = due(of_ages(1, 29, 30, 31, 400), daily=30)
    assert [path.split(".")[1] for path in found] == ["400", "31", "30"]


def test_a_tier_that_is_not_mentioned_stays() -> None:
    assert due(of_ages(1, 4000), weekly=1) == []


def test_so_many_of_each_database_stay() -> None:
    records = of_ages(40, 50, 60)
    records["daily/2026-01-01_00-00-00.other.sql.gz"] = record(70, database="other")
    assert [path.split(".")[1] for path in due(records, 2, daily=30)] == ["60"]


def test_a_copy_that_is_broken_or_doubted_does_not_count_as_one_that_stays() -> None:
    records = of_ages(60) | {
        "daily/2026-01-01_00-00-00.broken.sql.gz": record(40, problem="missing"),
        "daily/2026-01-01_00-00-00.doubted.sql.gz": record(45, doubted=True),
    }
    assert "daily/2026-01-01_00-00-00.60.sql.gz" not in due(records, daily=30)


def test_what_is_not_known_of_stays() -> None:
    records = of_ages(1, 400)
    older = {path: msgspec.structs.replace(each, origin=None) for path, each in records.items()}
    assert due(older, daily=30) == []


@pytest.mark.parametrize(
    ("kept_days", "locked_days", "age_days", "wanted_days"),
    [
        # For ever: when half is over, as long as is ever allowed.
        (None, 400, 199, None),
        (None, 400, 201, 201 + 400),
        (None, 400, 500, 500 + 400),
        # A promise that is longer than the lock: to its end, or as long as is allowed.
        (1000, 400, 100, None),
        (1000, 400, 300, 300 + 400),
        (500, 400, 300, 500),
        # A lock that covers the promise is left alone; the vault may be about to remove it.
        (30, 30, 20, None),
        (30, 30, 30, None),
        # It kept it all the same.
        (30, 30, 32, 32 + 30),
    ],
)
def test_locks_are_extended_while_the_vault_keeps_the_backup(
    kept_days: int | None, locked_days: int, age_days: int, wanted_days: int | None
) -> None:
    made = record(age_days)
    begin = NOW - age_days * DAY
    assert made.origin is not None
    until = None if kept_days is None else begin + kept_days * DAY
    origin = msgspec.structs.replace(made.origin, retain_until=until)
    locked = Locked(begin, begin + locked_days * DAY)
    found = plan.lock_wanted(msgspec.structs.replace(made, origin=origin, locked=locked), NOW, 400 * DAY)
    assert found == (None if wanted_days is None else begin + wanted_days * DAY)


def test_what_is_not_locked_is_not_locked_by_waiting() -> None:
    assert plan.lock_wanted(record(400), NOW, YEAR) is None
