"""The audit log's chain: how a record is tied to the line before it, and whether a log still hangs together.

A record is one JSON object a line. ``sequence`` counts records from 1; ``previous`` is the SHA-256, in hex, of the
bytes of the line before without its newline, :data:`GENESIS` for a log's first line. Lines that are no records are
chained over, never taken back: the record after one says ``"torn": true`` (a power cut or a full disk cut it off)
or ``"unchained": true`` (written before there was a chain), and in ``covers`` holds the SHA-256 over the digests of
all lines from the last chained record to the one before itself: nobody else holds theirs. Whoever changes, adds or
removes a line that a record follows breaks the chain; cutting the end off shows only against a head digest that is
kept elsewhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

GENESIS = "0" * 64
# No record comes near it; a longer line is none, and its digest is that of so many bytes at its end.
LINE_LIMIT_BYTES = 1024 * 1024
RECORD_LIMIT_BYTES = 64 * 1024
TEXT_LIMIT_CHARACTERS = 4096
ITEMS_LIMIT = 100
# A log that is broken throughout is described well enough by so many.
REMARKS_LIMIT = 1000
_DEPTH_LIMIT = 8
_DECODER = json.JSONDecoder()
_CUT = "…[cut]"
_RESERVED = ("torn", "unchained", "covers")
# These stay however large the rest is: they say what a record is about.
_KEPT_DETAILS = ("id", "path")


class _Chained(msgspec.Struct):
    """What the chain needs of a line; other fields are not looked at."""

    sequence: Annotated[int, msgspec.Meta(ge=1)] | None = None
    previous: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")] | None = None
    torn: bool = False
    unchained: bool = False
    covers: str | None = None


Mark = Literal["torn", "unchained"]


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """What a new record says of its place. ``mark``: what the line before it is, where it is no chained record."""

    sequence: int
    previous: str
    mark: Mark | None = None
    covers: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """As they stand in the record."""
        marks: dict[str, Any] = {} if self.mark is None else {self.mark: True, "covers": self.covers}
        return {"sequence": self.sequence, "previous": self.previous, **marks}


@dataclasses.dataclass(frozen=True, slots=True)
class Remark:
    """Something about one line; the first line is 1."""

    line: int
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class Examination:
    """What a log was found to be. ``head`` and ``records`` are what an anchor elsewhere has to remember.

    ``records`` counts the chained ones, ``sequence`` is the last one's, ``head`` the last line's digest (of whatever
    kind it is). ``problems`` empty: nothing was changed or removed that another record followed.
    """

    lines: int
    records: int
    sequence: int
    head: str
    problems: tuple[Remark, ...]
    notes: tuple[Remark, ...]


def line_digest(line: bytes) -> str:
    """Of a line without its newline."""
    return hashlib.sha256(line[-LINE_LIMIT_BYTES:]).hexdigest()


def link(newest_first: Iterable[bytes]) -> Link:
    """The place of the next record. The lines come without newlines, the last one of the log first."""
    digests: list[str] = []
    sequence, mark = 0, None
    for line in newest_first:
        record = _read(line)
        if not digests:
            mark = _mark_for(record)
        digests.append(line_digest(line))
        if record is not None and record.sequence is not None:
            sequence = record.sequence
            break
    if mark is None:
        return Link(sequence + 1, digests[0] if digests else GENESIS)
    covers = hashlib.sha256("".join(reversed(digests)).encode("ascii"))
    return Link(sequence + 1, digests[0], mark, covers.hexdigest())


def encode(place: Link, fields: Mapping[str, Any], details: Mapping[str, Any]) -> bytes:
    """One line with its newline. Details are cut to size, and can't take the place of the record's own fields."""
    own = {**place.fields, **{name: _cut(value) for name, value in fields.items()}}
    told = {name: _cut(value) for name, value in details.items() if name not in {*own, *_RESERVED}}
    line = msgspec.json.encode({**own, **told})
    if len(line) >= RECORD_LIMIT_BYTES:
        line = msgspec.json.encode({**own, **{name: told[name] for name in _KEPT_DETAILS if name in told}, "cut": True})
    return line + b"\n"


def is_about(line: bytes, event: str, identifier: str) -> bool:
    """Is it a whole record (its newline included) of this event for this identifier?"""
    if not line.endswith(b"}\n"):
        return False
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return record.get("event") == event and record.get("id") == identifier


def sequence_of(line: bytes) -> int | None:
    """A chained record's place; None for a line (without its newline) that is no such record."""
    record = _read(line)
    return None if record is None else record.sequence


