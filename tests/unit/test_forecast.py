"""How full a destination gets, against worlds whose future is known."""

from __future__ import annotations

import datetime as dt
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgkeep.domain.forecast import HORIZON_DAYS, PERIOD, Copy, Forecast, describe, forecast

NOW = dt.datetime(2026, 11, 29, 10, 0, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
GB = 10**9
SETTINGS = settings(max_examples=40)


def daily(count: int, size_bytes: int = GB, stays: dt.timedelta | None = None) -> list[Copy]:
    """One each day, the last one today; those that have left are not there."""
    moments = [NOW - number * DAY for number in range(count)]
    if stays is None:
        return [Copy(moment, size_bytes) for moment in moments]
    return [Copy(moment, size_bytes, None, moment + stays) for moment in moments if moment + stays > NOW]


def test_what_only_grows_is_full_when_the_room_is_used_up() -> None:
    found = forecast(daily(60), NOW, 100 * GB)
    assert (found.held_bytes, found.growth_bytes_per_day, found.locked_until) == (60 * GB, GB, None)
    assert found.full_at is not None
    assert abs(found.full_at - (NOW + 100 * DAY)) <= 2 * DAY


def test_what_leaves_as_fast_as_it_comes_never_fills() -> None:
    found = forecast(daily(200, stays=30 * DAY), NOW, 3 * GB)
    assert found.held_bytes == 30 * GB
    assert abs(found.growth_bytes_per_day or 0) < GB / 10
    assert found.full_at is None


def test_what_is_not_yet_in_balance_fills_up_to_it_and_no_further() -> None:
    """Sixty days of a hundred: forty more come before the first one leaves."""
    copies = [Copy(NOW - number * DAY, GB, None, NOW - number * DAY + 100 * DAY) for number in range(60)]
    assert forecast(copies, NOW, 44 * GB).full_at is None
    full_at = forecast(copies, NOW, 20 * GB).full_at
    assert full_at is not None
    assert abs(full_at - (NOW + 20 * DAY)) <= 2 * DAY


def test_a_lock_keeps_what_should_leave() -> None:
    copies = [Copy(NOW - n * DAY, GB, NOW - n * DAY + 400 * DAY, NOW - n * DAY + 7 * DAY) for n in range(60)]
    found = forecast(copies, NOW, 100 * GB)
    assert found.locked_until == NOW + 400 * DAY
    assert found.full_at is not None
    assert abs(found.full_at - (NOW + 100 * DAY)) <= 2 * DAY


def test_locks_that_are_over_lock_nothing() -> None:
    assert forecast([Copy(NOW - DAY, GB, NOW - dt.timedelta(seconds=1))], NOW, None).locked_until is None


def test_the_first_day_is_not_the_rule() -> None:
    """A vault of two years is copied in an hour, then one backup a day."""
    first = [Copy(NOW - 10 * DAY - number * dt.timedelta(minutes=1), GB) for number in range(700)]
    found = forecast([*first, *daily(9)], NOW, 1000 * GB)
    assert found.growth_bytes_per_day is not None
    assert found.growth_bytes_per_day <= 1.2 * GB


@pytest.mark.parametrize("copies", [[], daily(1), daily(2)])
def test_too_early_to_tell(copies: list[Copy]) -> None:
    found = forecast(copies, NOW, 10 * GB)
    assert (found.growth_bytes_per_day, found.full_at) == (None, None)
    assert forecast(copies, NOW, 0).full_at == NOW


def test_a_destination_that_gets_nothing_more_does_not_fill() -> None:
    copies = [Copy(NOW - 100 * DAY - number * DAY, GB) for number in range(60)]
    found = forecast(copies, NOW, 1)
    assert (found.growth_bytes_per_day, found.full_at) == (0, None)


def test_what_leaves_and_is_followed_by_nothing_shrinks() -> None:
    copies = [Copy(NOW - 100 * DAY, 28 * GB, None, NOW + DAY)]
    assert forecast(copies, NOW, 1).growth_bytes_per_day == -GB


copies_drawn = st.lists(
    st.builds(
        lambda age, size, stay, lock: Copy(
            NOW - age * DAY / 4,
            size,
            None if lock is None else NOW + lock * DAY,
            None if stay is None else NOW + stay * DAY,
        ),
        st.integers(-8, 400),
        st.integers(0, 10**12),
        st.none() | st.integers(-5, 500),
        st.none() | st.integers(-5, 500),
    ),
    max_size=12,
)


@SETTINGS
@given(copies_drawn, st.integers(-1, 10**14), st.integers(0, 10**13))
def test_more_room_never_fills_sooner(copies: list[Copy], room_bytes: int, more_bytes: int) -> None:
    little, much = forecast(copies, NOW, room_bytes), forecast(copies, NOW, room_bytes + more_bytes)
    if much.full_at is not None:
        assert little.full_at is not None
        assert NOW <= little.full_at <= much.full_at <= NOW + HORIZON_DAYS * DAY


@SETTINGS
@given(copies_drawn, st.integers(0, 10**14))
def test_what_stays_for_ever_fills_sooner_than_what_leaves(copies: list[Copy], room_bytes: int) -> None:
    for_ever = [Copy(each.copied_at, each.size_bytes) for each in copies]
    leaving, staying = forecast(copies, NOW, room_bytes), forecast(for_ever, NOW, room_bytes)
    assert leaving.held_bytes == staying.held_bytes
    if leaving.full_at is not None:
        assert staying.full_at is not None
        assert staying.full_at <= leaving.full_at


@SETTINGS
@given(copies_drawn)
def test_without_knowing_the_room_there_is_no_telling(copies: list[Copy]) -> None:
    assert forecast(copies, NOW, None).full_at is None


def test_it_takes_no_time() -> None:
    """Ten databases, hourly, kept for a quarter."""
    hour = dt.timedelta(hours=1)
    copies = [Copy(NOW - n * hour, GB + n, None, NOW - n * hour + 90 * DAY) for n in range(90 * 24)] * 10
    started = time.process_time()
    forecast(copies, NOW, GB)
    assert time.process_time() - started < 0.5
    assert PERIOD == 28 * DAY


def test_in_words() -> None:
    def size(value_bytes: float) -> str:
        return f"{value_bytes / GB:.1f} GB"

    locked = dt.datetime(2027, 1, 31, tzinfo=dt.UTC)
    assert describe(Forecast(1, 1_200_000_000, locked, NOW), size) == (
        "grows by 1.2 GB a day; locked until 2027-01-31; full on 2026-11-29"
    )
    assert describe(Forecast(1, -1, None, None), size) == "does not grow"
    assert describe(Forecast(1, None, None, NOW), size) == "too early to tell how it grows; full on 2026-11-29"
