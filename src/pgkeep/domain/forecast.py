"""How full a destination gets: from what came in the last weeks, and from how long it stays.

The last four weeks are taken to repeat themselves, each copy staying as long as its like does; what came on the very
first day, when everything that the vault held was copied at once, is not taken for the rule. Counted in whole days,
and rather too much than too little.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

PERIOD = dt.timedelta(days=28)
HORIZON_DAYS = 10 * 365
_DAY = dt.timedelta(days=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """One copy at a destination. ``leaves_at``: when its time there is over (None: it stays for ever)."""

    copied_at: dt.datetime
    size_bytes: int
    locked_until: dt.datetime | None = None
    leaves_at: dt.datetime | None = None

    @property
    def end(self) -> dt.datetime | None:
        """A lock outlasts whatever else was meant."""
        if self.leaves_at is None or self.locked_until is None:
            return self.leaves_at
        return max(self.leaves_at, self.locked_until)


@dataclasses.dataclass(frozen=True, slots=True)
class Forecast:
    """``growth_bytes_per_day``: on average over the next four weeks, below 0 where it shrinks; None: too early to tell.

    ``locked_until``: before then nobody can remove all of it (None: no lock is in force). ``full_at``: None where it
    does not fill within ten years, or there is no telling.
    """

    held_bytes: int
    growth_bytes_per_day: int | None
    locked_until: dt.datetime | None
    full_at: dt.datetime | None


def forecast(copies: Iterable[Copy], now: dt.datetime, room_bytes: int | None) -> Forecast:
    """``room_bytes``: what still fits beside what is there, by free bytes or a quota; None: unknown."""
    held = list(copies)
    levels = _levels(held, now)
    locks = (each.locked_until for each in held if each.locked_until is not None and each.locked_until > now)
    days = PERIOD // _DAY
    return Forecast(
        held_bytes=sum(each.size_bytes for each in held),
        growth_bytes_per_day=None if levels is None else round(levels[days] / days),
        locked_until=max(locks, default=None),
        full_at=_full_at(levels, now, room_bytes),
    )


def describe(found: Forecast, size: Callable[[int], str]) -> str:
    """``grows by 1.2 GB a day; locked until 2027-01-31; full on 2026-12-24``; ``size`` puts bytes into words."""
    growth = found.growth_bytes_per_day
    if growth is None:
        said = ["too early to tell how it grows"]
    elif growth > 0:
        said = [f"grows by {size(growth)} a day"]
    else:
        said = ["does not grow"]
    if found.locked_until is not None:
        said.append(f"locked until {found.locked_until:%Y-%m-%d}")
    if found.full_at is not None:
        said.append(f"full on {found.full_at:%Y-%m-%d}")
    return "; ".join(said)


def _full_at(levels: Sequence[int] | None, now: dt.datetime, room_bytes: int | None) -> dt.datetime | None:
    if room_bytes is None:
        return None
    if room_bytes <= 0:
        return now
    full = next((day for day, level in enumerate(levels or ()) if level > room_bytes), None)
    return None if full is None else now + full * _DAY


def _levels(held: Sequence[Copy], now: dt.datetime) -> Sequence[int] | None:
    """Bytes more than now (less: negative) at the end of each day to come; None where too little is known."""
    first = min((each.copied_at for each in held), default=now)
    begin = max(now - PERIOD, first + _DAY)
    if now - begin < _DAY:
        return None
    recent = [each for each in held if begin < each.copied_at <= now]
    changes = _arrivals(recent, now, now - begin)
    for each in held:
        if each.end is not None:
            changes[_days(each.end - now)] -= each.size_bytes
    return list(itertools.accumulate(changes[day] for day in range(HORIZON_DAYS + 1)))


def _arrivals(recent: Iterable[Copy], now: dt.datetime, period: dt.timedelta) -> Counter[int]:
    """What comes, and goes again, on which day, when ``recent`` comes anew in each period."""
    kinds: Counter[tuple[int, int | None]] = Counter()
    for each in recent:
        stay_days = None if each.end is None else _days(each.end - each.copied_at)
        kinds[(each.copied_at + period - now) // _DAY, stay_days] += each.size_bytes
    changes: Counter[int] = Counter()
    for (first_day, stay_days), size_bytes in kinds.items():
        for number in range(math.ceil(HORIZON_DAYS * _DAY / period)):
            day = first_day + number * period // _DAY
            changes[day] += size_bytes
            if stay_days is not None:
                changes[day + stay_days] -= size_bytes
    return changes


def _days(span: dt.timedelta) -> int:
    """Whole days, the last one begun."""
    return max(0, -(-span // _DAY))
