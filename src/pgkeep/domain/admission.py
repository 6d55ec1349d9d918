"""Under which tiers a dump is sealed: the agent's word is a hint, the vault's clock and what it sealed decide.

The tier decides how long nobody can remove a backup: an agent in other hands must not fill the disk with yearly ones,
and an honest one never loses a tier. So a tier that is due is granted, once a slot; beside that each has a quota for
runs by hand; what exceeds it becomes ``manual``, which is bounded too; and what exceeds that is refused.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from pgkeep.domain import schedule
from pgkeep.domain.catalog import SealedBackup
from pgkeep.domain.manifest import Kind, Manifest
from pgkeep.domain.names import Tier
from pgkeep.domain.request import Request

HOURLY_BY_HAND: Final = 12
MANUAL_PRESENT: Final = 30
# After the clock was set back a time is lived twice: what was sealed then, what is sealed now, and what lies ahead.
SET_BACK_FACTOR: Final = 3
DEFAULT_SUBJECTS: Final = 64

_DAY: Final = dt.timedelta(days=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Quota:
    """So many backups of one tier and subject in any span of this length, by the moment of their sealing."""

    count: int
    window: dt.timedelta


QUOTAS: Final[Mapping[Tier, Quota]] = {
    Tier.DAILY: Quota(4, _DAY),
    Tier.WEEKLY: Quota(2, 7 * _DAY),
    Tier.MONTHLY: Quota(2, 28 * _DAY),
    Tier.YEARLY: Quota(1, 365 * _DAY),
    Tier.MANUAL: Quota(10, _DAY),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What the vault grants: the tiers of its schedule with their expressions, and how many subjects it takes."""

    expressions: Mapping[Tier, str]
    zone: str
    quotas: Mapping[Tier, Quota]
    subjects: int = DEFAULT_SUBJECTS

    @classmethod
    def of(cls, expressions: Mapping[Tier, str], zone: str, now: dt.datetime, subjects: int) -> Policy:
        """Reads the schedule once, for how many hourly backups a day it makes."""
        hourly = Quota(_slots_a_day(expressions.get(Tier.HOURLY), zone, now) + HOURLY_BY_HAND, _DAY)
        return cls(expressions, zone, {Tier.HOURLY: hourly, **QUOTAS}, subjects)


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """The tiers to seal a dump under. ``refusal``: why under none at all. ``notes``: why not as it was asked for.

    ``present``: the names that this dump has already, from a sealing that was cut off before its answer.
    """

    tiers: tuple[Tier, ...] = ()
    notes: tuple[str, ...] = ()
    refusal: str = ""
    present: tuple[SealedBackup, ...] = ()


Subject = tuple[str, Kind, str]


def subject_of(described: Request | Manifest) -> Subject:
    """What a quota is for: one database of one server. Roles and tablespaces are their server's."""
    name = described.database if described.kind == "database" else ""
    return described.system_identifier, described.kind, name


def assign(request: Request, now: dt.datetime, sealed: Sequence[SealedBackup], policy: Policy) -> Admission:
    """Decide by the vault's time ``now`` and by all that it holds. Pure; the order of ``sealed`` does not matter."""
    subject = subject_of(request)
    present = tuple(backup for backup in sealed if staged_id(backup) == request.id)
    others = (backup for backup in sealed if backup.manifest.id == request.id != staged_id(backup))
    if any(subject_of(backup.manifest) != subject for backup in present) or any(others):
        return Admission(refusal=f"the identifier {request.id} is another backup's")
    own = [backup for backup in sealed if subject_of(backup.manifest) == subject]
    if not own and len({subject_of(backup.manifest) for backup in sealed}) >= policy.subjects:
        return Admission(refusal=f"the vault holds {policy.subjects} different databases, and takes no further one")
    return _Clerk(own, now, policy).decide(_wanted(request, present), present)


def staged_id(backup: SealedBackup) -> str:
    """The agent's name for the dump that this is a name of."""
    return backup.manifest.staged_id or backup.manifest.id


