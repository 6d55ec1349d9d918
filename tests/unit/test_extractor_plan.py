"""What a pass decides to do: from tables, and from months of passes with a clock of their own."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgkeep.errors import FormatError
from pgkeep.extractor import plan
from pgkeep.extractor.plan import File, Record

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
WEEK = 7 * DAY
PATH = "daily/2026-11-20_00-00-00.sql.gz"
OUTSIDE = "daily/2026-11-20/2026-11-20_00-00-00.sql.gz"
SIZES = {"": 1000, ".sha256": 91, ".manifest.json": 700}
SIGNATURE = (11, 700, 5)


def record(
    size_bytes: int = 1000, checked_at: dt.datetime = NOW, problem: plan.Problem = "", path: str = OUTSIDE
) -> Record:
    sizes = {**SIZES, "": size_bytes}
    return Record(
        id="20261120T000000Z-aaaaaa",
        path=path,
        files={suffix: File(size, "0" * 64) for suffix, size in sizes.items()},
        source=SIGNATURE,
        copied_at=NOW - 3 * DAY,
        checked_at=checked_at,
        problem=problem,
    )


def listing(**changed: int | None) -> dict[str, int]:
    """The copy's files as they should be; ``changed`` by part: ``dump``, ``sha256``, ``manifest``."""
    suffixes = {"dump": "", "sha256": ".sha256", "manifest": ".manifest.json"}
    sizes: dict[str, int | None] = {OUTSIDE + suffix: size for suffix, size in SIZES.items()}
    for name, size in changed.items():
        sizes[OUTSIDE + suffixes[name]] = size
    return {path: size for path, size in sizes.items() if size is not None}


# Where copies go


@pytest.mark.parametrize(
    ("path", "outside"),
    [
        (PATH, OUTSIDE),
        ("globals/2026-01-31_23-59-59.sql.gz", "globals/2026-01-31/2026-01-31_23-59-59.sql.gz"),
        ("hourly/2026-01-31_23-59-59.my%2Edb.sql.gz", "hourly/2026-01-31/2026-01-31_23-59-59.my%2Edb.sql.gz"),
    ],
)
def test_a_copy_lies_under_its_tier_and_day(path: str, outside: str) -> None:
    assert plan.path_outside(path) == outside


@pytest.mark.parametrize("name", ["..", "x.sql.gz", "2026-13-01_00-00-00.sql.gz", "2026-11-20_00-00-00.a/b.sql.gz"])
def test_what_is_not_a_backup_s_name_goes_nowhere(name: str) -> None:
    with pytest.raises(FormatError):
        plan.path_outside(f"daily/{name}")


# What to do


def test_a_copy_that_is_there_needs_nothing() -> None:
    found = plan.compare({PATH: SIGNATURE}, {PATH: record()}, listing())
    assert found == plan.Plan((), {}, (), (PATH,))


def test_new_backups_are_copied_the_newest_first_whatever_their_tier() -> None:
    names = ("weekly/2026-11-01_00-00-00", "hourly/2026-11-23_11-00-00", "daily/2026-11-23_00-00-00")
    sources = {f"{name}.sql.gz": SIGNATURE for name in names}
    found = plan.compare(sources, {}, {}).to_copy
    assert [path.removesuffix(".sql.gz") for path in found] == [names[1], names[2], names[0]]


def test_a_manifest_elsewhere_on_the_disk_is_looked_at_again() -> None:
    for signature in ((12, 700, 5), (11, 701, 5), (11, 700, 6)):
        assert plan.compare({PATH: signature}, {PATH: record()}, listing()).to_copy == (PATH,)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"dump": None}, "missing"),
        ({"sha256": None}, "missing"),
        ({"manifest": None, "dump": 7}, "missing"),
        ({"dump": 999}, "damaged"),
        ({"dump": -1}, "damaged"),
        ({"manifest": 701}, "damaged"),
    ],
)
def test_a_copy_is_broken_if_any_of_its_files_is(changed: dict[str, int | None], problem: plan.Problem) -> None:
    for sources in ({PATH: SIGNATURE}, {}):
        found = plan.compare(sources, {PATH: record()}, listing(**changed))
        assert found == plan.Plan((), {PATH: problem}, (), ())


def test_a_folder_that_is_gone_is_missing_copies() -> None:
    assert plan.compare({}, {PATH: record()}, {}).broken == {PATH: "missing"}


