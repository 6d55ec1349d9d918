"""What must have come of a quarter of a year: a model that shares no code with what decides, and the faults in it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
from collections.abc import Sequence

from pgkeep.domain.names import Tier

MINUTE, HOUR, DAY = dt.timedelta(minutes=1), dt.timedelta(hours=1), dt.timedelta(days=1)
# A Saturday; the services start between two slots.
START = dt.datetime(2026, 1, 31, 20, 30, tzinfo=dt.UTC)
# The last days have no database: what stays then stays because it is among the newest.
LAST_OUTAGE = 3 * DAY
SLOT = 12 * HOUR
KEEP_MINIMUM = 3
RETENTION = {Tier.HOURLY: 2, Tier.DAILY: 7, Tier.WEEKLY: 28, Tier.MONTHLY: 365, Tier.MANUAL: 30}
# Beside what is due, so many of a tier are taken in so many days; the rest becomes manual.
BESIDE = {Tier.HOURLY: (2 + 12, 1), Tier.DAILY: (4, 1), Tier.WEEKLY: (2, 7), Tier.MONTHLY: (2, 28)}
STEPS_OF_A_RUN = (
    "run.began",
    "dump.pg_dump-ended",
    "dump.assembled",
    "dump.handed-over",
    "run.answered",
    "run.removed",
)
STEPS_OF_THE_VAULT = (
    "vault.admitted",
    "seal.copied",
    "seal.journal-written",
    "seal.linked-dump",
    "seal.linked.manifest.json",
    "seal.protected-dump",
    "seal.audited",
    "seal.journal-closed",
    "vault.decided",
    "vault.answered",
)
STEPS_OF_EXPIRY = ("expire.journal-written", "expire.unlinked", "expire.audited", "expire.removed")
STEPS = {"run-killed": STEPS_OF_A_RUN, "vault-killed": STEPS_OF_THE_VAULT, "expiry-killed": STEPS_OF_EXPIRY}
OUTAGES = ("database", "vault", "machine")
# By how much a clock is wrong for a while: each in turn.
SHIFTS = (DAY, -HOUR, HOUR, -DAY)


# ---------------------------------------------------------------- what the policy says


def latest(tier: Tier, moment: dt.datetime) -> dt.datetime:
    """The schedule of the test, in other words: the newest slot of the tier that is not after the moment."""
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if tier is Tier.HOURLY:
        return midnight + moment.hour // 12 * SLOT
    if tier is Tier.DAILY:
        return midnight
    return midnight - (moment.isoweekday() % 7) * DAY if tier is Tier.WEEKLY else midnight.replace(day=1)


def is_ahead(moment: dt.datetime, now: dt.datetime) -> bool:
    """By more than what two clocks may differ: it was written before the clock was set back."""
    return moment > now + MINUTE


@dataclasses.dataclass(frozen=True, slots=True)
class Handed:
    """A dump that was seen in staging, and when the vault was there to take it."""

    id: str
    tiers: tuple[Tier, ...]
    created_at: dt.datetime
    taken_at: dt.datetime


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Name:
    """One name that a dump is sealed under."""

    id: str
    tier: Tier
    sealed_at: dt.datetime


def names_for(handed: Sequence[Handed]) -> list[Name]:
    """What the vault makes of them: nothing is lost, a tier is given once a slot and a few times beside that.

    A clock that was set back shows some days twice: what lies ahead then keeps nothing from being due, and three times
    as much is taken beside that.
    """
    found: list[Name] = []

    def is_given(tier: Tier, moment: dt.datetime) -> bool:
        moments = [name.sealed_at for name in found if name.tier is tier]
        count, days = BESIDE[tier]
        near = [each for each in moments if abs(moment - each) < days * DAY]
        allowed = 3 * count if any(is_ahead(each, moment) for each in near) else count
        is_due = all(each < latest(tier, moment) for each in moments if not is_ahead(each, moment))
        return is_due or len(near) < allowed

    for dump in handed:
        given = [tier for tier in dump.tiers if is_given(tier, dump.taken_at)]
        if len(given) < len(dump.tiers):
            given.append(Tier.MANUAL)
        found += [Name(dump.id, tier, dump.taken_at) for tier in given]
    return found


def remaining(names: Sequence[Name], now: dt.datetime) -> set[tuple[str, Tier]]:
    """Kept: what is not over, and every name of the newest dumps."""
    newest = sorted({(name.sealed_at, name.id) for name in names})[-KEEP_MINIMUM:]
    return {
        (name.id, name.tier)
        for name in names
        if now < name.sealed_at + RETENTION[name.tier] * DAY or (name.sealed_at, name.id) in newest
    }


# ---------------------------------------------------------------- what goes wrong


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """``kind``: database, vault or machine are away until ``end``, the clock is wrong by ``shift`` until then; the
    others happen at the beginning. Moments are what a right clock shows.
    """

    kind: str
    begin: dt.datetime
    end: dt.datetime
    step: str = ""
    shift: dt.timedelta = dt.timedelta()

    def covers(self, begin: dt.datetime, end: dt.datetime) -> bool:
        return self.begin <= begin and end <= self.end

    def meets(self, begin: dt.datetime, end: dt.datetime) -> bool:
        return self.begin < end and begin < self.end

    @property
    def meets_a_slot(self) -> bool:
        return latest(Tier.HOURLY, self.end) > latest(Tier.HOURLY, self.begin)


def draw_faults(lots: random.Random, kinds: Sequence[str], end: dt.datetime) -> list[Fault]:
    """One after the other, from half past an hour; there is time for another try between an end and the next slot."""
    found: list[Fault] = []
    at = START + DAY
    while at < end:
        kind = kinds[len(found) % len(kinds)]
        slot = latest(Tier.HOURLY, at)
        if kind == "clock":
            found.append(_draw_wrong_clock(lots, slot, sum(fault.kind == kind for fault in found)))
        else:
            found.append(_draw_fault(lots, kind, slot))
        at = found[-1].end + lots.randrange(12, 30) * HOUR
    return found


def _draw_fault(lots: random.Random, kind: str, slot: dt.datetime) -> Fault:
    begin = slot + lots.randrange(1, 6) * HOUR + 30 * MINUTE
    over = slot + lots.choice((1, 1, 2, 3, 5)) * SLOT + lots.randrange(1, 6) * HOUR
    return Fault(kind, begin, over if kind in OUTAGES else begin, lots.choice(STEPS.get(kind, ("",))))


def _draw_wrong_clock(lots: random.Random, slot: dt.datetime, number: int) -> Fault:
    """Set shortly after a slot or shortly before one, so that an hour too crosses it, back or ahead."""
    begin = slot + lots.choice((HOUR, SLOT)) - 30 * MINUTE
    return Fault("clock", begin, begin + lots.choice((2, 7, 14, 26)) * HOUR, shift=SHIFTS[number % len(SHIFTS)])


# ---------------------------------------------------------------- what is to come of it


@dataclasses.dataclass(frozen=True, slots=True)
class Stretch:
    """Of right time, in which nothing is newly due after the beginning, when the clock shows ``shown``."""

    begin: dt.datetime
    end: dt.datetime
    shown: dt.datetime

    @property
    def slot(self) -> dt.datetime:
        return latest(Tier.HOURLY, self.shown)


def stretches(faults: Sequence[Fault], end: dt.datetime) -> list[Stretch]:
    """Each begins with a slot, or with the clock set."""
    wrong = [fault for fault in faults if fault.kind == "clock"]
    jumps = [*(fault.begin for fault in wrong), *(fault.end for fault in wrong)]
    found = []
    now = START
    while now < end:
        shift = next((fault.shift for fault in wrong if fault.covers(now, now + MINUTE)), dt.timedelta())
        following = latest(Tier.HOURLY, now + shift) + SLOT - shift
        over = min([following, end, *(jump for jump in jumps if jump > now)])
        found.append(Stretch(now, over, now + shift))
        now = over
    return found


def expected_dumps(faults: Sequence[Fault], end: dt.datetime) -> list[tuple[dt.datetime, set[Tier], bool]]:
    """In their order: the slot by the clock of then, the tiers that were due, whether the vault was away meanwhile.

    A slot is served once. What was done by a clock that was ahead is done anew once that is back.
    """
    scheduled = (Tier.HOURLY, Tier.DAILY, Tier.WEEKLY, Tier.MONTHLY)
    done: dict[Tier, dt.datetime] = {}
    expected = []
    for stretch in stretches(faults, end):
        away = [fault for fault in faults if fault.meets(stretch.begin, stretch.end)]
        if any(fault.kind in ("database", "machine") and fault.covers(stretch.begin, stretch.end) for fault in away):
            continue
        done = {tier: slot for tier, slot in done.items() if not is_ahead(slot, stretch.shown)}
        due = {tier for tier in scheduled if tier not in done or done[tier] < latest(tier, stretch.shown)}
        if due:
            expected.append((stretch.slot, due, any(fault.kind == "vault" and fault.meets_a_slot for fault in away)))
            done |= {tier: latest(tier, stretch.shown) for tier in due}
    return expected