def _wanted(request: Request, present: Sequence[SealedBackup]) -> list[Tier]:
    """What the dump still lacks. Globals have one name however many tiers ask."""
    if present and request.kind == "globals":
        return []
    return [tier for tier in dict.fromkeys(request.tiers) if tier not in {backup.manifest.type for backup in present}]


class _Clerk:
    """Grants tiers to one subject, of which ``own`` are the backups."""

    def __init__(self, own: Sequence[SealedBackup], now: dt.datetime, policy: Policy) -> None:
        self._own = own
        self._now = now
        self._policy = policy

    def decide(self, wanted: Sequence[Tier], present: tuple[SealedBackup, ...]) -> Admission:
        objections = {tier: objection for tier in wanted if (objection := self._objection(tier))}
        granted = [tier for tier in wanted if tier not in objections]
        notes = list(objections.values())
        held = {*granted, *(backup.manifest.type for backup in present)}
        if objections.keys() - {Tier.MANUAL} and Tier.MANUAL not in held:
            beyond = objections.get(Tier.MANUAL) or self._objection(Tier.MANUAL)
            if not beyond:
                granted.append(Tier.MANUAL)
            elif beyond not in notes:
                notes.append(beyond)
        if not granted and not present:
            return Admission(refusal="; ".join(notes))
        return Admission(tuple(granted), tuple(notes), present=present)

    def _objection(self, tier: Tier) -> str:
        """Why not; empty where it is granted."""
        if tier is Tier.MANUAL and len(self._of(tier)) >= MANUAL_PRESENT:
            return f"{tier}: {MANUAL_PRESENT} are here already"
        if tier is not Tier.MANUAL:
            if tier not in self._policy.expressions:
                return f"{tier}: the vault's schedule has it switched off"
            if self._is_due(tier):
                return ""
        window = self._policy.quotas[tier].window
        recent = [moment for moment in self._of(tier) if _is_within(moment, self._now, window)]
        return f"{tier}: {len(recent)} in {_span(window)} already" if len(recent) >= self._limit(tier, recent) else ""

    def _limit(self, tier: Tier, recent: Sequence[dt.datetime]) -> int:
        """More where the clock was set back, which no agent can do: its slots come again, and are served again."""
        is_set_back = tier is not Tier.MANUAL and any(schedule.is_future(moment, self._now) for moment in recent)
        return self._policy.quotas[tier].count * (SET_BACK_FACTOR if is_set_back else 1)

    def _is_due(self, tier: Tier) -> bool:
        newest = max((moment for moment in self._of(tier) if not schedule.is_future(moment, self._now)), default=None)
        expressions = {tier: self._policy.expressions[tier]}
        return tier in schedule.due(expressions, self._policy.zone, {tier: newest}, {}, self._now)

    def _of(self, tier: Tier) -> list[dt.datetime]:
        return [backup.manifest.sealed_at for backup in self._own if backup.manifest.type is tier]


def _is_within(moment: dt.datetime, now: dt.datetime, window: dt.timedelta) -> bool:
    """On both sides: when the clock was set back, what was sealed before that still counts, but not for ever."""
    return abs(now - moment) < window


def _slots_a_day(expression: str | None, zone: str, now: dt.datetime) -> int:
    return 0 if expression is None else sum(1 for _ in _slots(expression, zone, now))


def _slots(expression: str, zone: str, now: dt.datetime) -> Iterator[dt.datetime]:
    slot = schedule.next_slot(expression, zone, now)
    while slot <= now + _DAY:
        yield slot
        slot = schedule.next_slot(expression, zone, slot)


def _span(window: dt.timedelta) -> str:
    return "24 hours" if window == _DAY else f"{window.days} days"


def newest_by_tier(sealed: Iterable[SealedBackup], now: dt.datetime) -> dict[Tier, SealedBackup]:
    """The newest database backup of each tier, whatever database; times in the future do not count."""
    newest: dict[Tier, SealedBackup] = {}
    for backup in sealed:
        manifest = backup.manifest
        if manifest.kind == "database" and not schedule.is_future(manifest.sealed_at, now):
            known = newest.get(manifest.type)
            if known is None or known.manifest.sealed_at < manifest.sealed_at:
                newest[manifest.type] = backup
    return newest