def examine(lines: Iterable[bytes]) -> Examination:
    """Follow the chain from the first line to the last; a newline at a line's end is not part of it."""
    examiner = _Examiner()
    for line in lines:
        examiner.look_at(line.removesuffix(b"\n"))
    return examiner.finish()


class _Examiner:
    """Where an examination stands: the line before, and what it was."""

    def __init__(self) -> None:
        self._lines = self._records = self._sequence = 0
        self._head = GENESIS
        self._before: Mark | None = None
        self._since_record = hashlib.sha256()
        self._problems: list[Remark] = []
        self._notes: list[Remark] = []

    def look_at(self, line: bytes) -> None:
        self._lines += 1
        record = _read(line)
        mark = _mark_for(record)
        if record is not None and mark is None:
            self._follow(record)
        elif record is None and _runs_on(line):
            self._problem("a record and more on one line: the newline between them was removed")
        self._head, self._before = line_digest(line), mark
        if mark is None:
            self._since_record = hashlib.sha256()
        self._since_record.update(self._head.encode("ascii"))

    def finish(self) -> Examination:
        if self._before is not None:
            self._note(self._lines, f"{_WORDS[self._before]}; the next record will say so")
        return Examination(
            self._lines, self._records, self._sequence, self._head, tuple(self._problems), tuple(self._notes)
        )

    def _follow(self, record: _Chained) -> None:
        assert record.sequence is not None, "a record without a place in the chain is marked"
        self._records += 1
        if record.sequence != self._sequence + 1:
            self._problem(f"its sequence is {record.sequence}, {self._sequence + 1} was to come")
        if record.previous != self._head:
            self._problem("the line before it is not the one that it was written after: changed, added or removed")
        covers = self._since_record.hexdigest() if self._before else None
        if (record.torn, record.unchained) != (self._before == "torn", self._before == "unchained"):
            self._problem("what it says of the line before it is not so")
        elif record.covers != covers:
            self._problem("the lines since the record before it are not those that it was written after")
        elif self._before is not None:
            self._note(self._lines - 1, f"{_WORDS[self._before]}; the record after it says so")
        self._sequence = record.sequence

    def _problem(self, message: str) -> None:
        if len(self._problems) < REMARKS_LIMIT:
            self._problems.append(Remark(self._lines, message))

    def _note(self, line: int, message: str) -> None:
        if len(self._notes) < REMARKS_LIMIT:
            self._notes.append(Remark(line, message))


_WORDS: dict[Mark, str] = {
    "torn": "no record: a write that was cut off",
    "unchained": "a record without a place in the chain, from before there was one",
}


def _read(line: bytes) -> _Chained | None:
    """None for what is no record."""
    if len(line) > LINE_LIMIT_BYTES:
        return None
    try:
        record = msgspec.json.decode(line, type=_Chained)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    half = (record.sequence is None) != (record.previous is None)
    return None if half else record


def _runs_on(line: bytes) -> bool:
    """A write that is cut off leaves less than a record, never more; but a power cut may fill up with zeros."""
    try:
        _, end = _DECODER.raw_decode(line[:LINE_LIMIT_BYTES].decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return line.startswith(b"{") and bool(line.decode(errors="replace")[end:].strip("\0"))


def _mark_for(record: _Chained | None) -> Mark | None:
    if record is None:
        return "torn"
    return "unchained" if record.sequence is None else None


def _cut(value: Any, depth: int = 0) -> Any:
    """Text and lists of a bearable size. Names in them may come from hostile hands, and need not be UTF-8."""
    if isinstance(value, str):
        text = value[:TEXT_LIMIT_CHARACTERS].encode(errors="backslashreplace").decode()
        return text if len(value) <= TEXT_LIMIT_CHARACTERS else text + _CUT
    if depth == _DEPTH_LIMIT and isinstance(value, Mapping | Sequence | set | frozenset):
        return _CUT
    if isinstance(value, Mapping):
        items = [(_cut(str(key)), _cut(item, depth + 1)) for key, item in list(value.items())[:ITEMS_LIMIT]]
        return dict([*items, *([(_CUT, len(value) - ITEMS_LIMIT)] if len(value) > ITEMS_LIMIT else [])])
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        items_kept = [_cut(item, depth + 1) for item in list(value)[:ITEMS_LIMIT]]
        return [*items_kept, *([_CUT] if len(value) > ITEMS_LIMIT else [])]
    return value
