"""One run at a time: a lock file that says who holds it, and goes with the process however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pgkeep.adapters.durable import explain
from pgkeep.adapters.fsflags import opened
from pgkeep.errors import BusyError

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def locked(path: Path, wait_seconds: float = 0.0, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock file exclusively (flock: it goes with the process, however that ends).

    ``on_wait`` is told once who holds it. Raises ``BusyError`` saying so when the time is up. The file stays.
    """
    with explain(path, "opening the lock file"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with explain(path, "locking"):
            _acquire(fd, path, wait_seconds, on_wait)
            _record_holder(fd)
        yield
    finally:
        os.close(fd)


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Mark a directory as somebody's until the end of the block, however the process ends."""
    with opened(directory) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield


def is_abandoned(directory: Path) -> bool:
    """True where nobody holds it :func:`in_use`."""
    with opened(directory) as fd:
        return _try_lock(fd)


def _acquire(fd: int, path: Path, wait_seconds: float, on_wait: Callable[[str], None] | None) -> None:
    deadline = time.monotonic() + wait_seconds
    while not _try_lock(fd):
        holder = _describe_holder(fd)
        if time.monotonic() >= deadline:
            raise BusyError(f"{path} is held by {holder}", "wait until it has finished, or stop it")
        if on_wait is not None:
            on_wait(holder)
            on_wait = None
        time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _record_holder(fd: int) -> None:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"pid": os.getpid(), "host": socket.gethostname(), "command": command[:200], "started": started}
    try:
        # Padded, so that the block stays allocated and a full disk does not stand in the way next time.
        os.pwrite(fd, json.dumps(record).ljust(1023).encode() + b"\n", 0)
    except OSError as error:
        if error.errno not in _FULL:  # a full disk must not keep `cleanup` from making room
            raise


def _describe_holder(fd: int) -> str:
    try:
        record = json.loads(os.pread(fd, 4096, 0))
        return f"process {record['pid']} on {record['host']} ({record['command']}) since {record['started']}"
    except (ValueError, KeyError, TypeError):  # empty or torn: the holder is about to write it
        return "another process"
