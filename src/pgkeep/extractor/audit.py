"""``extraction_audit.jsonl``: what was copied, mended, lost and removed, one JSON object a line.

The vault reads it, to learn which destinations have which backups (``vault/confirmations.py``).
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from pgkeep.adapters import clock, durable
from pgkeep.errors import RefusedError

Event = Literal[
    "extracted",
    "adopted",
    "repaired",
    "copy missing",
    "copy damaged",
    "copy expired",
    "lock prolonged",
    "extraction failed",
    "destination adopted",
    "temporary files removed",
]
_TEXT_LIMIT_CHARACTERS: Final = 4096


def record(path: Path, event: Event, /, **details: Any) -> None:
    """Append a record and wait until it is on the disk. Raises ``StorageError``, ``RefusedError`` (not a file)."""
    shown = {
        name: value[:_TEXT_LIMIT_CHARACTERS] if isinstance(value, str) else value for name, value in details.items()
    }
    line = msgspec.json.encode({"time": clock.now(), "event": event, **shown}) + b"\n"
    with durable.explain(path, "writing the extractor's audit log"):
        # Not waiting for whoever may read from a FIFO.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RefusedError(f"{path} is not a regular file", "move it away: the extractor makes a new log")
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # passes to several destinations write at the same time
            durable.write_all(descriptor, _after_torn_line(descriptor) + line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _after_torn_line(descriptor: int) -> bytes:
    """A full disk or a power cut may have left half a record: it stays a line of its own."""
    size_bytes = os.fstat(descriptor).st_size
    return b"" if size_bytes == 0 or os.pread(descriptor, 1, size_bytes - 1) == b"\n" else b"\n"
