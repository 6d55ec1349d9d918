"""The bytes of a remote file in order, a few requests at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
from collections.abc import Generator, Iterator
from typing import Final

from pgkeep.adapters.destinations import RemoteFile
from pgkeep.errors import IntegrityError
from pgkeep.restore.ranges import pieces

PIECE_BYTES: Final = 8 * 1024 * 1024
PARALLEL_READS: Final = 4


def read_exactly(remote: RemoteFile, start: int, end: int) -> Iterator[bytes]:
    """These bytes, as they come. Raises ``IntegrityError`` where the file ends before, ``StorageError``."""
    while start < end:
        length = min(end - start, PIECE_BYTES)
        # A server that sends more than it was asked for is not believed.
        data = remote.read(start, length)[:length]
        if not data:
            raise IntegrityError(
                f"the copy ends at byte {start}; it should have {end} at least", "use another destination's copy"
            )
        start += len(data)
        yield data


def in_order(remote: RemoteFile, start: int, end: int) -> Generator[bytes, None, None]:
    """As :func:`read_exactly`, fetching ahead: at most ``PARALLEL_READS + 1`` pieces are in memory."""
    with concurrent.futures.ThreadPoolExecutor(PARALLEL_READS) as threads:
        submitted = (threads.submit(_piece, remote, *each) for each in pieces([(start, end)], PIECE_BYTES))
        pending = collections.deque(itertools.islice(submitted, PARALLEL_READS))
        try:
            while pending:
                data = pending.popleft().result()
                pending.extend(itertools.islice(submitted, 1))
                yield data
        finally:
            for future in pending:
                future.cancel()


def _piece(remote: RemoteFile, start: int, end: int) -> bytes:
    return b"".join(read_exactly(remote, start, end))