def test_a_copy_found_bad_stays_broken_until_it_is_read_and_whole() -> None:
    found = plan.compare({}, {PATH: record(problem="damaged")}, listing())
    assert found == plan.Plan((), {PATH: "damaged"}, (), (PATH,))


def test_a_copy_that_comes_back_is_read_at_once() -> None:
    found = plan.compare({}, {PATH: record(problem="missing")}, listing())
    assert found == plan.Plan((), {}, (PATH,), ())


# Reading again


def pass_by_pass(
    sizes: list[int], interval: dt.timedelta, period: dt.timedelta, span: dt.timedelta
) -> tuple[dt.timedelta, list[int]]:
    """The greatest age that any copy's last check reached, and how many copies each pass read."""
    records = {str(place): record(size) for place, size in enumerate(sizes)}
    since, now, oldest, counts = NOW, NOW, dt.timedelta(0), []
    while now < NOW + span:
        now += interval
        chosen, since = plan.to_recheck(records, records, now, period, since)
        oldest = max(oldest, *(now - each.checked_at for each in records.values()))
        counts.append(len(chosen))
        for path in chosen:
            records[path] = record(sizes[int(path)], checked_at=now)
    return oldest, counts


@settings(max_examples=40)
@example([1] * 6 + [1970, 794, 1967, 797, 3143], DAY)
@example([1, 1, 1, 1, 455, 3440, 3563, 3956], DAY)
@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=40),
    st.sampled_from([dt.timedelta(minutes=20), dt.timedelta(hours=1), dt.timedelta(hours=8), DAY]),
)
def test_every_copy_is_read_within_the_period(sizes: list[int], interval: dt.timedelta) -> None:
    oldest, _ = pass_by_pass(sizes, interval, WEEK, 3 * WEEK)
    assert oldest <= WEEK + interval


def test_the_reading_is_spread_evenly_although_all_were_copied_at_once() -> None:
    oldest, counts = pass_by_pass([10**6] * 1000, dt.timedelta(minutes=30), WEEK, 2 * WEEK)
    assert oldest <= WEEK
    # 1000 in 0.9 x 336 passes: 3 or 4 each.
    assert set(counts) <= {3, 4}


def test_nothing_is_read_before_its_share_of_time_has_passed() -> None:
    records = {str(place): record() for place in range(10)}
    assert plan.to_recheck(records, records, NOW, WEEK, NOW) == ([], NOW)
    chosen, since = plan.to_recheck(records, records, NOW + dt.timedelta(minutes=5), WEEK, NOW)
    assert (chosen, since) == ([], NOW)


def test_after_months_of_silence_a_pass_reads_a_quarter_at_most() -> None:
    records = {f"{place:02}": record(checked_at=NOW - 90 * DAY) for place in range(40)}
    chosen, since = plan.to_recheck(records, records, NOW, WEEK, NOW - 90 * DAY)
    assert len(chosen) == 10
    records |= {path: record(checked_at=NOW) for path in chosen}
    next_chosen, since = plan.to_recheck(records, records, NOW, WEEK, since)
    assert len(set(next_chosen) - set(chosen)) == 10
    assert since == NOW


def test_the_longest_unread_comes_first() -> None:
    records = {str(age): record(checked_at=NOW - age * dt.timedelta(hours=1)) for age in range(10)}
    chosen, _ = plan.to_recheck(records, records, NOW, WEEK, NOW - 0.2 * WEEK)
    assert chosen == ["9", "8"]


def test_one_copy_that_is_most_of_all_still_has_its_turn() -> None:
    oldest, _ = pass_by_pass([10**9, 10, 10], dt.timedelta(hours=1), WEEK, 4 * WEEK)
    assert oldest <= WEEK


def test_a_clock_that_was_ahead_puts_nothing_off() -> None:
    ahead = NOW + 400 * DAY
    records = {"ahead": record(checked_at=ahead), "fresh": record(checked_at=NOW)}
    chosen, since = plan.to_recheck(records, records, NOW, WEEK, ahead)
    assert chosen == ["ahead"]
    assert since <= NOW


def test_without_copies_there_is_nothing_to_read() -> None:
    assert plan.to_recheck({}, [], NOW, WEEK, NOW - DAY) == ([], NOW)
