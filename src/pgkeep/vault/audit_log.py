"""The append-only record of everything that changed the vault, one JSON object a line."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from typing import Any

import msgspec

from pgkeep.adapters import durable, fsflags
from pgkeep.vault.layout import Vault


def record(vault: Vault, event: str, **details: Any) -> None:
    """Append a record and wait until it is on the disk. Raises ``StorageError``.

    The file is made with the append-only flag where the vault's protection is ``chattr``.
    """
    entry = {"time": dt.datetime.now(dt.UTC), "event": event, "by": f"uid {os.getuid()}, pid {os.getpid()}", **details}
    line = msgspec.json.encode(entry) + b"\n"
    path = vault.layout.audit
    with durable.explain(path, "writing the audit log"):
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
        try:
            if vault.protection == "chattr":
                # Where logs/ is on a filesystem without flags, :func:`weakness` has said so.
                with contextlib.suppress(fsflags.UnsupportedFlagsError):
                    fsflags.set_flag(descriptor, fsflags.APPEND, True)
            durable.write_all(descriptor, _after_torn_line(descriptor) + line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def weakness(vault: Vault) -> str:
    """Why the log is less protected than the backups; empty if it is not. Raises ``StorageError``."""
    with durable.explain(vault.layout.logs, "looking at the logs' filesystem"):
        try:
            with fsflags.opened(vault.layout.logs) as directory:
                fsflags.get_flags(directory)
        except fsflags.UnsupportedFlagsError as error:
            return f"the audit log can't be made append-only: {error.message}" if vault.protection == "chattr" else ""
    return ""


def holds(vault: Vault, event: str, identifier: str) -> bool:
    """Was this recorded already, before the crash that is being mended? Raises ``StorageError``."""
    path = vault.layout.audit
    wanted = (msgspec.json.encode({"event": event})[1:-1], msgspec.json.encode({"id": identifier})[1:-1])
    with durable.explain(path, "reading the audit log"):
        if not path.exists():
            return False
        with path.open("rb") as lines:
            return any(line.endswith(b"}\n") and all(part in line for part in wanted) for line in lines)


def _after_torn_line(descriptor: int) -> bytes:
    """A full disk or a power cut may have left half a record, which can't be taken back: it stays a line of its own."""
    size_bytes = os.fstat(descriptor).st_size
    return b"" if size_bytes == 0 or os.pread(descriptor, 1, size_bytes - 1) == b"\n" else b"\n"
