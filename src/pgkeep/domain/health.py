"""What a service says of itself, and whether that still counts: a service that hangs says nothing new."""

from __future__ import annotations

import datetime as dt
from typing import Literal

import msgspec

from pgkeep.errors import FormatError

SIZE_LIMIT_BYTES = 64 * 1024
INTERVAL_SECONDS = 15.0
# A disk under load may hold a write up for long.
STALE_AFTER = dt.timedelta(seconds=60)

Role = Literal["agent", "vault", "extractor"]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Written by the service every :data:`INTERVAL_SECONDS`. ``problems`` are sentences; empty means well."""

    role: Role
    pid: int
    time: dt.datetime
    problems: tuple[str, ...] = ()


def encode(health: Health) -> bytes:
    return msgspec.json.encode(health) + b"\n"


def decode(data: bytes) -> Health:
    """Raises ``FormatError``."""
    try:
        return msgspec.json.decode(data, type=Health)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the health file is malformed: {error}") from error


def ailments(health: Health, now: dt.datetime) -> tuple[str, ...]:
    """What is wrong, the service's own word and its silence. A clock that was set back is no silence."""
    age = now - health.time
    if age > STALE_AFTER:
        return (f"the {health.role} has not reported for {age.total_seconds():.0f} s", *health.problems)
    return health.problems
