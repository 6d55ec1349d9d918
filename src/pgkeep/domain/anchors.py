"""Anchors: what the head of the audit log was at a moment, kept where nobody who can write the log can write too.

An anchor names a record by its sequence number and the SHA-256 of its line, which covers every line before it. A log
that was cut off, rewritten (with its chain recomputed) or replaced by an older one does not hold that line. One small
JSON document each, ``anchors/<YYYY-MM>/<moment>-<sequence>.json``, never changed: ``docs/format.md`` describes it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec

from pgkeep.domain import audit
from pgkeep.errors import FormatError

FOLDER = "anchors"
SUFFIX = ".json"
FORMAT = 1
# A signature has room too.
SIZE_LIMIT_BYTES = 16 * 1024

_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Moment = Annotated[dt.datetime, msgspec.Meta(tz=True)]


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The last record of a log: its place in the chain, the digest of its line, its own time, and the log's length up
    to it, the newline included."""

    sequence: Annotated[int, msgspec.Meta(ge=1)]
    sha256: _Digest
    time: _Moment
    log_bytes: Annotated[int, msgspec.Meta(ge=1)]


class _Timed(msgspec.Struct):
    time: _Moment


class Anchor(msgspec.Struct, frozen=True, kw_only=True):
    """The document. ``vault``: the identity of the vault whose log it is."""

    format: int = FORMAT
    vault: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    anchored_at: _Moment
    head: Head


# Made here, by one thread: msgspec 0.22 crashes where several threads are the first to decode a type.
_ANCHOR_DECODER: Final = msgspec.json.Decoder(Anchor)
_TIMED_DECODER: Final = msgspec.json.Decoder(_Timed)


@dataclasses.dataclass(frozen=True, slots=True)
class Placed:
    """An anchor as it was found: ``label`` says where (its path, and its version if the place has such)."""

    label: str
    anchor: Anchor


@dataclasses.dataclass(frozen=True, slots=True)
class Contradiction:
    """A log that is not the one that was anchored."""

    anchor: Placed
    kind: Literal["cut off", "rewritten"]
    message: str


def encode(anchor: Anchor) -> bytes:
    """One line with its newline; the same for equal anchors."""
    return msgspec.json.encode(anchor) + b"\n"


def decode(data: bytes) -> Anchor:
    """Fields that are not known here are passed over. Raises ``FormatError``, also for a later format."""
    try:
        anchor = _ANCHOR_DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the anchor is malformed: {error}") from error
    if anchor.format != FORMAT:
        raise FormatError(f"the anchor has format {anchor.format}, known here is {FORMAT}", "use a newer pgkeep")
    return anchor


def path_of(anchor: Anchor) -> str:
    """Where it is kept at a destination; no two moments share one."""
    moment = anchor.anchored_at.astimezone(dt.UTC)
    name = f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond:06}Z-{anchor.head.sequence}{SUFFIX}"
    return f"{FOLDER}/{moment:%Y-%m}/{name}"


def head_of(line: bytes, end: int) -> Head | None:
    """What an anchor says of a log whose last record is ``line`` (without its newline) and ends, with the newline, at
    ``end``; None where the line is no record of the chain."""
    sequence = audit.sequence_of(line)
    try:
        time = _TIMED_DECODER.decode(line).time if sequence else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if sequence is None or time is None:
        return None
    return Head(sequence=sequence, sha256=audit.line_digest(line), time=time, log_bytes=end)


def compare(anchors: Iterable[Placed], digests: Mapping[int, str], last: int) -> list[Contradiction]:
    """What in a log contradicts the anchors, by sequence; ``last`` is the log's last record.

    ``digests``: of the lines of its records, by sequence, of those at least that are anchored. The log's chain must
    have been examined: an anchor vouches for the lines before its own only through that.
    """
    found = []
    for placed in sorted(anchors, key=lambda each: (each.anchor.head.sequence, each.label)):
        head = placed.anchor.head
        anchored = f"record {head.sequence} was anchored at {_moment(placed.anchor.anchored_at)} ({placed.label})"
        if head.sequence > last:
            text = f"the log ends with record {last}, but {anchored}: its end was cut off, or it is an older log"
            found.append(Contradiction(placed, "cut off", text))
        elif digests.get(head.sequence) != head.sha256:
            text = f"{anchored} with another digest: it, or a record before it, was changed afterwards"
            found.append(Contradiction(placed, "rewritten", text))
    return found


def newest(anchors: Sequence[Placed]) -> Placed | None:
    """By the log, not by the clock: the one that vouches for the most."""
    return max(anchors, key=lambda each: (each.anchor.head.sequence, each.anchor.anchored_at), default=None)


def _moment(moment: dt.datetime) -> str:
    return f"{moment.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"
