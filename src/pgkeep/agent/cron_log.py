"""``logs/cron.log``: what the scheduled runs said, for people. It is cut in place: its directory is not the agent's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pgkeep.adapters import durable
from pgkeep.errors import StorageError

SIZE_LIMIT_BYTES = 5 * 1000 * 1000
KEPT_BYTES = 1000 * 1000


class CronLog:
    """Appends lines. Where it can't, it says so once and goes on trying: a log is no reason to make no backup."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._failed = False

    def append(self, line: str) -> None:
        try:
            with durable.explain(self._path, "appending to the log"):
                _append(self._path, f"{line}\n".encode(errors="replace"))
            self._failed = False
        except StorageError as error:
            if not self._failed:
                self._failed = True
                self._warn(f"cron.log can't be written: {error.message}")


def _append(path: Path, data: bytes) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    try:
        if os.fstat(descriptor).st_size + len(data) > SIZE_LIMIT_BYTES:
            _keep_tail(descriptor)
        durable.write_all(descriptor, data)
    finally:
        os.close(descriptor)


def _keep_tail(descriptor: int) -> None:
    """Only the last part, from the beginning of a line."""
    size_bytes = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, KEPT_BYTES, max(0, size_bytes - KEPT_BYTES))
    os.ftruncate(descriptor, 0)
    durable.write_all(descriptor, tail[tail.find(b"\n") + 1 :])
