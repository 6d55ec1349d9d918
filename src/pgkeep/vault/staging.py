"""What the agent has left for the vault: only names and kinds are looked at here, however many and whatever they hide.

The agent leaves directories. Links, files and devices of an entry's name are no entries: they are counted, and nothing
else is done about them, so that no number of them keeps the vault from answering.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pgkeep.adapters import durable
from pgkeep.domain import mailbox, names

Kind = Literal["ready", "failed", "asked"]
_KINDS: dict[str, Kind] = {
    mailbox.READY_SUFFIX: "ready",
    mailbox.FAILED_SUFFIX: "failed",
    mailbox.ASKED_SUFFIX: "asked",
}
SUFFIXES = tuple(_KINDS)


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A name in staging that is the agent's to the vault, ordered as they are to be taken: the oldest first."""

    id: str
    kind: Kind

    @property
    def name(self) -> str:
        return f"{self.id}.{self.kind}"


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
    """The first of what there is to do; how many names there were in all; how long looking took.

    ``forged``: how many had an entry's name and were no directory, ``example`` one of them.
    """

    entries: tuple[Entry, ...]
    names: int
    seconds: float
    forged: int = 0
    example: str = ""


def scan(staging: Path, limit: int, is_wanted: Callable[[str], bool]) -> Scan:
    """At most ``limit`` entries whose identifier is wanted, in constant memory. Raises ``StorageError``."""
    started = time.monotonic()
    counted = _Counted()
    with durable.explain(staging, "looking for what the agent handed over"), os.scandir(staging) as found:
        entries = heapq.nsmallest(limit, (entry for entry in counted.entries(found) if is_wanted(entry.id)))
    return Scan(tuple(entries), counted.names, time.monotonic() - started, counted.forged, counted.example)


def entry_of(name: str) -> Entry | None:
    """None for every name that is not exactly the agent's form: no ``..``, newline or stray byte gets past it."""
    stem, dot, suffix = name.rpartition(".")
    kind = _KINDS.get(dot + suffix)
    return Entry(stem, kind) if kind is not None and names.is_identifier(stem) else None


def is_there(staging: Path, identifier: str) -> bool:
    """Does any entry of that identifier lie in staging still?"""
    return any(_is_directory(staging / f"{identifier}{suffix}") for suffix in SUFFIXES)


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


class _Counted:
    """Picks the entries out of what passes through, and counts."""

    def __init__(self) -> None:
        self.names = 0
        self.forged = 0
        self.example = ""

    def entries(self, found: Iterator[os.DirEntry[str]]) -> Iterator[Entry]:
        for each in found:
            self.names += 1
            entry = entry_of(each.name)
            if entry is None:
                continue
            if each.is_dir(follow_symlinks=False):
                yield entry
            else:
                self.forged += 1
                self.example = each.name
