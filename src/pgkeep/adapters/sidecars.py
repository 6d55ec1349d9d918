"""Reads the small files beside a dump, whoever put them there: nothing is followed, waited for, or read without end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from pgkeep.adapters.durable import storage_error
from pgkeep.errors import FormatError, NotFoundError


def read_sidecar(path: Path, limit_bytes: int) -> bytes:
    """All of a regular file. A FIFO or device is not waited for, a symbolic link not followed.

    Raises ``NotFoundError``, ``FormatError`` (larger than the limit, a link, no regular file), ``StorageError``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path.name} is missing") from error
    except OSError as error:
        # ENXIO: a socket, or a device without a driver.
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise FormatError(f"{path.name} is not a regular file") from error
        raise storage_error(error, path, "reading the file") from error
    try:
        return _read_whole(descriptor, path, limit_bytes)
    except OSError as error:
        raise storage_error(error, path, "reading the file") from error
    finally:
        os.close(descriptor)


def _read_whole(descriptor: int, path: Path, limit_bytes: int) -> bytes:
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise FormatError(f"{path.name} is not a regular file")
    data = bytearray()
    # It may grow while it is read: the limit holds for what comes, not for what was promised.
    while facts.st_size <= limit_bytes and len(data) <= limit_bytes:
        block = os.read(descriptor, min(limit_bytes + 1 - len(data), 1024 * 1024))
        if not block:
            return bytes(data)
        data += block
    raise FormatError(f"{path.name} is larger than {limit_bytes} bytes")
