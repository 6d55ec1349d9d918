"""The staging area: a dump under way is ``<id>.partial/``, a finished one ``<id>.ready/``, with nothing between."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pgkeep.adapters import durable
from pgkeep.domain import mailbox, names
from pgkeep.domain.mailbox import PARTIAL_SUFFIX, READY_SUFFIX
from pgkeep.domain.request import DUMP_NAME, FILE_NAME, Request, encode

# The vault reads what is handed over by its group.
DIRECTORY_MODE = 0o750
FILE_MODE = 0o640


class Staged:
    """One dump's own directory in staging, made new."""

    def __init__(self, staging: Path, identifier: str) -> None:
        self.identifier = identifier
        self.directory = staging / f"{identifier}{PARTIAL_SUFFIX}"
        self.ready = staging / f"{identifier}{READY_SUFFIX}"
        with durable.explain(staging, "make a directory for the dump"):
            self.directory.mkdir(mode=0o700)

    @contextlib.contextmanager
    def new_dump(self) -> Iterator[int]:
        """A descriptor to write the artifact to; on leaving without an error it is on the disk."""
        path = self.directory / DUMP_NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def hand_over(self, request: Request) -> None:
        """Leave only the dump and what is said of it, and give it its final name: from here the vault takes it.

        Nothing is synced: after a power cut a half-written dump fails the vault's digests, and is made again.
        """
        for name in ("raw", "shadow"):
            if (self.directory / name).exists():
                shutil.rmtree(self.directory / name)
        for name in ("pool", mailbox.FAILURE_NAME):
            (self.directory / name).unlink(missing_ok=True)
        (self.directory / FILE_NAME).write_bytes(encode(request))
        for name in (FILE_NAME, DUMP_NAME):
            (self.directory / name).chmod(FILE_MODE)
        self.directory.chmod(DIRECTORY_MODE)
        self.directory.rename(self.ready)

    def foresee(self, failure: mailbox.Failure) -> None:
        """Write down what is to be said if nobody comes to say it: after ``kill -9`` the next run finds it here."""
        with durable.explain(self.directory, "writing a report"):
            (self.directory / mailbox.FAILURE_NAME).write_bytes(mailbox.encode(failure))

    def clear(self) -> None:
        """Back to the beginning, for another try."""
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != mailbox.FAILURE_NAME:
                path.unlink()

    def remove(self) -> None:
        """Give up, or clean up after the vault took it."""
        for directory in (self.directory, self.ready):
            if directory.exists():
                shutil.rmtree(directory)


def sweep(staging: Path) -> Iterator[str]:
    """Remove what crashed dumps left: the caller holds the lock, so nothing here is under way.

    Yields each removed directory's name. Names that are not the agent's own are left alone.
    """
    for path in sorted(staging.iterdir()):
        stem, dot, suffix = path.name.rpartition(".")
        if names.is_identifier(stem) and dot + suffix in (PARTIAL_SUFFIX, READY_SUFFIX) and path.is_dir():
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path)
            yield path.name
