"""Which backups stay and which go: a pure function from what there is to a plan with reasons.

In order of authority: nothing goes before the moment fixed at its sealing (the policy of today may only
extend it); the newest good backups of each database stay however old they are; so do the newest good ones of
each tier and database that a required destination has not got yet, but never more of them, or a destination kept
down would fill the disk; what is not good never counts as good, and goes only when enough good ones remain; the
roles and tablespaces that a kept database backup needs stay with it.
"""

from __future__ import annotations

import datetime as dt
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from pgkeep.domain.catalog import SealedBackup, ordered, sealing_order
from pgkeep.domain.names import Tier
from pgkeep.errors import ConfigurationError

DEFAULT_DAYS: Mapping[Tier, int | None] = MappingProxyType(
    {Tier.HOURLY: 2, Tier.DAILY: 7, Tier.WEEKLY: 28, Tier.MONTHLY: 365, Tier.YEARLY: None, Tier.MANUAL: 30}
)
DEFAULT_KEEP_MINIMUM = 3
NOTHING_AWAITED: Mapping[str, Collection[str]] = MappingProxyType({})


class Rule(StrEnum):
    """What decided. ``EXPIRED`` alone means that the backup goes."""

    CLOCK_WENT_BACK = "clock-went-back"
    FOR_EVER = "for-ever"
    RETAINED = "retained"
    NEWEST_GOOD = "newest-good"
    NOT_YET_COPIED = "not-yet-copied"
    TOO_FEW_GOOD = "too-few-good"
    NEEDED_GLOBALS = "needed-globals"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Policy:
    """Days to keep for each tier (``None``: for ever), and how many good backups stay whatever happens.

    Raises ``ConfigurationError`` for a missing tier or a number out of range.
    """

    days: Mapping[Tier, int | None] = field(default_factory=lambda: DEFAULT_DAYS)
    keep_minimum: int = DEFAULT_KEEP_MINIMUM

    def __post_init__(self) -> None:
        missing = [tier.value for tier in Tier if tier not in self.days]
        if missing:
            raise ConfigurationError(f"no retention is set for {', '.join(missing)}", "set days for every tier")
        for tier, days in self.days.items():
            if days is not None and days < 0:
                raise ConfigurationError(f"retention of {tier} is {days} days", "use 0 or more, or none for ever")
        if self.keep_minimum < 1:
            raise ConfigurationError(f"the least number of good backups is {self.keep_minimum}", "use 1 or more")
        # A copy, so that a plan can't change under its reader.
        object.__setattr__(self, "days", MappingProxyType(dict(self.days)))


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one backup, by which rule, and a sentence for people that says why."""

    backup: SealedBackup
    keep: bool
    reason: str
    rule: Rule


def retain_until(policy: Policy, tier: Tier, sealed_at: dt.datetime) -> dt.datetime | None:
    """The moment that a policy promises at sealing; ``None`` is for ever (past the calendar's end too)."""
    days = policy.days[tier]
    if days is None:
        return None
    try:
        return sealed_at + dt.timedelta(days=days)
    except OverflowError:
        return None


def plan(
    backups: Iterable[SealedBackup],
    policy: Policy,
    now: dt.datetime,
    unconfirmed: Mapping[str, Collection[str]] = NOTHING_AWAITED,
) -> list[Decision]:
    """One decision for each backup, the oldest first: carried out in this order, a crash leaves the newer ones.

    ``now`` is aware, and comes from the vault's trusted clock. ``unconfirmed``: by the name of each required
    destination, the paths in the vault that are not known to be there. The result does not depend on the input's order.
    """
    present = ordered(backups)
    good = _good_dumps(present, _group)
    grounds = _Grounds(good, _paths_of_newest(good, policy.keep_minimum), _pins(present, policy, unconfirmed))
    decisions = [_decide_alone(backup, policy, now, grounds) for backup in present]
    needed = _needed_globals(decisions)
    return [_keep_if_needed(decision, needed) for decision in decisions]


_Group = tuple[str, ...]
# The names of one dump in several tiers are one backup when good ones are counted: they share their fate.
_GoodDumps = Mapping[_Group, Sequence[Sequence[SealedBackup]]]


@dataclass(frozen=True, slots=True)
class _Grounds:
    """What keeps a backup whose time is over. ``pins``: by path, the destinations that have not got it."""

    good: _GoodDumps
    newest: frozenset[str]
    pins: Mapping[str, Sequence[str]]


def _group(backup: SealedBackup) -> _Group:
    manifest = backup.manifest
    return manifest.system_identifier, manifest.kind, manifest.database


def _group_in_tier(backup: SealedBackup) -> _Group:
    return *_group(backup), backup.manifest.type.value


def _pins(
    present: Sequence[SealedBackup], policy: Policy, unconfirmed: Mapping[str, Collection[str]]
) -> Mapping[str, Sequence[str]]:
    """For each destination the newest good ones that it has not got, so many of each tier and database."""
    pins: dict[str, list[str]] = defaultdict(list)
    for destination in sorted(unconfirmed):
        awaited = frozenset(unconfirmed[destination])
        missing = _good_dumps((each for each in present if each.path_in_vault in awaited), _group_in_tier)
        for path in _paths_of_newest(missing, policy.keep_minimum):
            pins[path].append(destination)
    return pins


def _good_dumps(present: Iterable[SealedBackup], group: Callable[[SealedBackup], _Group]) -> _GoodDumps:
    """For each group its good dumps, the newest first, each with all its names."""
    dumps: dict[_Group, dict[tuple[dt.datetime, str], list[SealedBackup]]] = defaultdict(lambda: defaultdict(list))
    for backup in present:
        if backup.is_good:
            dumps[group(backup)][backup.manifest.created_at, backup.manifest.sha256].append(backup)
    return {
        group: sorted(of_group.values(), key=lambda names: max(map(sealing_order, names)), reverse=True)
        for group, of_group in dumps.items()
    }


def _paths_of_newest(good: _GoodDumps, count: int) -> frozenset[str]:
    return frozenset(
        backup.path_in_vault for of_group in good.values() for names in of_group[:count] for backup in names
    )


def _decide_alone(backup: SealedBackup, policy: Policy, now: dt.datetime, grounds: _Grounds) -> Decision:
    """The decision without regard to what other backups need of this one."""
    manifest = backup.manifest
    if now < manifest.sealed_at:
        reason = f"kept: the clock shows {_moment(now)}, before it was sealed at {_moment(manifest.sealed_at)}"
        return Decision(backup, True, reason, Rule.CLOCK_WENT_BACK)
    until = _effective_end(backup, policy)
    if until is None:
        return Decision(backup, True, f"kept: for ever ({manifest.type})", Rule.FOR_EVER)
    if now < until:
        reason = f"kept: until {_moment(until)} ({manifest.type}, {_origin(backup, policy)})"
        return Decision(backup, True, reason, Rule.RETAINED)
    return _decide_expired(backup, policy, now - until, grounds)


def _decide_expired(backup: SealedBackup, policy: Policy, since: dt.timedelta, grounds: _Grounds) -> Decision:
    if backup.path_in_vault in grounds.newest:
        reason = f"kept: one of the newest {policy.keep_minimum} good backups of {_subject(backup)}"
        return Decision(backup, True, reason, Rule.NEWEST_GOOD)
    if backup.path_in_vault in grounds.pins:
        where = " and ".join(grounds.pins[backup.path_in_vault])
        which = f"one of the newest {policy.keep_minimum} {backup.manifest.type} backups of {_subject(backup)}"
        return Decision(backup, True, f"kept: not yet at {where} ({which} that are not)", Rule.NOT_YET_COPIED)
    if backup.is_good:
        return Decision(backup, False, f"removed: expired {_age(since)} ago", Rule.EXPIRED)
    remaining = len(grounds.good.get(_group(backup), ()))
    doubt = backup.state if backup.state != "sealed" else "with findings"
    if remaining < policy.keep_minimum:
        counted = f"{remaining} good of {policy.keep_minimum} wanted"
        reason = f"kept: {doubt}, but {_subject(backup)} has too few good backups ({counted})"
        return Decision(backup, True, reason, Rule.TOO_FEW_GOOD)
    return Decision(backup, False, f"removed: expired {_age(since)} ago ({doubt})", Rule.EXPIRED)


def _effective_end(backup: SealedBackup, policy: Policy) -> dt.datetime | None:
    """The later of what was promised at sealing and what the policy of today would promise."""
    recorded = backup.manifest.retain_until
    promised = _promised_now(backup, policy)
    return None if recorded is None or promised is None else max(recorded, promised)


def _promised_now(backup: SealedBackup, policy: Policy) -> dt.datetime | None:
    return retain_until(policy, backup.manifest.type, backup.manifest.sealed_at)


def _origin(backup: SealedBackup, policy: Policy) -> str:
    if _promised_now(backup, policy) != _effective_end(backup, policy):
        return "fixed at sealing"
    days = policy.days[backup.manifest.type]
    return "1 day" if days == 1 else f"{days} days"


def _needed_globals(decisions: Sequence[Decision]) -> Mapping[str, SealedBackup]:
    """By path, the globals that kept database backups need, each with the newest backup that needs it."""
    globals_of: dict[str, list[SealedBackup]] = defaultdict(list)
    for decision in decisions:
        if decision.backup.manifest.kind == "globals":
            globals_of[decision.backup.manifest.system_identifier].append(decision.backup)
    choices = {cluster: _Companions(of_cluster) for cluster, of_cluster in globals_of.items()}
    needed: dict[str, SealedBackup] = {}
    for decision in decisions:
        manifest = decision.backup.manifest
        if decision.keep and manifest.kind == "database" and manifest.system_identifier in choices:
            companion = choices[manifest.system_identifier].find(manifest.created_at)
            needed[companion.path_in_vault] = decision.backup
    return needed


class _Companions:
    """The globals of one cluster, asked which of them belongs to a moment.

    Good ones come before others wherever they lie, so that a bad one can never take a good one's place. The
    choice looks at no policy: a longer one then only ever adds to what is needed.
    """

    def __init__(self, of_cluster: Sequence[SealedBackup]) -> None:
        good = [backup for backup in of_cluster if backup.is_good]
        self._by_creation = sorted(good or of_cluster, key=_creation_order)
        self._moments = [backup.manifest.created_at for backup in self._by_creation]

    def find(self, moment: dt.datetime) -> SealedBackup:
        """The newest at or before the moment; where there is none, the first after it."""
        return self._by_creation[max(bisect_right(self._moments, moment) - 1, 0)]


def _creation_order(backup: SealedBackup) -> tuple[dt.datetime, tuple[dt.datetime, dt.datetime, str, str]]:
    return backup.manifest.created_at, sealing_order(backup)


def _keep_if_needed(decision: Decision, needed: Mapping[str, SealedBackup]) -> Decision:
    dependent = needed.get(decision.backup.path_in_vault)
    if decision.keep or dependent is None:
        return decision
    reason = f"kept: {dependent.path_in_vault} of {_subject(dependent)} needs these roles and tablespaces"
    return Decision(decision.backup, True, reason, Rule.NEEDED_GLOBALS)


def _subject(backup: SealedBackup) -> str:
    """A database name may hold control characters: such a one is shown quoted."""
    if backup.manifest.kind == "globals":
        return "roles and tablespaces"
    name = backup.manifest.database
    return name if name.isprintable() and name.strip() else repr(name)


def _moment(moment: dt.datetime) -> str:
    try:
        return f"{moment.astimezone(dt.UTC):%Y-%m-%d %H:%M} UTC"
    except OverflowError:
        # At the calendar's edges an offset can't be taken off.
        return moment.isoformat()


def _age(span: dt.timedelta) -> str:
    """``3 h``: one unit is enough for a reason."""
    minutes = span // dt.timedelta(minutes=1)
    if minutes < 1:
        return "less than a minute"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h"
    return f"{minutes // (24 * 60)} days"
