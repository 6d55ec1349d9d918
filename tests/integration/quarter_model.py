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
QUARTER = 90 * DAY
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
OUTAGES = ("database", "vault", "machine")


# ---------------------------------------------------------------- what the policy says


def latest(tier: Tier, moment: dt.datetime) -> dt.datetime:
    """The schedule of the test, in other words: the newest slot of the tier that is not after the moment."""
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if tier is Tier.HOURLY:
        return midnight + moment.hour // 12 * SLOT
    if tier is Tier.DAILY:
        return midnight
    return midnight - (moment.isoweekday() % 7) * DAY if tier is Tier.WEEKLY else midnight.replace(day=1)


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
    """What the vault makes of them: nothing is lost, a tier is given once a slot and a few times beside that."""
    found: list[Name] = []

    def is_given(tier: Tier, moment: dt.datetime) -> bool:
        moments = [name.sealed_at for name in found if name.tier is tier]
        count, days = BESIDE[tier]
        is_due = all(each < latest(tier, moment) for each in moments)
        return is_due or sum(moment - each < days * DAY for each in moments) < count

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
    """``kind``: database, vault or machine are away until ``end``; the others happen at the beginning."""

    kind: str
    begin: dt.datetime
    end: dt.datetime
    step: str = ""

    def covers(self, slot: dt.datetime) -> bool:
        """All the time until the next slot."""
        return self.begin <= slot and slot + SLOT <= self.end

    @property
    def meets_a_slot(self) -> bool:
        return latest(Tier.HOURLY, self.end) > latest(Tier.HOURLY, self.begin)


def draw_faults(lots: random.Random, kinds: Sequence[str], end: dt.datetime) -> list[Fault]:
    """One after the other, from half past an hour; there is time for another try between an end and the next slot."""
    found: list[Fault] = []
    at = START + DAY
    while at < end:
        kind = kinds[len(found) % len(kinds)]
        begin = latest(Tier.HOURLY, at) + lots.randrange(1, 6) * HOUR + 30 * MINUTE
        over = latest(Tier.HOURLY, begin) + lots.choice((1, 1, 2, 3, 5)) * SLOT + lots.randrange(1, 6) * HOUR
        over = over if kind in OUTAGES else begin
        step = lots.choice(STEPS_OF_A_RUN if kind == "run-killed" else STEPS_OF_THE_VAULT)
        found.append(Fault(kind, begin, over, step))
        at = over + lots.randrange(12, 30) * HOUR
    return found


def expected_dumps(faults: Sequence[Fault], end: dt.datetime) -> dict[dt.datetime, tuple[set[Tier], bool]]:
    """For each slot in which a dump was possible: the tiers that were due, and whether the vault was away meanwhile."""
    scheduled = (Tier.HOURLY, Tier.DAILY, Tier.WEEKLY, Tier.MONTHLY)
    done: dict[Tier, dt.datetime] = {}
    expected = {}
    slot = latest(Tier.HOURLY, START)
    while slot < end:
        away = [fault for fault in faults if fault.begin < slot + SLOT and slot < fault.end]
        if not any(fault.kind in ("database", "machine") and fault.covers(slot) for fault in away):
            due = {tier for tier in scheduled if done.get(tier) != latest(tier, slot)}
            expected[slot] = due, any(fault.kind == "vault" and fault.meets_a_slot for fault in away)
            done |= {tier: latest(tier, slot) for tier in due}
        slot += SLOT
    return expected
