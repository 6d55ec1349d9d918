"""A file that rsync is writing here, read as it grows."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final, Self

from pgkeep.adapters import durable
from pgkeep.adapters.destinations import Content
from pgkeep.errors import StorageError
from pgkeep.progress import Progress

_BLOCK_BYTES: Final = 1024 * 1024
# Holes are made in whole blocks of the filesystem.
_HOLE_BYTES: Final = 64 * 1024
# What rsync says before it writes the file once more from its beginning.
_AGAIN: Final = "failed verification"


class Received:
    """The SHA-256 of a file that is written from its beginning to its end (``--inplace --whole-file``).

    What was read is given back to the filesystem, so that a large file needs little room here.
    """

    def __init__(self, path: Path, progress: Progress, total_bytes: int | None) -> None:
        self._path = path
        self._progress = progress
        self._total_bytes = total_bytes
        self._descriptor = -1
        self._digest = hashlib.sha256()
        self._done_bytes = 0
        self._hole_bytes = 0
        self._can_punch = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def tick(self, _: bytes) -> None:
        """Read on, as far as there is something. Raises ``StorageError``."""
        with durable.explain(self._path, "reading what is fetched"):
            while self._is_open() and (block := os.pread(self._descriptor, _BLOCK_BYTES, self._done_bytes)):
                self._digest.update(block)
                self._done_bytes += len(block)
                self._let_go()
                self._progress.advance(self._done_bytes, self._total_bytes)
        self._progress.advance(self._done_bytes, self._total_bytes)

    def content(self, messages: str) -> Content | None:
        """When rsync is done, with what it said: what came; None if nothing did. Raises ``StorageError``."""
        self.tick(b"")
        if _AGAIN in messages:
            raise StorageError(f"{self._path.name} did not come whole: what came had another checksum", "try again")
        return Content(self._done_bytes, self._digest.hexdigest()) if self._is_open() else None

    def _is_open(self) -> bool:
        if self._descriptor < 0:
            try:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except (FileNotFoundError, IsADirectoryError):
                return False
        return stat.S_ISREG(os.fstat(self._descriptor).st_mode)

    def _let_go(self) -> None:
        length = (self._done_bytes - self._hole_bytes) // _HOLE_BYTES * _HOLE_BYTES
        if self._can_punch and length > 0:
            self._can_punch = durable.punch_hole(self._descriptor, self._hole_bytes, length)
            self._hole_bytes += length
