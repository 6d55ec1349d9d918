"""What the agent has left for the vault: only names are looked at here, however many and whatever they hide."""

from __future__ import annotations

import dataclasses
import heapq
import os
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
    """The first of what there is to do; how many names there were in all; how long looking took."""

    entries: tuple[Entry, ...]
    names: int
    seconds: float


def scan(staging: Path, limit: int, is_wanted: Callable[[str], bool]) -> Scan:
    """At most ``limit`` entries whose identifier is wanted, in constant memory. Raises ``StorageError``."""
    started = time.monotonic()
    counted = _Counted()
    with durable.explain(staging, "looking for what the agent handed over"), os.scandir(staging) as found:
        named = (entry_of(each.name) for each in counted.of(found))
        entries = heapq.nsmallest(limit, (entry for entry in named if entry is not None and is_wanted(entry.id)))
    return Scan(tuple(entries), counted.names, time.monotonic() - started)


def entry_of(name: str) -> Entry | None:
    """None for every name that is not exactly the agent's form: no ``..``, newline or stray byte gets past it."""
    stem, dot, suffix = name.rpartition(".")
    kind = _KINDS.get(dot + suffix)
    return Entry(stem, kind) if kind is not None and names.is_identifier(stem) else None


def is_there(staging: Path, identifier: str) -> bool:
    """Does any entry of that identifier lie in staging still?"""
    return any(os.path.lexists(staging / f"{identifier}{suffix}") for suffix in SUFFIXES)


class _Counted:
    """Counts what passes through."""

    def __init__(self) -> None:
        self.names = 0

    def of(self, found: Iterator[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
        for each in found:
            self.names += 1
            yield each
