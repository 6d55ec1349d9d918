"""What the agent says of a dump that it hands over: hints, which the vault checks or overrules."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import msgspec

from pgkeep.domain.manifest import DatabaseFacts, Kind
from pgkeep.domain.names import Tier
from pgkeep.errors import FormatError

FILE_NAME = "request.json"
DUMP_NAME = "dump.sql.gz"
SIZE_LIMIT_BYTES = 4 * 1024 * 1024

_Short = Annotated[str, msgspec.Meta(max_length=1024)]
# No name of PostgreSQL's holds a zero byte; this one becomes part of a file's name.
_DatabaseName = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"\A[^\x00]*\Z")]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Travels as ``request.json`` beside ``dump.sql.gz`` in ``staging/<id>.ready/``."""

    id: Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}\Z")]
    kind: Kind
    tiers: Annotated[tuple[Tier, ...], msgspec.Meta(min_length=1, max_length=len(Tier))]
    database: _DatabaseName
    created_at: Annotated[dt.datetime, msgspec.Meta(tz=True)]
    system_identifier: _Short
    server_version: _Short
    dump_version: _Short
    dump_seconds: Annotated[float, msgspec.Meta(ge=0)]
    facts: DatabaseFacts | None = None
    notes: tuple[_Short, ...] = ()
    # One of several databases: its name goes into the file's.
    is_one_of_several: bool = False


def encode(request: Request) -> bytes:
    return msgspec.json.encode(request)


def decode(data: bytes) -> Request:
    """Raises ``FormatError``."""
    if len(data) > SIZE_LIMIT_BYTES:
        raise FormatError(f"the request is larger than {SIZE_LIMIT_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=Request)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the request is malformed: {error}") from error
