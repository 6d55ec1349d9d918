"""Takes the head of the vault's audit log to a destination, and reads back what was taken there.

What is anchored can't be unsaid: whoever rewrites the log later contradicts a document that he can't reach. The
extractor itself looks at each pass whether the log still holds what it anchored last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from pgkeep.adapters import clock, durable
from pgkeep.adapters.destinations import Content, Listed, Place
from pgkeep.domain import anchors, audit
from pgkeep.domain.anchors import Anchor, Head, Placed
from pgkeep.errors import FormatError, NotFoundError, PgkeepError
from pgkeep.progress import Progress

# Daily even when a pass comes late.
HEARTBEAT: Final = dt.timedelta(hours=23)
LOCKED_FOR: Final = dt.timedelta(days=365)
# Some records, the largest ones even, and what a failing disk may have left after them.
_TAIL_BYTES: Final = 4 * audit.RECORD_LIMIT_BYTES
_FIGURES: Final = re.compile(r"\d+")
_ALARM: Final = (
    "the vault's audit log is not the one that was anchored: it was cut off, rewritten or replaced; "
    "`pgkeep audit verify --against` this destination says since when"
)


class Memory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is remembered of one destination's anchors. ``alarm`` stays until all of this is forgotten.

    ``trouble``: why no anchor could be stored in the last pass; ``alarm``: the log is not the one that was anchored.
    Both are sentences, empty where all is well.
    """

    head: Head | None = None
    stored_at: dt.datetime | None = None
    trouble: str = ""
    alarm: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """The anchors of one vault; of what else lies among them: how many are other vaults', and which say nothing."""

    anchors: tuple[Placed, ...]
    foreign: int
    unreadable: tuple[str, ...]


def publish(place: Place, log: Path, vault: str, memory: Memory, progress: Progress) -> Memory:
    """Store an anchor if the head of the vault's audit log is a new one, or the last anchor is nearly a day old.

    For the end of each pass, after the copies. ``vault``: its id. What goes wrong is told, once, and in the memory
    that is returned; it must not keep anything from being copied.
    """
    try:
        with durable.explain(log, "anchoring the audit log"):
            now, (head, alarm) = clock.now(), _look(log, memory.head)
            if alarm and not memory.alarm:
                progress.warn(alarm)
                memory = msgspec.structs.replace(memory, alarm=alarm)
            if head is not None and _is_due(memory, head, now):
                _store(place, Anchor(vault=vault, anchored_at=now, head=head), progress)
                memory = msgspec.structs.replace(memory, head=head, stored_at=now)
    except PgkeepError as error:
        # A path there, and how much is free, are others each time.
        if _FIGURES.sub("", error.message) != _FIGURES.sub("", memory.trouble):
            progress.warn(f"the audit log is not anchored: {error.message}")
        return msgspec.structs.replace(memory, trouble=error.message)
    return msgspec.structs.replace(memory, trouble="")


def collect(place: Place, vault: str, progress: Progress) -> Collected:
    """Every anchor at a destination, in every version that it keeps. Raises ``StorageError``."""
    found, foreign, unreadable = [], 0, []
    for number, listed in enumerate(place.files((anchors.FOLDER,))):
        if not listed.path.endswith(anchors.SUFFIX):
            continue
        progress.advance(number, None)
        label = f"{listed.path} version {listed.version}" if listed.version else listed.path
        try:
            anchor = anchors.decode(_read(place, listed))
        except (FormatError, NotFoundError) as error:
            unreadable.append(f"{label}: {error.message}")
            continue
        if anchor.vault == vault:
            found.append(Placed(label, anchor))
        else:
            foreign += 1
    return Collected(tuple(found), foreign, tuple(unreadable))


def _read(place: Place, listed: Listed) -> bytes:
    return place.read(listed.path, anchors.SIZE_LIMIT_BYTES, listed.version)


def _look(log: Path, known: Head | None) -> tuple[Head | None, str]:
    """The log's head, and a sentence where what was anchored last is not in it any more. Raises as :func:`_head`."""
    try:
        with _opened(log) as descriptor:
            alarm = "" if known is None or _holds(descriptor, known) else _ALARM
            return _head(descriptor), alarm
    except NotFoundError:  # no vault has written yet, or somebody took it away
        return None, "" if known is None else _ALARM


@contextlib.contextmanager
def _opened(log: Path) -> Iterator[int]:
    """Raises ``NotFoundError``, ``RefusedError`` (no regular file), ``OSError``."""
    directory = os.open(log.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = durable.open_beneath(directory, log.name)
    finally:
        os.close(directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _head(log: int) -> Head | None:
    """None for a log that is empty yet. Raises ``FormatError`` where its end is no record, and nothing near it is."""
    size_bytes = os.fstat(log).st_size
    heads = (anchors.head_of(line, end) for line, end in _last_lines(log, size_bytes))
    head = next(filter(None, heads), None)
    if head is None and size_bytes > 0:
        raise FormatError("the vault's audit log does not end in records", "see `pgkeep audit verify`")
    return head


def _holds(log: int, known: Head) -> bool:
    """Does it still hold the record that was anchored, where it was? What comes before is chained to it."""
    line, end = next(_last_lines(log, known.log_bytes), (b"", 0))
    return (end, audit.line_digest(line)) == (known.log_bytes, known.sha256)


def _last_lines(log: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines without their newlines, and where each ends; the last one before ``end`` first, and not all."""
    begin = max(0, end - _TAIL_BYTES)
    *lines, _ = os.pread(log, end - begin, begin).split(b"\n")
    ends = itertools.accumulate((len(line) + 1 for line in lines), initial=begin)
    found = list(zip(lines, itertools.islice(ends, 1, None), strict=True))
    # The first one may have begun before what was read.
    return reversed(found[1:] if begin > 0 else found)


def _is_due(memory: Memory, head: Head, now: dt.datetime) -> bool:
    if memory.head is None or memory.stored_at is None or memory.head != head:
        return True
    return not memory.stored_at <= now < memory.stored_at + HEARTBEAT


def _store(place: Place, anchor: Anchor, progress: Progress) -> None:
    data = anchors.encode(anchor)
    content = Content(len(data), hashlib.sha256(data).hexdigest())
    source = os.memfd_create("pgkeep-anchor", os.MFD_CLOEXEC)
    try:
        durable.write_all(source, data)
        place.store(anchors.path_of(anchor), source, content, progress, retain_until=anchor.anchored_at + LOCKED_FOR)
    finally:
        os.close(source)
    progress.step("anchor.stored")
