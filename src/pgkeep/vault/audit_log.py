"""The append-only record of everything that changed the vault, one JSON object a line."""

from __future__ import annotations

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
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
        try:
            if vault.protection == "chattr" and not fsflags.has_flag(descriptor, fsflags.APPEND):
                fsflags.set_flag(descriptor, fsflags.APPEND, True)
            durable.write_all(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
