"""The manifest: what a sealed backup is, in JSON, strictly read.

A superset of the deployment guide's fields. Unknown *fields* of the same major version are kept
out of the way (a newer minor version may add some); an unknown major version is an error.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import Annotated, Any, Literal

import msgspec

from pgkeep.domain.names import Tier
from pgkeep.errors import FormatError

VERSION = "1.0"
# 100 000 tables with long names fit; anything larger is hostile or broken.
SIZE_LIMIT_BYTES = 64 * 1024 * 1024

Protection = Literal["chattr", "mode", "none"]
Kind = Literal["database", "globals"]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
# One component of a path, as the filesystem would take it.
FileName = Annotated[str, msgspec.Meta(max_length=255, pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
Moment = Annotated[dt.datetime, msgspec.Meta(tz=True)]


class TableStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What one table brought: rows, bytes of COPY text, bytes after compression.

    ``digest`` is over the chunks' digests: equal means equal content; a newer compressor may change it.
    """

    schema: str
    name: str
    rows: Count
    raw_bytes: Count
    compressed_bytes: Count
    digest: Digest


class DatabaseFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What ``restore --create`` needs to make an equal database; settings are (role, name, value)."""

    encoding: str
    collate: str
    ctype: str
    locale_provider: str = "libc"
    icu_locale: str | None = None
    icu_rules: str | None = None
    settings: tuple[tuple[str, str, str], ...] = ()
    extensions: tuple[tuple[str, str], ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sealed backup. Times are aware and in UTC; sizes in bytes."""

    version: str
    id: Name
    kind: Kind
    filename: FileName
    timestamp: Name
    type: Tier
    database: str
    size_bytes: Count
    sha256: Digest
    created_at: Moment
    sealed_at: Moment
    retain_until: Moment | None
    immutable: bool
    protection: Protection
    system_identifier: str
    server_version: str
    dump_version: str
    pgkeep_version: str
    dump_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    facts: DatabaseFacts | None = None
    tables: tuple[TableStatistics, ...] = ()
    large_objects: Count = 0
    raw_bytes: Count = 0
    recipients: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    # The agent's name for the dump: names of several tiers that share a dump share this.
    staged_id: str = ""

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)


def encode(manifest: Manifest) -> bytes:
    """Canonical JSON: fields in the declared order, two-space indent, one final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode(data: bytes) -> Manifest:
    """Read a manifest. Raises ``FormatError`` naming the first thing wrong with it."""
    if len(data) > SIZE_LIMIT_BYTES:
        raise FormatError(f"manifest is larger than {SIZE_LIMIT_BYTES} bytes")
    try:
        plain = json.loads(data, object_pairs_hook=_without_duplicates)
        version = plain.get("version") if isinstance(plain, dict) else None
        if isinstance(version, str) and version.split(".")[0] != VERSION.split(".")[0]:
            raise FormatError(f"manifest version {version!r} is not known here", "use a newer pgkeep")
        # From the bytes, not from ``plain``: this reader takes UTF-8 only, and no halves of characters or NaN.
        return msgspec.json.decode(data, type=Manifest)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"manifest is malformed: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise FormatError(f"manifest has the key {key!r} twice")
        found[key] = value
    return found
