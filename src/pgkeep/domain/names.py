"""Names and times: the one place that knows how a backup and its sidecars are called."""

from __future__ import annotations

import datetime as dt
import re
import secrets
from enum import StrEnum
from urllib.parse import quote, unquote

from pgkeep.errors import FormatError


class Tier(StrEnum):
    """How often, and so for how long. The order is from the shortest-lived to the longest."""

    HOURLY = "hourly"
    DAILY = "daily"
    WEEKLY = "weekly"
    MONTHLY = "monthly"
    YEARLY = "yearly"
    MANUAL = "manual"


GLOBALS_DIRECTORY = "globals"
DUMP_SUFFIX = ".sql.gz"
CHECKSUM_SUFFIX = ".sha256"
MANIFEST_SUFFIX = ".manifest.json"
SIGNATURE_SUFFIX = ".manifest.json.sig"
SIDECAR_SUFFIXES = (CHECKSUM_SUFFIX, SIGNATURE_SUFFIX, MANIFEST_SUFFIX)

_TIMESTAMP = "%Y-%m-%d_%H-%M-%S"
_FILE_NAME = re.compile(r"(\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2})(?:\.(.+))?\.sql\.gz", re.ASCII)
_IDENTIFIER = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}", re.ASCII)


def new_identifier(moment: dt.datetime) -> str:
    """A backup's identifier, e.g. ``20260131T235959Z-1f2e3d``: sorts by time, unique in practice."""
    return f"{moment.astimezone(dt.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def is_identifier(text: str) -> bool:
    return _IDENTIFIER.fullmatch(text) is not None


def format_timestamp(moment: dt.datetime) -> str:
    """``2026-01-31_23-59-59`` in UTC, as the guide names its files."""
    return moment.astimezone(dt.UTC).strftime(_TIMESTAMP)


def parse_timestamp(text: str) -> dt.datetime:
    """The reverse of :func:`format_timestamp`. Raises ``FormatError``."""
    try:
        return dt.datetime.strptime(text, _TIMESTAMP).replace(tzinfo=dt.UTC)
    except ValueError as error:
        raise FormatError(f"{text!r} is not a backup's timestamp") from error


def dump_name(moment: dt.datetime, database: str | None) -> str:
    """The sealed file's name; ``database`` only where several share the vault.

    A database name may hold any character but NUL: everything but letters, digits, ``_`` and ``-``
    is percent-encoded, a leading dot and a dot in the middle included.
    """
    middle = "" if database is None else "." + quote(database, safe="").replace(".", "%2E").replace("~", "%7E")
    return f"{format_timestamp(moment)}{middle}{DUMP_SUFFIX}"


def parse_dump_name(name: str) -> tuple[dt.datetime, str | None]:
    """The reverse of :func:`dump_name`. Raises ``FormatError``."""
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        raise FormatError(f"{name!r} is not a backup's file name")
    moment = parse_timestamp(match.group(1))
    database = None if match.group(2) is None else unquote(match.group(2))
    # Another spelling of the same name would let two files stand for one backup, or lead out of the directory.
    if dump_name(moment, database) != name or "\0" in (database or ""):
        raise FormatError(f"{name!r} is not a backup's file name")
    return moment, database
