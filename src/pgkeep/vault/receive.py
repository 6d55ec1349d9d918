"""What lies in staging is in other hands: opened without following anything, copied once, never looked at again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pgkeep.adapters import durable, fsflags
from pgkeep.domain import request as requests
from pgkeep.domain.request import Request
from pgkeep.errors import FormatError, RefusedError, StorageError
from pgkeep.progress import Progress
from pgkeep.vault.layout import Layout

DUMP_MODE = 0o440
COPY_STEP_BYTES = 64 * 1024 * 1024


def read_request(layout: Layout, staged_name: str) -> Request:
    """What the agent says of a hand-over. Raises ``FormatError``, ``NotFoundError``, ``RefusedError``."""
    request = requests.decode(read_small(layout, f"{staged_name}/{requests.FILE_NAME}", requests.SIZE_LIMIT_BYTES))
    if staged_name.partition(".")[0] != request.id:
        raise FormatError(f"the request in {staged_name} names another backup: {request.id}")
    return request


def read_small(layout: Layout, path: str, limit_bytes: int) -> bytes:
    """At most one byte more than the limit, for whoever decodes it to refuse."""
    with _opened(layout, path) as descriptor:
        data = b""
        while len(data) <= limit_bytes and (piece := os.read(descriptor, limit_bytes + 1 - len(data))):
            data += piece
    return data


def copy_dump(
    layout: Layout, staged_name: str, private: durable.NewFile, reserve_bytes: int, limit_bytes: int, progress: Progress
) -> None:
    """Into an inode of the vault's own: whoever holds the staged file open can't reach it.

    Raises ``RefusedError`` (larger than the limit), ``StorageError`` (no room beside the reserve).
    """
    with _opened(layout, f"{staged_name}/{requests.DUMP_NAME}") as source:
        size_bytes = os.fstat(source).st_size
        if size_bytes > limit_bytes:
            raise RefusedError(
                f"the dump has {size_bytes} bytes, more than the {limit_bytes} that are allowed",
                "raise PGKEEP_DUMP_LIMIT if the database really grew so large",
            )
        _require_room(layout, size_bytes, reserve_bytes)
        with durable.explain(layout.incoming, "copying the dump"):
            for offset in range(0, size_bytes, COPY_STEP_BYTES):
                durable.copy_range(source, offset, private.fd, min(COPY_STEP_BYTES, size_bytes - offset))
                progress.advance(min(offset + COPY_STEP_BYTES, size_bytes), size_bytes)
            os.fchmod(private.fd, DUMP_MODE)


def _require_room(layout: Layout, size_bytes: int, reserve_bytes: int) -> None:
    free_bytes = durable.free_bytes(layout.incoming)
    if free_bytes < size_bytes + reserve_bytes:
        raise StorageError(
            f"{layout.active} has {free_bytes} bytes free; the backup needs {size_bytes}"
            f" and {reserve_bytes} stay in reserve",
            "free space, enlarge the disk, or shorten the retention of what is yet to come",
        )


@contextlib.contextmanager
def _opened(layout: Layout, path: str) -> Iterator[int]:
    with fsflags.opened(layout.staging) as staging:
        descriptor = durable.open_beneath(staging, path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
