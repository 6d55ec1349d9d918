"""Where copies go: what every kind of destination can do. ``tests/contract/test_destinations.py`` holds them to it.

Paths are relative, with ``/`` between names: ``daily/2026-01-31/2026-01-31_23-59-59.sql.gz``.
A *version* is what the place itself calls the bytes that it took (S3's VersionId); empty where places keep none.
Whoever knows a version gives it with every later use: what somebody else wrote over it does not matter then.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from pgkeep.progress import Progress

# What is given as the size of something that is no regular file: never the size of a copy.
NOT_A_FILE = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """What a file holds, or must hold."""

    size_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """One file that lies at a destination, or one version of it."""

    path: str
    size_bytes: int
    version: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Lock:
    """Somebody else's rule that keeps a copy: until when, and of which strength."""

    mode: Literal["COMPLIANCE", "GOVERNANCE"]
    until: dt.datetime


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """What a trial of a destination showed, for ``pgkeep destination test``.

    ``lock``: ``proven`` (a credential that may delete tried, and was refused), ``asserted`` (the server says so when
    it is asked), ``none``. ``findings`` are sentences; ``ok``: copies can be made and read back.
    """

    ok: bool
    lock: Literal["proven", "asserted", "none"]
    findings: tuple[str, ...]


class RemoteFile(Protocol):
    """A file at a destination, open for reading at any offset; several threads may read at once.

    Fits :class:`pgkeep.adapters.artifact_reader.Source`.
    """

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """At most ``length`` bytes; none only at the end. Raises ``StorageError``."""


class Place(Protocol):
    """A destination that is open: for one pass, by one process."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What this destination can't do, in sentences; grows as it is found out."""

    def read_marker(self) -> bytes | None:
        """The file that tells this destination from an empty mount point; None if there is none."""

    def write_marker(self, data: bytes) -> None:
        """Durably; replaces what was there. Raises ``StorageError``."""

    def sizes(self, files: Mapping[str, str]) -> Mapping[str, int]:
        """Sizes in bytes of those of ``files`` (path to version) that are there; others are left out.

        Cheap: nothing is read. Raises ``StorageError``.
        """

    def read(self, path: str, limit_bytes: int, version: str = "") -> bytes:
        """A small file. Raises ``NotFoundError``, ``FormatError`` (too large, no regular file), ``StorageError``."""

    def content(self, path: str, progress: Progress, version: str = "") -> Content | None:
        """What is there, read in full from the medium itself. None for what can't be a copy: nothing, no regular file,
        or unreadable for a defect of the medium. Raises ``StorageError`` for other reasons."""

    def store(
        self,
        path: str,
        source: int,
        content: Content,
        progress: Progress,
        *,
        aside: str | None = None,
        retain_until: dt.datetime | None = None,
    ) -> str:
        """Copy an open file there; it appears under its name when it is whole, durable and was read back.

        Never overwrites: what stands there is renamed to ``aside`` (a name in the same folder) just before, or stays
        as an older version, or is the reason for a ``RefusedError``. ``retain_until``: how long the vault keeps the
        backup (None: for ever); a place that can lock holds it at least so long. Returns the version. Raises
        ``IntegrityError`` when the source is not ``content``, ``StorageError`` also when the medium gives back
        something else. After an error nothing of it counts as a copy.
        """

    def sweep(self, folders: Iterable[str]) -> list[str]:
        """Remove what a killed run left below these folders, at any depth of one level more. The paths removed."""

    def files(self, folders: Iterable[str]) -> Iterator[Listed]:
        """Every regular file in these folders and in the folders within them, by path; of versions of one path the
        oldest first. Deeper ones, which are none of pgkeep's, may be there or not.

        Only the files that pgkeep would read: no half-made ones, no delete markers. A folder that is not there is
        empty. Callers choose by the path's ending (``.manifest.json``) or by the folder (``anchors``, ``daily``).
        Raises ``StorageError``, also where listing is not allowed.
        """

    def opened_file(self, path: str, version: str = "") -> AbstractContextManager[RemoteFile]:
        """For reading parts of a large file. Raises ``NotFoundError``, ``FormatError`` (no regular file),
        ``StorageError``."""

    def lock(self, path: str, version: str = "") -> Lock | None:
        """What keeps this file from being removed by whoever can write here; None: nothing does."""

    def prolong(self, path: str, until: dt.datetime, version: str = "") -> None:
        """Lock it to that moment at least; nothing is ever shortened. Does nothing where places have no locks."""

    def secure(self, path: str, retain_until: dt.datetime | None, version: str = "") -> None:
        """Lock what was found there as :meth:`store` would have: whoever brought it may have been killed before."""

    def remove(self, path: str, version: str = "") -> None:
        """Remove a file whose time here is over. Raises ``RefusedError`` (locked, or never done at this kind of
        place), ``StorageError``. What is not there is no error."""

    def free_bytes(self) -> int | None:
        """Room for more; None where there is no telling."""


class Destination(Protocol):
    """A place outside the machine's vault that keeps copies."""

    @property
    def kind(self) -> str:
        """``directory``, ``s3``, ``rsync``."""

    @property
    def label(self) -> str:
        """How people know it: a path, a URL without secrets."""

    def opened(self, *, to_read: bool = False) -> AbstractContextManager[Place]:
        """``to_read``: nothing will be written, and no right to write is needed.

        Raises ``StorageError``, ``RefusedError``: it is missing, not ours to write to, or no place for copies.
        """

    def probe(self, progress: Progress) -> Probe:
        """Try out what it can do, leaving nothing behind but what a lock holds. Raises as :meth:`opened`."""
