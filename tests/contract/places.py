"""A place on one of the real filesystems, with the two directories that publishing takes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pgkeep.adapters import durable
from pgkeep.adapters.durable import NewFile
from tests.contract import filesystems


class Place:
    """A directory of the test's own with ``active`` and ``incoming`` in it, both open."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = path
        self.active, self.incoming = path / "active", path / "incoming"
        self.active.mkdir(parents=True)
        self.incoming.mkdir()
        self.active_fd = os.open(self.active, os.O_DIRECTORY)
        self.incoming_fd = os.open(self.incoming, os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.active_fd)
        os.close(self.incoming_fd)

    def new_file(self, data: bytes = b"sealed") -> NewFile:
        new = NewFile.create(self.active_fd, self.incoming_fd)
        durable.write_all(new.fd, data)
        return new

    @property
    def has_flags(self) -> bool:
        return self.kind in filesystems.WITH_FLAGS


def assert_empty_soon(path: Path) -> None:
    """libfuse hides an unlinked file that is open, and removes it afterwards."""
    deadline = time.monotonic() + 5
    while os.listdir(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(path) == []
