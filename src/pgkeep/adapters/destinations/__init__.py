"""Where copies go: what every kind of destination can do. ``tests/contract/test_destinations.py`` holds them to it.

Paths are relative, with ``/`` between names: ``daily/2026-01-31/2026-01-31_23-59-59.sql.gz``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from pgkeep.progress import Progress

# What a listing gives as the size of something that is no regular file: never the size of a copy.
NOT_A_FILE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, or must hold."""

    size_bytes: int
    sha256: str


class Place(Protocol):
    """A destination that is open: for one pass, by one process."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What this destination can't do, in sentences; grows as it is found out."""

    def read_marker(self) -> bytes | None:
        """The file that tells this destination from an empty mount point; None if there is none."""

    def write_marker(self, data: bytes) -> None:
        """Durably; replaces what was there. Raises ``StorageError``."""

    def listing(self, folder: str) -> Mapping[str, int]:
        """Names and sizes in bytes in a folder, temporary names left out; nothing where there is no such folder."""

    def read(self, path: str, limit_bytes: int) -> bytes:
        """A small file. Raises ``NotFoundError``, ``FormatError`` (too large, no regular file), ``StorageError``."""

    def content(self, path: str, progress: Progress) -> Content | None:
        """What is there, read in full from the medium itself. None for what can't be a copy: nothing, no regular file,
        or unreadable for a defect of the medium. Raises ``StorageError`` for other reasons."""

    def store(self, path: str, source: int, content: Content, progress: Progress, aside: str | None = None) -> None:
        """Copy an open file there; it appears under its name when it is whole, durable and was read back.

        Never overwrites: what stands there is renamed to ``aside`` (a name in the same folder) just before,
        or is the reason for a ``RefusedError``. Raises ``IntegrityError`` when the source is not ``content``,
        ``StorageError`` also when the medium gives back something else. After an error nothing of it is left.
        """

    def sweep(self, folders: Iterable[str]) -> list[str]:
        """Remove what a killed run left below these folders, at any depth of one level more. The paths removed."""


class Destination(Protocol):
    """A place outside the machine's vault that keeps copies."""

    @property
    def kind(self) -> str:
        """One word, fit for a directory's name: the state of its copies lies under it."""

    @property
    def label(self) -> str:
        """How people know it: a path, a URL without secrets."""

    def opened(self) -> AbstractContextManager[Place]:
        """Raises ``StorageError``, ``RefusedError``: it is missing, not ours to write to, or no place for copies."""
