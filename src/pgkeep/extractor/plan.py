"""What a pass has to do: pure decisions from what the vault holds, what was copied, and what is seen outside."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from pgkeep.domain import manifest as manifests
from pgkeep.domain import names
from pgkeep.domain.manifest import Moment

Signature = tuple[int, int, int]
"""A manifest's inode, size and time of change: the same means that it need not be read again."""
Problem = Literal["", "missing", "damaged"]
# Of all copies, in one pass, however long none was looked at.
RECHECK_PART_MAXIMUM = 0.25
# Done a little sooner than promised: passes come late, and a copy is read whole or not at all.
_RECHECK_HASTE = 0.9


# What the vault keeps beyond its promise may be about to go: nobody locks it anew in the first moments.
_KEPT_BEYOND = dt.timedelta(days=1)


class File(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One file of a copy, as it was when it was compared with its source; ``version`` as the place calls it."""

    size_bytes: int
    sha256: str
    version: str = ""


class Origin(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What of the source's manifest decides how long its copy stays, and under what lock."""

    kind: manifests.Kind
    type: names.Tier
    database: str
    system_identifier: str
    created_at: Moment
    sealed_at: Moment
    retain_until: Moment | None
    is_doubted: bool = False


class Locked(msgspec.Struct, frozen=True, gc=False):
    """The destination's own lock on a copy, as it was when it was last asked for."""

    since: Moment
    until: Moment


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One copy at one destination. ``path`` is there, ``files`` by what follows the dump's name; times in UTC.

    ``problem`` stays until the copy is whole again. ``expired_at``: its time at the destination was over then; it is
    gone or about to go, and remembered while the vault has the original, so that it is not copied anew.
    """

    id: str
    path: str
    files: dict[str, File]
    source: Signature
    copied_at: Moment
    checked_at: Moment
    problem: Problem = ""
    origin: Origin | None = None
    locked: Locked | None = None
    expired_at: Moment | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """By path below ``active/``.

    ``to_copy``: what has no copy, or may have changed; newest first. ``broken``: copies that are not whole.
    ``reappeared``: they were missing. ``to_reread``: those whose names and sizes are right, to be read in turn.
    """

    to_copy: tuple[str, ...]
    broken: Mapping[str, Problem]
    reappeared: tuple[str, ...]
    to_reread: tuple[str, ...]


def path_outside(path: str) -> str:
    """``daily/X.sql.gz`` goes to ``daily/<YYYY-MM-DD>/X.sql.gz``: the day of its name, UTC. Raises ``FormatError``."""
    directory, _, filename = path.partition("/")
    moment, _ = names.parse_dump_name(filename)
    return f"{directory}/{moment:%Y-%m-%d}/{filename}"


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def living(records: Mapping[str, Record]) -> dict[str, Record]:
    """Those that are to be there."""
    return {path: record for path, record in records.items() if record.expired_at is None}


def files_of(records: Iterable[Record]) -> dict[str, str]:
    """Every file of these copies: its path at the destination, and its version."""
    return {record.path + suffix: file.version for record in records for suffix, file in record.files.items()}


def compare(sources: Mapping[str, Signature], records: Mapping[str, Record], sizes: Mapping[str, int]) -> Plan:
    """``sizes``: of the records' files, by path at the destination; what is not there is not in it."""
    seen = {path: state_outside(record, sizes) for path, record in records.items()}
    there = [path for path, state in seen.items() if not state]
    # Read and found bad: names and sizes don't show it.
    bad = {path: records[path].problem for path in there if records[path].problem == "damaged"}
    unknown = [path for path, signature in sources.items() if path not in records or records[path].source != signature]
    return Plan(
        to_copy=tuple(sorted(unknown, key=lambda path: (path.partition("/")[2], path), reverse=True)),
        broken={path: state for path, state in seen.items() if state} | bad,
        reappeared=tuple(path for path in there if records[path].problem == "missing"),
        to_reread=tuple(path for path in there if records[path].problem != "missing"),
    )


def state_outside(record: Record, sizes: Mapping[str, int]) -> Problem:
    """Judged by names and sizes alone."""
    seen = {suffix: sizes.get(record.path + suffix) for suffix in record.files}
    if all(seen[suffix] == file.size_bytes for suffix, file in record.files.items()):
        return ""
    return "missing" if None in seen.values() else "damaged"


def lock_wanted(record: Record, now: dt.datetime, longest: dt.timedelta) -> dt.datetime | None:
    """Until when to lock the copy of a backup that the vault still has; None: its lock will do.

    Only when less than half of it is left: each extension is a request for every file. ``longest``: no lock may end
    later than that from now.
    """
    locked, origin = record.locked, record.origin
    if locked is None or origin is None or (locked.until - now) * 2 > locked.until - locked.since:
        return None
    if origin.retain_until is None:
        wanted = now + longest
    elif origin.retain_until > locked.until:
        wanted = min(origin.retain_until, now + longest)
    elif now < origin.retain_until + _KEPT_BEYOND:
        return None
    else:
        wanted = now + min(locked.until - locked.since, longest)
    return wanted if wanted > locked.until else None


def to_recheck(
    records: Mapping[str, Record], paths: Iterable[str], now: dt.datetime, period: dt.timedelta, since: dt.datetime
) -> tuple[list[str], dt.datetime]:
    """Which copies to read in full now, and the moment up to which the reading is then done.

    The time from ``since`` to now pays for as large a part of all bytes as it is of ``period``; the copies that were
    not read for longest come first. So all have their turn, evenly. No pass reads more than a quarter, or as much as
    the largest copy; what it may not read, the next one does. One that is overdue is read in any case.
    """
    order = sorted(paths, key=lambda path: (_last_check(records[path], now, period), path))
    total_bytes = sum(records[path].size_bytes for path in order)
    if total_bytes == 0:
        return order, now
    pace = period * _RECHECK_HASTE
    largest_part = max(RECHECK_PART_MAXIMUM, max(records[path].size_bytes for path in order) / total_bytes)
    # What one pass may not read is left to the next one.
    since = min(max(since, now - pace * largest_part * 2), now)
    chosen = _affordable(order, records, math.ceil(total_bytes * min((now - since) / pace, largest_part)))
    if not chosen and now - _last_check(records[order[0]], now, period) >= pace:
        chosen = order[:1]
    spent_bytes = sum(records[path].size_bytes for path in chosen)
    return chosen, min(since + pace * (spent_bytes / total_bytes), now)


def _affordable(order: Sequence[str], records: Mapping[str, Record], credit_bytes: int) -> list[str]:
    chosen = []
    for path in order:
        credit_bytes -= records[path].size_bytes
        if credit_bytes < 0:
            break
        chosen.append(path)
    return chosen


def _last_check(record: Record, now: dt.datetime, period: dt.timedelta) -> dt.datetime:
    """A check that is yet to come was written under another clock, and counts as none."""
    return record.checked_at if record.checked_at <= now else now - period
