"""The mark that a vault leaves where it was when it has moved: nothing is written there any more."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import msgspec

from pgkeep.adapters import durable
from pgkeep.adapters.sidecars import read_sidecar
from pgkeep.errors import FormatError, NotFoundError, RefusedError

NAME = "moved.json"
_SIZE_LIMIT_BYTES = 64 * 1024


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """``state/moved.json``. ``id``: the vault's; ``left_behind``: what could not be taken along, in words."""

    id: str
    to: str
    at: dt.datetime
    left_behind: tuple[str, ...] = ()


def read(state: Path) -> Moved | None:
    """None where the vault has not moved. Raises ``FormatError``, ``StorageError``."""
    try:
        return msgspec.json.decode(read_sidecar(state / NAME, _SIZE_LIMIT_BYTES), type=Moved)
    except NotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{state / NAME} is unreadable: {error}", "the vault was moved; find out where to") from error


def write(state: Path, moved: Moved) -> None:
    """From its return on the vault is no longer here. Raises ``StorageError``."""
    durable.write_atomically(state, NAME, msgspec.json.encode(moved) + b"\n", 0o600)


def refuse(state: Path) -> None:
    """Raises ``RefusedError`` where the vault has moved, ``FormatError``, ``StorageError``."""
    if (moved := read(state)) is not None:
        raise RefusedError(
            f"the vault {moved.id} was moved from here to {moved.to} at {moved.at:%Y-%m-%d %H:%M:%S} UTC",
            f"set PGKEEP_ROOT to {moved.to}; if the move was cut off, `pgkeep vault move {moved.to}` finishes it",
        )
