"""What the service remembers over restarts, in ``staging/.agent.json``. Losing it costs at most one run too many."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import msgspec

from pgkeep.adapters import durable
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.domain.names import Tier
from pgkeep.errors import FormatError, NotFoundError

FILE_NAME = ".agent.json"
SIZE_LIMIT_BYTES = 64 * 1024


class State(msgspec.Struct, kw_only=True):
    """``handled``: the last slot of each tier that was dealt with, well or for good.

    ``pending``: the slots of the run under way or of one that failed, ``pending_since`` its first try; ``unended``: how
    many runs in a row began and never ended, because the service itself was killed. ``ahead``: the newest backup of a
    tier where it was made before the clock was set back.
    """

    first_started_at: dt.datetime
    handled: dict[Tier, dt.datetime] = {}
    ahead: dict[Tier, dt.datetime] = {}
    pending: dict[Tier, dt.datetime] = {}
    pending_since: dt.datetime | None = None
    unended: int = 0
    tried_at: dt.datetime | None = None
    last_failure: str = ""
    overrun: str = ""


def load(staging: Path, now: dt.datetime) -> State:
    """A new one where there is none, or none that can be read. Raises ``StorageError``."""
    try:
        return msgspec.json.decode(read_sidecar(staging / FILE_NAME, SIZE_LIMIT_BYTES), type=State)
    except (NotFoundError, FormatError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return State(first_started_at=now)


def save(staging: Path, state: State) -> None:
    """Raises ``StorageError``."""
    durable.write_atomically(staging, FILE_NAME, msgspec.json.encode(state) + b"\n", 0o600)
