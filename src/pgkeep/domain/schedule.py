"""When backups are due: pure functions over cron expressions, read in a time zone.

A slot is a moment that an expression names. As in Debian's cron, expressions whose hour (or minute) begins with ``*``
follow the clock that never jumps; the others follow the clock on the wall: a slot in the hour that a zone skips in
spring comes once, at that hour's end, and one in the hour that is repeated in autumn comes once, the first time.
All moments that come out are in UTC.

Where clocks are set back by half an hour (Lord Howe Island alone), cronsim 2.8 passes over the next slot of an
expression like ``0 */6 * * *``: one run a year comes a slot late there.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Iterator, Mapping
from itertools import islice, pairwise

from pgkeep.domain.names import Tier
from pgkeep.errors import ConfigurationError

# Two machines' clocks differ by less; a time further ahead was written before the clock was set back.
FUTURE_TOLERANCE = dt.timedelta(minutes=1)
OVERDUE_GRACE = dt.timedelta(minutes=15)
LONGEST_RETRY_DELAY = dt.timedelta(hours=1)
# No zone's clocks were ever set by more at a change of season.
_LARGEST_SHIFT = dt.timedelta(hours=3)
_SLOTS_COMPARED = 32


def latest_slot(expression: str, zone: str, now: dt.datetime) -> dt.datetime:
    """The newest slot that is not after ``now``. Raises ``ConfigurationError`` where there is none in 50 years."""
    from cronsim import CronSim

    # Backwards cronsim passes over the wall clock's repeated hour: it only finds where to begin to go forward.
    before = (now - _LARGEST_SHIFT).astimezone(_zone(zone))
    for earlier in CronSim(expression, before, reverse=True):
        start = earlier.astimezone(dt.UTC) - dt.timedelta(seconds=1)
        latest = None
        for slot in _slots(expression, zone, start):
            if slot > now:
                break
            latest = slot
        if latest is not None:
            return latest
    raise _never(expression)


def next_slot(expression: str, zone: str, now: dt.datetime) -> dt.datetime:
    """The first slot after ``now``. Raises ``ConfigurationError`` where there is none in 50 years."""
    for slot in _slots(expression, zone, now):
        return slot
    raise _never(expression)


def interval(expression: str, zone: str, now: dt.datetime) -> dt.timedelta:
    """The shortest time between two neighbouring slots, of those that come next."""
    return _interval_after(expression, zone, latest_slot(expression, zone, now))


# A service that looks once a minute asks the same until the next slot comes.
@functools.lru_cache(maxsize=64)
def _interval_after(expression: str, zone: str, slot: dt.datetime) -> dt.timedelta:
    slots = list(islice(_slots(expression, zone, slot), _SLOTS_COMPARED))
    distances = [later - earlier for earlier, later in pairwise(slots)]
    if not distances:
        raise _never(expression)
    return min(distances)


def due(
    expressions: Mapping[Tier, str],
    zone: str,
    newest: Mapping[Tier, dt.datetime | None],
    handled: Mapping[Tier, dt.datetime],
    now: dt.datetime,
) -> dict[Tier, dt.datetime]:
    """The tiers whose latest slot is later than their newest backup and than the last slot that was dealt with.

    With that slot for each. However many slots were missed, a tier is due once. A newest backup in the future was made
    before the clock was set back: from then on only the slots that were dealt with count, not what older times say.
    """
    found = {}
    for tier, expression in expressions.items():
        slot = latest_slot(expression, zone, now)
        known = [moment for moment in (newest.get(tier), handled.get(tier)) if moment and not is_future(moment, now)]
        if all(moment < slot for moment in known):
            found[tier] = slot
    return found


def is_overdue(expression: str, zone: str, newest: dt.datetime, now: dt.datetime) -> bool:
    """Whether a slot has come, and a whole interval and a grace since, with nothing newer than ``newest``."""
    patience = interval(expression, zone, now) + OVERDUE_GRACE
    return newest < latest_slot(expression, zone, now - patience)


def is_future(moment: dt.datetime, now: dt.datetime) -> bool:
    return moment > now + FUTURE_TOLERANCE


def retry_delay(failures: int) -> dt.timedelta:
    """How long to wait after so many failures in a row: 1, 2, 4 … minutes, an hour at the most."""
    minutes = 2 ** min(max(failures, 1) - 1, 10)
    return min(dt.timedelta(minutes=minutes), LONGEST_RETRY_DELAY)


def _slots(expression: str, zone: str, after: dt.datetime) -> Iterator[dt.datetime]:
    from cronsim import CronSim

    previous = after
    for local in CronSim(expression, after.astimezone(_zone(zone))):
        slot = local.astimezone(dt.UTC)
        # Started in the hour that comes twice, cronsim names its slots of the first time, which are past.
        if slot > previous:
            yield slot
            previous = slot


def _zone(name: str) -> dt.tzinfo:
    if name == "UTC":
        return dt.UTC
    import zoneinfo

    return zoneinfo.ZoneInfo(name)


def _never(expression: str) -> ConfigurationError:
    return ConfigurationError(f"the schedule {expression!r} never comes", "name a day that exists")
