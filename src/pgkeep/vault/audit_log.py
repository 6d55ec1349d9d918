"""The append-only record of everything that changed the vault, one JSON object a line, each chained to the one before.

The chain itself is :mod:`pgkeep.domain.audit`. Whoever writes holds the vault's lock: two writers would both follow
the same line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pgkeep.adapters import clock, durable, fsflags
from pgkeep.domain import audit
from pgkeep.errors import RefusedError
from pgkeep.vault.layout import Vault

_BLOCK_BYTES = 64 * 1024
# Some 50 000 records: what a crash left is mended before much else is written.
SEARCHED_BYTES = 16 * 1024 * 1024
_REMEDY = "find out who put it there, move it away, and let pgkeep begin a new log"


def record(vault: Vault, event: str, **details: Any) -> None:
    """Append a record and wait until it is on the disk. Raises ``StorageError``, ``RefusedError`` (not our log).

    The file is made with the append-only flag where the vault's protection is ``chattr``. Details are cut to a
    bearable size. After a failure half a line may stay; the next record is chained over it.
    """
    path = vault.layout.audit
    own = {"time": clock.now(), "event": event, "by": f"uid {os.getuid()}, pid {os.getpid()}"}
    with durable.explain(path, "writing the audit log"), _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as log:
        if vault.protection == "chattr":
            # Where logs/ is on a filesystem without flags, :func:`weakness` has said so.
            with contextlib.suppress(fsflags.UnsupportedFlagsError):
                fsflags.set_flag(log, fsflags.APPEND, True)
        is_new = os.fstat(log).st_size == 0
        line = audit.encode(audit.link(_newest_first(log)), own, details)
        durable.write_all(log, _after_torn_line(log) + line)
        os.fsync(log)
    if is_new:
        with durable.explain(path, "writing the audit log"):
            durable.fsync_directory(path.parent)


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
    """Was this recorded not long ago, before the crash that is being mended? A record further back is not found.

    Raises ``StorageError``, ``RefusedError``.
    """
    wanted, path = msgspec.json.encode(identifier), vault.layout.audit
    with durable.explain(path, "reading the audit log"):
        try:
            with _opened(path, os.O_RDONLY) as log:
                # What a crash tore has no newline: no record, however whole it looks.
                lines = islice(_newest_first(log, SEARCHED_BYTES), 1 if _after_torn_line(log) else 0, None)
                return any(wanted in line and audit.is_about(line + b"\n", event, identifier) for line in lines)
        except FileNotFoundError:
            return False


def examine(path: Path) -> audit.Examination:
    """Does the log still hang together? One that does not exist is empty. Raises as :func:`holds`."""
    return audit.examine(lines_of(path))


def lines_of(path: Path) -> Iterator[bytes]:
    """Every line, the first one first, with its newline; of an overlong one the end, still too long to be a record."""
    with durable.explain(path, "reading the audit log"):
        try:
            with _opened(path, os.O_RDONLY) as log, os.fdopen(os.dup(log), "rb") as file:
                yield from _bounded_lines(file)
        except FileNotFoundError:
            return


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """The log, if that is what is there: a link, a FIFO or another user's file is not written to."""
    safe = flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        log = os.open(path, safe, 0o644)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR}:
            raise RefusedError(f"{path} is not opened: it is no regular file ({error.strerror})", _REMEDY) from error
        raise
    try:
        facts = os.fstat(log)
        if not stat.S_ISREG(facts.st_mode):
            raise RefusedError(f"{path} is not opened: it is no regular file", _REMEDY)
        # Whoever owns the directory can put any file there: their log is as good as ours.
        if facts.st_uid not in {os.geteuid(), path.parent.stat().st_uid, 0}:
            raise RefusedError(f"{path} belongs to uid {facts.st_uid}, who could rewrite it", f"{_REMEDY}, or chown it")
        yield log
    finally:
        os.close(log)


def _newest_first(log: int, limit_bytes: int | None = None) -> Iterator[bytes]:
    """The lines from the last one backwards, without newlines, in blocks: the last one costs the same in any log.

    With a limit, no more than that of the log's end is read; the last of these lines may be a part of one.
    """
    position = os.fstat(log).st_size
    least = 0 if limit_bytes is None else max(0, position - limit_bytes)
    position -= position > 0 and os.pread(log, 1, position - 1) == b"\n"
    if position == 0 and os.fstat(log).st_size == 0:
        return
    line = b""
    while position > least:
        start = max(least, position - _BLOCK_BYTES)
        *others, last = os.pread(log, position - start, start).split(b"\n")
        position = start
        line = _tail(last + line)
        if others:
            yield line
            yield from reversed(others[1:])
            line = others[0]
    yield line


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    line = b""
    while piece := file.readline(_BLOCK_BYTES):
        line = _tail(line + piece)
        if piece.endswith(b"\n"):
            yield line
            line = b""
    if line:
        yield line


def _tail(line: bytes) -> bytes:
    """What is too long stays too long: the chain looks at no more than the last bytes of such a line."""
    return line[-(audit.LINE_LIMIT_BYTES + 2) :]


def _after_torn_line(log: int) -> bytes:
    """A full disk or a power cut may have left half a record, which can't be taken back: it stays a line of its own."""
    size_bytes = os.fstat(log).st_size
    return b"" if size_bytes == 0 or os.pread(log, 1, size_bytes - 1) == b"\n" else b"\n"
